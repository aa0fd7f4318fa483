"""Import this repository as one package, for programs that have modules of their own called `util`, `ops` or `tools`.

Modules here import each other by names at the top level, as scripts do. In a package, those imports are changed to the
package's modules while a file is compiled; nothing at the top level is imported or hidden.
"""

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
PREFIX = __name__.removesuffix("util.package")  # of the names of modules here: that of the package with a dot, or none


def imported(name: str) -> ModuleType:
    """Import a module of this repository, or another one, by its name as in the files."""
    return import_module(f"{PREFIX}{name}" if PREFIX and find_spec(f"{PREFIX}{name}") else name)


def is_ours(module: str) -> bool:
    """Return whether the first part of a module's name is at the top of this repository."""
    top = ROOT / module.partition(".")[0]
    return top.with_suffix(".py").is_file() or any(top.glob("*.py"))


class _Imports(ast.NodeTransformer):
    """Changes the imports of modules of this repository to those of a package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.module and not node.level and is_ours(node.module):
            node.module = f"{self.package}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        statements: list[ast.stmt] = []
        for alias in node.names:
            name = f"{self.package}.{alias.name}" if is_ours(alias.name) else alias.name
            statements.append(ast.Import([ast.alias(name, alias.asname)]))
            if name != alias.name and not alias.asname:  # `import util.files` defines `util`
                statements.append(ast.ImportFrom(self.package, [ast.alias(alias.name.partition(".")[0])], 0))
        return [ast.copy_location(statement, node) for statement in statements]


class _Loader(SourceFileLoader):
    """Compiles a file with the imports of its package; `name` is that of the module in it."""

    def source_to_code(self, data: Any, path: Any, *, _optimization: int = -1) -> CodeType:  # type: ignore[override]
        tree = _Imports(self.name.partition(".")[0]).visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimization)

    def path_stats(self, path: Any) -> NoReturn:
        """Keep Python from reading and writing __pycache__, where scripts have the file compiled without a package."""
        raise OSError


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


def as_package(name: str) -> None:
    """Let `import_module(f"{name}.{module}")` import the modules of this repository; a package may call it itself."""
    package = sys.modules.setdefault(name, ModuleType(name))
    if getattr(package, "__path__", None) != [str(ROOT)]:
        package.__path__ = [str(ROOT)]
        sys.meta_path.insert(0, _Finder(name))
