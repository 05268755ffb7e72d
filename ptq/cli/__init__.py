"""`ptq COMMAND …`"""

import sys
from importlib import import_module

# What it is called, the module whose main(argv) it is, and what it does.  A module is loaded when it is called.
COMMANDS = {
    "quantize": ("ptq.cli.quantize", "quantize a model to 4 bits"),
    "plan": ("ptq.cli.plan", "say what quantizing would do, take, and where it would fail"),
    "evaluate": ("ptq.cli.evaluate", "models side by side: perplexity, KL, lm-eval tasks, size"),
    "check": ("ptq.cli.check", "a checkpoint, anyone's, against what readers and engines impose"),
    "convert": ("ptq.cli.convert", "a checkpoint in another layout, bit for bit"),
    "compare": ("ptq.cli.compare", "many methods and formats on one model"),
}


def usage() -> str:
    lines = [f"  {name:10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: ptq COMMAND …", "", *lines, "", "`ptq COMMAND --help` tells more; `ptq --version` the version."])


def main(argv: list[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from ptq import __version__

        print(f"ptq {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"{usage()}\n\nptq: there is no command {name!r}", file=sys.stderr)
        return 2
    return import_module(COMMANDS[name][0]).main(rest, prog=f"ptq {name}")
