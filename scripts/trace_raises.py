#!/usr/bin/env python
"""Run tests and say which `raise` and which `except` of the package they never came to; fails where there is one.

    python scripts/trace_raises.py -n auto                                      # the whole suite
    python scripts/trace_raises.py --log build/reached.txt tests/test_check.py  # one file, added to what the log holds

Each is noted by a call that is put in front of it while its module is imported, in processes that tests start too.  A comment
`untested: REASON` in the line takes one out.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ptq", "kernels", "models", "eval")


class Mark(ast.NodeTransformer):
    """Calls `reached_by_tests("file:line")` in front of what raises and in what handles."""

    def __init__(self, file: str) -> None:
        self.file, self.places = file, []

    def call(self, line: int) -> ast.stmt:
        self.places.append(f"{self.file}:{line}")
        return ast.parse(f"reached_by_tests({self.places[-1]!r})").body[0]

    def visit_Raise(self, node: ast.Raise) -> list[ast.stmt]:
        return [self.call(node.lineno), node]

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.ExceptHandler:
        handles = not isinstance(node.body[0], ast.Raise)
        self.generic_visit(node)
        node.body = [*([self.call(node.lineno)] if handles else []), *node.body]
        return node


def marked(path: Path) -> tuple[ast.Module, list[str]]:
    """(the module's code with its marks, the places that are marked)"""
    mark = Mark(str(path.resolve().relative_to(ROOT)))
    return ast.fix_missing_locations(mark.visit(ast.parse(path.read_bytes()))), mark.places


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # never from or to a .pyc
        return compile(marked(Path(self.path))[0], self.path, "exec", dont_inherit=True)


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path=None, target=None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, path, target) if fullname.split(".")[0] == "ptq" else None
        if spec and isinstance(spec.loader, SourceFileLoader) and ROOT in Path(spec.loader.path).parents:
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install(log: str) -> None:
    """In every process: that an import of ours is marked, and that what is reached is written down."""
    import builtins

    file, seen = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), set()

    def reached_by_tests(place: str) -> None:
        if place not in seen:
            seen.add(place)
            os.write(file, f"{place}\n".encode())

    builtins.reached_by_tests = reached_by_tests  # type: ignore[attr-defined]
    sys.meta_path.insert(0, Finder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="file that is added to; default: one of this run alone")
    options, tests = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        log = (options.log or Path(folder) / "reached").resolve()
        start = f"import runpy\nrunpy.run_path({__file__!r})['install']({str(log)!r})\n"
        (Path(folder) / "sitecustomize.py").write_text(start)
        path = os.pathsep.join(filter(None, [folder, str(ROOT), os.environ.get("PYTHONPATH")]))
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
        ).returncode
        reached = set(log.read_text().splitlines()) if log.exists() else set()
    files = sorted(path for part in FOLDERS for path in (ROOT / part).rglob("*.py"))
    lines = {place: path for path in files for place in marked(path)[1]}

    def line(place):
        return lines[place].read_text().splitlines()[int(place.rpartition(":")[2]) - 1].strip()

    excluded = {p for p in lines if "untested:" in line(p)}
    missing = [place for place in lines if place not in reached | excluded]
    for place in missing:
        print(f"{place}: {line(place)}")
    print(f"{len(lines)} places, {len(reached & lines.keys())} reached, {len(excluded)} left out, {len(missing)} missing")
    return code or bool(missing)


if __name__ == "__main__":
    sys.exit(main())
