"""Collect definitions of this repository, and all that they need of it, in one Python file.

Their text is copied with its comments. What belongs to timm's registration, to the choice of backends and to fused
operators is left out; see `INSTEAD` and `IDLE`.
"""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Place = tuple[str, str]  # a module and a name in it, or "" for the module itself
INSTEAD: dict[Place, Place] = {  # what takes the place of a definition
    ("timm_models", "TimmModel"): ("torch.nn", "Module"),
    ("timm.layers", "trunc_normal_"): ("torch.nn.init", "trunc_normal_"),
    **{("ops", name): ("ops.plain", name) for name in ("selective_scan", "causal_conv1d", "check_backend")},
}
IDLE = {"_fuses"}  # an `if` that asks one of these is left out: the answer is no


def path_of(module: str) -> Path | None:
    """Return the file of a module of this repository, None of another one."""
    place = ROOT.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def lines_of(node: Any) -> range:
    """Return the lines of a statement, counted from 0, with its decorators."""
    return range(min(part.lineno for part in (node, *getattr(node, "decorator_list", []))) - 1, node.end_lineno)


def names_of(node: Any) -> list[str]:
    """Return the names that a statement defines."""
    parts = (node, *getattr(node, "targets", [getattr(node, "target", None)]))
    return [name for part in parts if (name := getattr(part, "name", None) or getattr(part, "id", None))]


class Needs:
    """The needs of a statement: `names`, and `attributes`, which are names behind a dot; and which lines to `drop`.

    Of a class it keeps the methods of these names and those of Python's protocols.
    """

    def __init__(self, node: ast.AST, methods: set[str]) -> None:
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.drop: set[int] = set()
        self._walk(node, methods)

    def _walk(self, node: ast.AST, methods: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            idle = isinstance(child, ast.If) and any(getattr(part, "id", "") in IDLE for part in ast.walk(child.test))
            method = child.name if isinstance(node, ast.ClassDef) and isinstance(child, ast.FunctionDef) else "__"
            if idle or not (method.startswith("__") or method in methods):
                self.drop |= {*lines_of(child)}
                continue
            self.names |= {getattr(child, "id", "")}
            self.attributes |= {getattr(child, "attr", "")}
            self._walk(child, methods)


class Source:
    """The text of a module of this repository, its definitions by name, and the places that it imports."""

    def __init__(self, module: str) -> None:
        path = path_of(module)
        assert path is not None, module
        self.path, self.text = path.relative_to(ROOT), path.read_text(encoding="utf-8").splitlines()
        self.tree = ast.parse("\n".join(self.text))
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, Place] = {}
        package = module.split(".")[: None if path.name == "__init__.py" else -1]
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                origin = ".".join([*base, *filter(None, [node.module])])
                self.imports |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
            else:
                self.definitions |= dict.fromkeys(names_of(node), node)

    def excerpt(self, node: ast.stmt, drop: set[int]) -> str:
        """Return the text of a definition and of the comment right above it, without some lines."""
        lines = lines_of(node)
        start = lines.start
        while start and self.text[start - 1].startswith("#"):
            start -= 1
        text = "\n".join(self.text[n] for n in range(start, lines.stop) if n not in drop)
        return re.sub(r"\n{3,}", "\n\n", text).strip("\n")  # blank lines around what is left out


class Collection:
    """The definitions that a module of this repository imports from others, with those that they need.

    Raises:
        KeyError, AttributeError: a definition needs what cannot be copied, such as a module as a whole.
    """

    def __init__(self, entry: str) -> None:
        self.sources: dict[str, Source] = {}
        self.methods: set[str] = set()
        start = self.source(entry)
        wanted = Needs(start.tree, set()).attributes | {"forward", "backward"}  # torch calls these
        while not wanted <= self.methods:  # a method that is kept may call others
            self.methods |= wanted
            self.found: dict[str, dict[ast.stmt, Needs]] = {}  # by module
            self.external: set[tuple[str, str, str]] = set()  # module, name in it, local name
            self.below: dict[str, set[str]] = {}  # the modules that a module needs
            for place in start.imports.values():
                if path_of(place[0]):
                    self.take(place)
            wanted = {name for found in self.found.values() for needs in found.values() for name in needs.attributes}

    def source(self, module: str) -> Source:
        """Return a module of this repository, which is read once."""
        return self.sources.get(module) or self.sources.setdefault(module, Source(module))

    def take(self, place: Place) -> None:
        """Add a definition and what it needs."""
        module, name = place
        source, found = self.source(module), self.found.setdefault(module, {})
        if (node := source.definitions[name]) in found:
            return
        found[node] = Needs(node, self.methods)
        for needed in found[node].names:
            if needed in source.definitions:
                self.take((module, needed))
            elif needed in source.imports:
                origin = INSTEAD.get(source.imports[needed], source.imports[needed])
                if path_of(origin[0]):
                    self.below.setdefault(module, set()).add(origin[0])
                    self.take(origin)
                else:
                    self.external.add((*origin, needed))

    def imports(self) -> str:
        """Return the imports of other packages, Python's own first."""
        lines = {
            f"import {module}" + f" as {local}" * (local != module) for module, name, local in self.external if not name
        }
        for module in {module for module, name, _ in self.external if name}:
            names = {name for origin, name, _ in self.external if origin == module and name}
            lines.add(f"from {module} import {', '.join(sorted(names))}")
        own = {line for line in lines if line.split()[1].partition(".")[0] in sys.stdlib_module_names}
        in_order = [sorted(part, key=lambda line: (line.startswith("from"), line)) for part in (own, lines - own)]
        return "\n\n".join("\n".join(part) for part in in_order)

    def text(self) -> str:
        """Return imports and definitions; those of each module follow those that it needs."""
        parts = [self.imports()]
        for module in TopologicalSorter(self.below).static_order():
            source, found = self.source(module), self.found[module]
            parts.append(f"# From {source.path.as_posix()}")
            parts += [source.excerpt(node, found[node].drop) for node in source.tree.body if node in found]
        text = "\n\n\n".join(parts) + "\n"
        for _, name, local in self.external:
            if name and name != local:
                text = re.sub(rf"\b{local}\b", name, text)
        return text
