"""`ptq plan`: what `ptq quantize` would do with the same arguments."""

from ptq.cli import quantize


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    return quantize.main(["--plan", *(argv or [])], prog)
