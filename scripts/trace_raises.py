#!/usr/bin/env python
"""Run tests and say which `raise` and which `except` of ptq/, kernels/, models/ and eval/ they never came to; fails where one is.

    python scripts/trace_raises.py -n auto                                      # the whole suite
    python scripts/trace_raises.py --log build/reached.txt tests/test_check.py  # a part, added to what the log holds

A call is put in front of each as its module is imported, also in processes that tests start, and notes that it was reached.
"""

import argparse
import ast
import builtins
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
    """Puts `note_reached(PLACE)` in front of what raises, and first in what handles; `places` is each, file:line."""

    def __init__(self, path: Path) -> None:
        self.file, self.places = path.resolve().relative_to(ROOT), list[str]()
        self.code = ast.fix_missing_locations(self.visit(ast.parse(path.read_bytes())))

    def mark(self, node: ast.Raise | ast.ExceptHandler) -> ast.stmt:
        self.places.append(f"{self.file}:{node.lineno}")
        return ast.parse(f"note_reached({self.places[-1]!r})").body[0]

    def visit_Raise(self, node: ast.Raise) -> list[ast.stmt]:
        return [self.mark(node), node]

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        mark = [] if isinstance(node.body[0], ast.Raise) else [self.mark(node)]
        self.generic_visit(node)
        node.body = [*mark, *node.body]
        return node


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # from no .pyc and to none
        return compile(Mark(Path(self.path)).code, self.path, "exec", dont_inherit=True)


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path=None, target=None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, path, target) if fullname.split(".")[0] == "ptq" else None
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    builtins.note_reached = lambda place: os.write(file, f"{place}\n".encode())  # type: ignore[attr-defined]
    sys.meta_path.insert(0, Finder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="a file to add to")
    args, tests = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        log = (args.log or Path(folder) / "reached").resolve()
        start = f"import runpy\nrunpy.run_path({__file__!r})['install']({str(log)!r})\n"
        (Path(folder) / "sitecustomize.py").write_text(start)  # which Python runs first, in every process
        paths = os.pathsep.join(filter(None, [folder, str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pytest", *tests]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}).returncode
        reached = set(log.read_text().splitlines()) if log.exists() else set()
    files = sorted(path for part in FOLDERS for path in (ROOT / part).rglob("*.py"))
    places = [place for path in files for place in Mark(path).places]
    missing = [place for place in places if place not in reached]
    print(*missing, f"{len(places)} places, {len(missing)} of them not reached", sep="\n")
    return code or bool(missing)


if __name__ == "__main__":
    sys.exit(main())
