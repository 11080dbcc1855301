"""The reference of keys: place, default, type and meaning, read from the options' YAML and their targets' signatures."""

import ast
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from inspect import Parameter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple

import yaml

from opd_lightning.config import CONF_DIR
from opd_lightning.config.schema import parameters_of
from opd_lightning.config.signatures import lookup

PARTS = ("prompt", "completion", "demonstration", "solution", "answer", "system", "skill", "id", "tools")
PRESETS = ("method", "experiment", "study")
"""Groups whose options choose others and set keys of theirs."""

FIXED = {
    "name": ("str", ""),
    "seed": ("int", ""),
    "output_dir": ("str", ""),
    "init_from_run": ("list or null", ""),
    "optimize": ("str, list or null", ""),
    "max_tokens_per_microbatch": ("int, auto or null", ""),
    "logits_chunk_size": ("int", ""),
    "data.batch_size": ("int", ""),
    "data.max_prompt_tokens": ("int or null", ""),
    "data.overlong": ("refuse or drop", ""),
    "study.name": ("str", ""),
    "adapter.lora_alpha": ("int", ""),
    "trainer.precision": ("str", ""),
    "logger.job_type": ("str or null", ""),
    "evaluation.every": ("int", "updates between evaluations"),
    "evaluation.suite": ("dict", "the evaluations, by a name of your own"),
    "evaluation.answers": ("dict or null", "what writes answers.jsonl; null: nothing does"),
    "task.heldout.path": ("str", "held-out rows, as task.path"),
    "task.heldout.name": ("str or null", "configuration of a hub data set that has several"),
    "task.heldout.split": ("str", "of a folder or a hub data set"),
    "split": ("str", "whose examples are used: train, validation or test"),
    **{f"task.columns.{part}": ("str or null", "") for part in PARTS},
    **{
        f"{case}.{term}": ("float", f"factor of the term {term}")
        for case in ("below", "above", "own", "others", "right", "wrong")
        for term in ("divergence", "policy_gradient", "cross_entropy", "reference")
    },
}
"""Types and meanings of keys that neither a signature nor a comment has, by place or by the end of one."""

REFERENCE = re.compile(r"[\"']?\$\{(?:oc\.select:)?([\w.]+)\}[\"']?")
NAMES = {NoneType: "null", Any: "any", Callable: "function", Mapping: "dict", Sequence: "list", Collection: "list"}
ARGUMENT = re.compile(r"^ {4}(\*{0,2}\w+(?:, \w+)*): (.*(?:\n {8,}.*)*)", re.MULTILINE)


class Key(NamedTuple):
    """A key of an option.

    Attributes:
        place: as on the command line, such as optim.lr.
        default: as in the YAML.
        type: of the values that it takes; empty where only the target knows.
        meaning: a phrase.
    """

    place: str
    default: str
    type: str
    meaning: str


class Option(NamedTuple):
    """An option of a group, such as optim=adamw; with an empty group the keys that all runs have."""

    group: str
    name: str
    meaning: str
    keys: list[Key]

    @property
    def title(self) -> str:
        """What chooses it."""
        return f"{self.group}={self.name}" if self.group else "every run"


def options(folders: Sequence[Path] = (Path(CONF_DIR),)) -> list[Option]:
    """The options of all groups with their keys, the keys of every run first."""
    found = [Option("", "", "Keys of every run.", keys_of(Path(CONF_DIR) / "config.yaml", ""))]
    for folder in folders:
        for path in sorted(folder.glob("*/**/*.yaml"), key=lambda p: (p.parent.relative_to(folder).as_posix(), p.stem)):
            group = path.parent.relative_to(folder).as_posix()
            keys = [] if group.split("/")[0] in PRESETS else keys_of(path, group)
            found.append(Option(group, path.stem, first_line(path), keys))
    known: dict[str, Key] = {}
    for key in (key for option in found for key in option.keys):
        if (key.meaning or key.type) and (key.place not in known or not known[key.place].meaning):
            known[key.place] = key
    return [option._replace(keys=[completed(key, known) for key in option.keys]) for option in found]


def completed(key: Key, known: Mapping[str, Key], depth: int = 3) -> Key:
    """A key with the type and the meaning that it has elsewhere, where its own file says none."""
    parts = key.place.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]
    fixed = next((FIXED[end] for end in ends if end in FIXED), ("", ""))
    others = [known[end] for end in ends if end in known]
    if depth and (found := REFERENCE.fullmatch(key.default)) and found[1] in known:
        others.append(completed(known[found[1]], known, depth - 1))
    kinds = [key.type if not FIXED.get(key.place, ("",))[0] else "", fixed[0], *(other.type for other in others)]
    meanings = [key.meaning, fixed[1], *(other.meaning for other in others)]
    return key._replace(type=next(filter(None, kinds), ""), meaning=next(filter(None, meanings), ""))


