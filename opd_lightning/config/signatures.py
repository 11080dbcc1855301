"""Signatures: the parameters of a target, read from the source of packages whose import takes seconds.

What the source does not say plainly is None here, and read by importing the target; see `schema.parameters_of`.
"""

import ast
import builtins
import collections.abc
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.machinery import PathFinder
from typing import Any, NamedTuple

SLOW = ("opd_lightning", "lightning", "torch", "transformers", "peft")
"""Packages that import torch."""

TYPES = {"typing": typing, "collections.abc": collections.abc, "types": types}
"""Modules whose names in annotations are taken as they are."""

Parameters = dict[str, inspect.Parameter]


class Definition(NamedTuple):
    """A statement at a module's top level, and the module that it stands in."""

    node: ast.AST
    module: str


@cache
def signature(target: str) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of the class or function at a dotted path of one of the packages `SLOW`, without importing it."""
    module, _, name = target.rpartition(".")
    if target.split(".", maxsplit=1)[0] not in SLOW or (found := lookup(module, name)) is None:
        return None
    if isinstance(found.node, ast.FunctionDef):
        return parameters(found, found.node)
    return of_class(found) if isinstance(found.node, ast.ClassDef) else None


@cache
def source(module: str) -> tuple[ast.Module, bool] | None:
    """The syntax tree of a module's source, and whether it is a package's; its parents are not imported."""
    path, spec = None, None
    parts = module.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    with open(spec.origin, encoding="utf-8") as file:
        return ast.parse(file.read()), path is not None


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body and of its branches."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements([*node.body, *node.orelse])


@cache
def names(module: str) -> dict[str, Definition]:
    """What a module defines or imports by name; the first definition of each."""
    found: dict[str, Definition] = {}
    if (read := source(module)) is None:
        return found
    for node in statements(read[0].body):
        defined: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined = [node.name]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            defined = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            defined = [node.target.id]
        elif isinstance(node, ast.Assign):
            defined = [target.id for target in node.targets if isinstance(target, ast.Name)]
        for name in defined:
            found.setdefault(name, Definition(node, module))
    return found


def lookup(module: str, name: str, depth: int = 10) -> Definition | None:
    """The definition of a name in a module, followed through imports; None where it is not plain."""
    found = names(module).get(name) if module and depth else None
    if found is None or not isinstance(found.node, ast.ImportFrom):
        return found
    alias = next(alias for alias in found.node.names if name == (alias.asname or alias.name))
    return lookup(origin(found.node, module), alias.name, depth - 1)


def origin(node: ast.ImportFrom, module: str) -> str:
    """The absolute name of the module that a statement imports from."""
    if not node.level:
        return node.module or ""
    read = source(module)
    parts = module.split(".")
    keep = len(parts) - node.level + (1 if read is not None and read[1] else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def of_class(found: Definition) -> Parameters | None:
    """The parameters of a class's constructor, its own or inherited."""
    assert isinstance(found.node, ast.ClassDef)
    own = next((n for n in found.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if own is not None:
        read = parameters(found, own)
        return read and dict(list(read.items())[1:])  # without self
    if any(isinstance(n, ast.FunctionDef) and n.name == "__new__" for n in found.node.body) or found.node.keywords:
        return None
    if decorators := [call.func if isinstance(call, ast.Call) else call for call in found.node.decorator_list]:
        return of_dataclass(found) if ast.unparse(decorators[0]) in ("dataclass", "dataclasses.dataclass") else None
    bases = [b for b in found.node.bases if ast.unparse(b).split("[")[0] not in ("object", "Protocol", "Generic", "ABC")]
    for base in bases:
        above = lookup(found.module, base.id) if isinstance(base, ast.Name) else None
        inherited = of_class(above) if above is not None and isinstance(above.node, ast.ClassDef) else None
        if inherited is None or inherited or base is bases[-1]:
            return inherited
    return {}


def of_dataclass(found: Definition) -> Parameters | None:
    """The fields of a dataclass, inherited ones first."""
    assert isinstance(found.node, ast.ClassDef)
    fields: Parameters = {}
    for base in reversed(found.node.bases):
        above = lookup(found.module, base.id) if isinstance(base, ast.Name) else None
        if above is None or not isinstance(above.node, ast.ClassDef):
            return None
        if above.node.decorator_list:
            fields |= of_dataclass(above) or {}
    for node in found.node.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        if "ClassVar" in kind or "KW_ONLY" in kind or "InitVar" in kind:
            return None
        given = {word.arg: word.value for word in node.value.keywords} if is_field(node.value) else None
        if given is not None and "init" in given and ast.unparse(given["init"]) == "False":
            fields.pop(node.target.id, None)
            continue
        optional = node.value is not None if given is None else bool({"default", "default_factory"} & set(given))
        fields[node.target.id] = parameter(node.target.id, node.annotation, optional, found.module)
    return fields


def is_field(node: ast.AST | None) -> typing.TypeGuard[ast.Call]:
    """Whether a value is a call of `dataclasses.field`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("field", "dataclasses.field")


def parameters(found: Definition, node: ast.FunctionDef) -> Parameters:
    """The parameters of a function; decorators are taken to keep them."""
    given, kinds = node.args, inspect._ParameterKind
    made: list[inspect.Parameter] = []
    positional = [*given.posonlyargs, *given.args]
    for i, arg in enumerate(positional):
        kind = kinds.POSITIONAL_ONLY if i < len(given.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        optional = i >= len(positional) - len(given.defaults)
        made.append(parameter(arg.arg, arg.annotation, optional, found.module, kind))
    if given.vararg:
        made.append(parameter(given.vararg.arg, given.vararg.annotation, False, found.module, kinds.VAR_POSITIONAL))
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        made.append(parameter(arg.arg, arg.annotation, default is not None, found.module, kinds.KEYWORD_ONLY))
    if given.kwarg:
        made.append(parameter(given.kwarg.arg, given.kwarg.annotation, False, found.module, kinds.VAR_KEYWORD))
    return {p.name: p for p in made}


def parameter(
    name: str,
    annotation: ast.expr | None,
    optional: bool,
    module: str,
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD,
) -> inspect.Parameter:
    """A parameter; the value of its default is not read."""
    default = ... if optional else inspect.Parameter.empty
    return inspect.Parameter(name, kind, default=default, annotation=evaluated(annotation, module))


def evaluated(annotation: ast.expr | None, module: str) -> Any:
    """The type that an annotation names; empty where it is not plain."""
    if annotation is None or is_text(annotation, module):
        return inspect.Parameter.empty
    try:
        return eval(compile(ast.Expression(annotation), module, "eval"), {"__builtins__": {}}, Names(module))
    except Exception:  # of a type that is known only once it is imported
        return inspect.Parameter.empty


def is_text(annotation: ast.expr, module: str) -> bool:
    """Whether Python keeps an annotation as text."""
    future = names(module).get("annotations")
    later = future is not None and isinstance(future.node, ast.ImportFrom) and future.node.module == "__future__"
    return later or (isinstance(annotation, ast.Constant) and isinstance(annotation.value, str))


class Names(dict):
    """The names in a module's annotations: builtins, those of `TYPES`, aliases of such, and a stand-in for other classes."""

    def __init__(self, module: str):
        super().__init__()
        self.module = module

    def __missing__(self, name: str) -> Any:
        direct = names(self.module).get(name)
        if direct is None:
            return getattr(builtins, name)
        if isinstance(direct.node, ast.Import):
            alias = next(alias for alias in direct.node.names if name == (alias.asname or alias.name))
            return TYPES.get(alias.name) or Library()
        if isinstance(direct.node, ast.ImportFrom) and (module := direct.node.module or "") in TYPES:
            alias = next(alias for alias in direct.node.names if name == (alias.asname or alias.name))
            return getattr(TYPES[module], alias.name)
        found = lookup(self.module, name)
        if found is not None and isinstance(found.node, ast.Assign | ast.AnnAssign):
            return evaluated(found.node.value, found.module)
        if found is not None and isinstance(found.node, ast.ClassDef):
            return type(name, (Other,), {})
        raise KeyError(name)


class Library:
    """The stand-in for an imported module, such as torch in torch.dtype."""

    def __getattr__(self, name: str) -> type:
        return type(name, (Other,), {})


class Other:
    """The stand-in for a class that is not imported."""

    def __class_getitem__(cls, _: object) -> type:
        return cls
