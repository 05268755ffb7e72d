"""What several commands' arguments share."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def check_least(parser: argparse.ArgumentParser, args: argparse.Namespace, least: dict[str, int]) -> None:
    """Ends the program where a number is below its `least`."""
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {bound}")


def as_record(kind: type[T], args: argparse.Namespace) -> T:
    """The arguments as a frozen record with those names; lists become tuples."""
    values: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def call(
    prog: str | None,
    add: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
) -> int:
    """Exit status of a command whose arguments `add` declares and whose work `run` does."""
    parser = argparse.ArgumentParser(prog=prog)
    add(parser)
    args = parser.parse_args(argv)
    return answered(lambda: run(args))


def answered(work: Callable[[], int], kept: str = "nothing was kept") -> int:
    """work(); or, said in a line, 1 for an error and 130 for Ctrl-C, after which there is what `kept` says."""
    from safetensors import SafetensorError

    try:
        return work()
    except (ValueError, OSError, RuntimeError, MemoryError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130


def quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