def first_line(path: Path) -> str:
    """What an option's file says that it is."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("# ") and not line.startswith("# @")]
    return lines[0].removeprefix("# ").split(": python -m")[0] if lines else ""


def keys_of(path: Path, group: str) -> list[Key]:
    """The keys that a file sets, in its order."""
    text = path.read_text()
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode) or "# @package" in text:
        return []  # a preset, or an option that is null
    lines = text.splitlines()
    base = {key.place: key for parent in parents(root, path) for key in keys_of(parent, group)}
    targets = dict(inherited(root, path))
    found = []
    for place, node, value, target in leaves(root, group.replace("/", "."), targets):
        key, above = place.rpartition(".")[2], base.get(place, Key(place, "", "", ""))
        meaning = comment(lines, node) or meaning_in_source(target, key) or above.meaning
        kind = kind_in_source(target, key) or above.type or kind_of(value)
        found.append(Key(place, shown(value, text), kind, meaning))
    return found


def parents(root: yaml.MappingNode, path: Path) -> Iterator[Path]:
    """The options of the same group that a file builds on."""
    for entry in next((v.value for k, v in root.value if k.value == "defaults"), []):
        if isinstance(entry, yaml.ScalarNode) and (beside := path.parent / f"{entry.value}.yaml").is_file():
            yield beside


def inherited(root: yaml.MappingNode, path: Path) -> Iterator[tuple[str, str]]:
    """The targets by place inside an option, those of the options that it builds on too."""
    for parent in parents(root, path):
        above = yaml.compose(parent.read_text())
        assert isinstance(above, yaml.MappingNode)
        yield from inherited(above, parent)
    yield from targets_in(root, "")


def targets_in(node: yaml.MappingNode, place: str) -> Iterator[tuple[str, str]]:
    """The `_target_` of a node and of those inside it, by place."""
    for key, value in node.value:
        if key.value == "_target_":
            yield place, value.value
        elif isinstance(value, yaml.MappingNode):
            yield from targets_in(value, f"{place}.{key.value}")


def leaves(
    node: yaml.MappingNode, place: str, targets: Mapping[str, str], inside: str = ""
) -> Iterator[tuple[str, yaml.Node, yaml.Node, str]]:
    """The keys of a node that are no nodes themselves: place, key, value and the target that takes it."""
    for key, value in node.value:
        if key.value.startswith("_") or (key.value in ("defaults", "hydra") and not inside):
            continue
        where = f"{place}.{key.value}".lstrip(".")
        deeper = f"{inside}.{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value and not is_value(key.value, deeper, targets):
            yield from leaves(value, where, targets, deeper)
        else:
            yield where, key, value, targets.get(inside, "")


def is_value(key: str, inside: str, targets: Mapping[str, str]) -> bool:
    """Whether a mapping is passed on as a whole, so that its keys are not this package's."""
    return key in ("options", "template_options") and inside not in targets


def comment(lines: Sequence[str], node: yaml.Node) -> str:
    """The comment behind a key, or above it where none is behind; the first line is the file's own."""
    number = node.start_mark.line
    if found := re.search(r"(?:^|\s)#\s+(.*)$", lines[number][node.end_mark.column :]):
        return found[1].rstrip(",;")
    above: list[str] = []
    while number > 1 and lines[number - 1].strip().startswith("# "):
        number -= 1
        above.insert(0, lines[number].strip().removeprefix("# "))
    return " ".join(above)


def shown(value: yaml.Node, text: str) -> str:
    """A value as it stands in the file."""
    found = text[value.start_mark.index : value.end_mark.index].strip()
    return " ".join(re.sub(r"\s+#.*", "", found).split()) or "null"


def kind_of(value: yaml.Node) -> str:
    """The type of a value; empty for null and for references to other keys."""
    if not isinstance(value, yaml.ScalarNode):
        return "list" if isinstance(value, yaml.SequenceNode) else "dict"
    if "${" in value.value or value.value == "???":
        return ""
    return {"null": ""}.get(kind := value.tag.rpartition(":")[2], kind)


@cache
def meaning_in_source(target: str, name: str) -> str:
    """What the docstring of one of this package's targets says of an argument; empty without."""
    module, _, attribute = target.rpartition(".")
    found = lookup(module, attribute) if module.startswith("opd_lightning") else None
    while found is not None and isinstance(found.node, ast.ClassDef | ast.FunctionDef):
        for names, text in ARGUMENT.findall((ast.get_docstring(found.node) or "").replace("\n\n", "\n\n ")):
            if name in names.split(", "):
                return sentence(text)
        bases = found.node.bases if isinstance(found.node, ast.ClassDef) else []
        above = next((base.id for base in bases if isinstance(base, ast.Name)), None)
        found = lookup(found.module, above) if above else None
    return ""


def sentence(text: str) -> str:
    """An argument's description on one line."""
    return " ".join(text.split()).rstrip(".").replace("None", "null").replace("True", "true").replace("False", "false")


@cache
def kind_in_source(target: str, name: str) -> str:
    """The type of a target's argument; empty where its signature does not say one of plain types."""
    if not target:
        return ""
    try:
        parameter = parameters_of(target).get(name)
    except ValueError:
        return ""
    return "" if parameter is None or parameter.annotation is Parameter.empty else type_name(parameter.annotation)


def type_name(annotation: Any) -> str:
    """A type as it is written in the reference."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, UnionType):
        names = [name for kind in typing.get_args(annotation) for name in type_name(kind).split(" or ")]
        names = list(dict.fromkeys(sorted(names, key=lambda name: name == "null")))
        return " or ".join([", ".join(names[:-1]), names[-1]]) if names[:-1] else names[0]
    if origin is typing.Literal:
        return " or ".join(map(str, typing.get_args(annotation)))
    plain = origin or annotation
    return NAMES.get(plain) or {"tuple": "list", "set": "list"}.get(name := getattr(plain, "__name__", ""), name)
