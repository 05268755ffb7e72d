"""`ptq convert`: a 4-bit checkpoint in another layout, without quantizing anew."""

from ptq.cli.arguments import call


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    from ptq.export.commands import add_convert, run_convert

    return call(prog, add_convert, run_convert, argv)
