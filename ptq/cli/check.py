"""`ptq check`: a 4-bit checkpoint against what readers and serving engines impose."""

from ptq.cli.arguments import call


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    from ptq.export.commands import add_check, run_check

    return call(prog, add_check, run_check, argv)
