"""What an asset computes, as a version: the code that its function reaches, the templates, the schema, the settings.

The code is the syntax tree of the function and of every function, class and constant of ours that it reaches, whichever
module they live in. Docstrings, comments, formatting, annotations of arguments and the names of modules do not count.
"""

import ast
import dataclasses
import functools
import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from resources.settings.settings import Settings
from resources.storage.files import file_sha256, json_sha256
from synpo_assets.graph.services import Services
from synpo_assets.graph.tables import Table

PROJECT = Path(__file__).parents[2]
PACKAGES = ("synpo_assets", "resources")
# What only shows, logs, stores or holds settings makes no other data when it changes. A schema counts by what it allows.
NOT_FOLLOWED = ("synpo_assets.graph", "resources.common", "resources.settings", "resources.storage")
FOLLOWED = ("resources.storage.seed_source",)
TEMPLATE_SUFFIXES = (".jinja", ".yaml")
VERSION_DIGITS = 12
# A setting that names a file whose content decides what is made.
REVIEWED = "preferences.reviewed"
Scope = frozenset[str]


@dataclasses.dataclass(frozen=True)
class Definition:
    """A function, class or constant at the top level of a module of ours."""

    module: str
    name: str


def code_version(
    functions: Iterable[Callable[..., Any]], schema: type[Table] | None, reads: Sequence[str], settings: Settings
) -> str:
    """The version of what a stage computes.

    Args:
        functions: The body of the stage, and what it calls without naming it.
        schema: What its table may hold; None if it makes no table.
        reads: The settings that decide the result, by dotted name (`preferences`, `engine.dtype`).
    """
    read = {name: to_jsonable_python(operator.attrgetter(name)(settings)) for name in reads}
    decided = {
        "code": sorted(set().union(*(reached_code(Definition(each.__module__, each.__name__)) for each in functions))),
        "schema": schema and _constraints(schema),
        "settings": read,
        "templates": [_hash(Path(path).read_text()) for path in _template_files(read)],
        **_reviewed(read),
    }
    return json_sha256(decided)[:VERSION_DIGITS]


@functools.cache
def reached_code(start: Definition) -> frozenset[str]:
    """The hashes of a definition, of all that it reaches, and of the templates that these name."""
    waiting, seen, hashes = [start], {start}, set[str]()
    while waiting:
        definition = waiting.pop()
        parts, reached = _read(definition.module, _names(definition.module)[definition.name])
        hashes.update(parts)
        new = reached - seen
        seen |= new
        waiting += new
    return frozenset(hashes)


# Reading takes things out of the tree, so a statement that defines several names is read once for all of them.
@functools.cache
def _read(module: str, node: ast.stmt) -> tuple[frozenset[str], frozenset[Definition]]:
    """The hashes of the statement of a definition with its templates, and what it refers to."""
    reader = _Reader(module)
    own = {_hash(ast.dump(reader.visit(node), annotate_fields=False))}
    templates = {_hash(found.read_text()) for name in reader.templates for found in _file(module).parent.rglob(name)}
    return frozenset(own | templates), frozenset(reader.reached)


class _Reader(ast.NodeTransformer):
    """Takes out of a syntax tree what does not count, and collects what it refers to."""

    def __init__(self, module: str) -> None:
        self.reached: set[Definition] = set()
        self.templates: set[str] = set()
        self._module = module
        self._scopes: list[tuple[Scope, dict[str, str]]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            argument.annotation = None
        node.returns = None
        node.decorator_list = [each for each in node.decorator_list if not _is_stage(each)]
        return self._in_scope(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._in_scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        _without_docstring(node)
        return self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        return None if self._scopes else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if self._scopes else node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value.endswith(TEMPLATE_SUFFIXES):
            self.templates.add(Path(node.value).name)
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        self._reach(self._resolved(node.id))
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name):
            if node.value.id == "services" and node.attr in Services.__dataclass_fields__:
                self._reach_service(node.attr)
                return node
            base = self._resolved(node.value.id)
            if isinstance(base, str):
                # What a module is called does not count.
                self._reach(_resolve(base, node.attr))
                return ast.Name(node.attr, ast.Load())
        return self.generic_visit(node)

    def _in_scope(self, node: ast.FunctionDef | ast.Lambda) -> ast.AST:
        if isinstance(node, ast.FunctionDef):
            _without_docstring(node)
        nodes = list(ast.walk(node))
        self._scopes.append((frozenset(_bound(nodes)), dict(_imports(nodes))))
        node = self.generic_visit(node)  # type: ignore[assignment]
        self._scopes.pop()
        if isinstance(node, ast.FunctionDef) and not node.body:
            node.body = [ast.Pass()]
        return node

    def _resolved(self, name: str) -> Definition | str | None:
        """What a name means here: a definition of ours, one of our modules, or nothing of ours."""
        for bound, imports in reversed(self._scopes):
            if name in imports:
                return _target(imports[name])
            if name in bound:
                return None
        return _resolve(self._module, name)

    def _reach(self, found: Definition | str | None) -> None:
        if isinstance(found, Definition) and _is_followed(found.module):
            self.reached.add(found)

    def _reach_service(self, name: str) -> None:
        """A method of a service may be called: its class counts, as the bundle of services states it."""
        kind = Services.__dataclass_fields__[name].type
        if isinstance(kind, type) and kind.__module__.split(".")[0] in PACKAGES:
            self._reach(_resolve(kind.__module__, kind.__name__))


def _is_followed(module: str) -> bool:
    infrastructure = any(module == name or module.startswith(f"{name}.") for name in NOT_FOLLOWED)
    return module in FOLLOWED or not infrastructure


def _resolve(module: str, name: str) -> Definition | str | None:
    """Follows a name from module to module to where it is defined."""
    if name in _names(module):
        return Definition(module, name)
    imports = _module_imports(module)
    return _target(imports[name]) if name in imports else None


@functools.cache
def _target(path: str) -> Definition | str | None:
    """What a dotted path of an import leads to."""
    if path.split(".")[0] not in PACKAGES:
        return None
    if _file(path).exists():
        return path
    module, _, name = path.rpartition(".")
    return _resolve(module, name) if _file(module).exists() else None


@functools.cache
def _file(module: str) -> Path:
    place = PROJECT / module.replace(".", "/")
    file = place.with_suffix(".py")
    # A module may have a folder of the same name beside it, such as that of the templates.
    return file if file.exists() else place / "__init__.py"


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text())


@functools.cache
def _names(module: str) -> dict[str, ast.stmt]:
    """The statements that define the names at the top level of a module."""
    found: dict[str, ast.stmt] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found |= {name.id: node for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


@functools.cache
def _module_imports(module: str) -> dict[str, str]:
    return dict(_imports(_tree(module).body))


def _imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, str]]:
    """The names that import statements bind, with the dotted paths that they mean."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            yield from ((each.asname or each.name, f"{node.module}.{each.name}") for each in node.names)
        elif isinstance(node, ast.Import):
            yield from ((each.asname, each.name) for each in node.names if each.asname)


def _bound(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The names that are local to a function, given all nodes of its tree: its arguments, and what it assigns to."""
    for node in nodes:
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _without_docstring(node: ast.FunctionDef | ast.ClassDef) -> None:
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:] or [ast.Pass()]


def _is_stage(decorator: ast.expr) -> bool:
    """Whether a decorator states what a stage is; what of that decides the result is counted by its value."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Name) and called.id == "Stage"


def _constraints(schema: type[Table]) -> dict[str, Any]:
    """What a schema allows; the descriptions of its columns do not count."""
    whole = schema.to_schema()
    columns = {
        name: [
            str(column.dtype),
            column.nullable,
            column.unique,
            sorted(str((c.name, c.statistics)) for c in column.checks),
        ]
        for name, column in whole.columns.items()
    }
    return {"columns": columns, "order": list(columns), "unique": whole.unique}


def _template_files(value: Any) -> Iterator[str]:
    """The templates of the user's own that settings name."""
    if isinstance(value, dict):
        for each in value.values():
            yield from _template_files(each)
    elif isinstance(value, str) and value.endswith(".jinja") and Path(value).is_file():
        yield value


def _reviewed(read: dict[str, Any]) -> dict[str, str]:
    """The content of the file of verdicts, where a stage reads the setting that names it."""
    place = read.get(REVIEWED)
    return {"reviewed": file_sha256(Path(place))} if place and Path(place).is_file() else {}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
