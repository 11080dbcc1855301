"""Hydra's grammar: text that it cannot read is quoted where its meaning is plain; for the rest, the quoting that works."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from opd_lightning.config.aliases import renamed

VALUED: tuple[str, ...] = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
VALUED += ("--package", "-p", "--cfg", "-c", "--info", "-i")
"""Hydra's flags whose value may be the next word; of -i and --info it need not."""

KEY = re.compile(r"(\+{1,2}|~)?[\w$./:@-]+")
CALL = re.compile(
    r"(choice|range|interval|glob|shuffle|sort|tag|extend_list|bool|int|float|str|json_str|cast)\(.*\)", re.DOTALL
)
OPEN = re.compile(r"(model\.template_options|task\.options)\.\w+(\.\w+)*=.*", re.DOTALL)
"""Keys of mappings that are the user's to fill."""

TEXT = ("name", "path", "output_dir", "split", "teacher")
"""Last parts of keys that hold text: 2024_01 is a name there, and not the number 202401."""

BRACKETS = {"[": "]", "{": "}", "(": ")"}


def split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides, of a command line."""
    flags: list[str] = []
    words: list[str] = []
    waiting = False
    for word in arguments:
        (flags if waiting or word.startswith("-") else words).append(word)
        waiting = not waiting and word in VALUED
    return flags, words


def mended(arguments: Sequence[str]) -> list[str]:
    """A command line whose overrides Hydra can read, with the keys of today; see `taken`."""
    flags, words = split_words(arguments)
    return [*flags, *(taken(renamed(word), is_sweep(arguments)) for word in words)]


def is_sweep(arguments: Sequence[str]) -> bool:
    """Does this command line ask for a sweep?"""
    return any(word in ("-m", "--multirun") or re.fullmatch(r"hydra\.mode=multirun", word, re.I) for word in arguments)


def read(word: str) -> Override:
    """What Hydra reads in an override.

    Raises:
        HydraException: it cannot.
    """
    return OverridesParser.create().parse_override(word)


def readable(word: str) -> bool:
    """Can Hydra read this override?"""
    try:
        read(word)
    except HydraException:
        return False
    return True


def taken(word: str, sweep: bool = False) -> str:
    """An override with its text quoted where Hydra needs that: letters of other alphabets, '=', '#', brackets, apostrophes.

    Quotes of the user's own, lists, options by name, calls such as range(1,5), commas of a sweep and ${...} keep their meaning.

    Args:
        sweep: a comma separates the values of a sweep.
    """
    if OPEN.fullmatch(word):
        word = f"++{word}"
    key, equals, value = word.partition("=")
    if not equals or not KEY.fullmatch(key):
        return word
    if readable(word):
        number = key.split(".")[-1] in TEXT and isinstance(read(word)._value, int | float)
        plain = number and not isinstance(read(word)._value, bool)
        return f"{key}={quoted(value.strip())}" if plain else word
    made = f"{key}={spelled(value.strip(), sweep)}"
    return made if readable(made) else word


def spelled(value: str, sweep: bool = False) -> str:
    """A value as Hydra can read it; unchanged where it is not plain what it should be."""
    if readable(f"x={value}") or value[:1] in ("'", '"') or CALL.fullmatch(value):
        return value
    if value[:1] in ("[", "{") and all(depth for _, depth in depths(value)):
        return value  # a bracket that is not closed
    inside = split(value[1:-1]) if encloses(value) else []
    if value.startswith("[") and inside:
        return f"[{','.join(spelled(part) for part in inside)}]"
    if inside and all(re.match(r"[\w.-]+\s*:", part) for part in inside):
        pairs = [part.partition(":") for part in inside]
        return f"{{{','.join(f'{name.strip()}:{spelled(part.strip())}' for name, _, part in pairs)}}}"
    if sweep and len(parts := split(value)) > 1:
        return ",".join(spelled(part) for part in parts)
    return quoted(value)


def quoted(value: str) -> str:
    """Text in quotes, for Hydra."""
    mark = "'" if '"' in value else '"'
    escaped = re.sub(rf"(\\*)({mark}|$)", lambda m: m[1] * 2 + (f"\\{mark}" if m[2] else ""), value)
    return f"{mark}{escaped}{mark}"


def encloses(value: str) -> bool:
    """Does the bracket that opens a value close at its end?"""
    return value[:1] in ("[", "{") and next((i for i, depth in depths(value) if depth == 0), None) == len(value) - 1


def split(value: str) -> list[str]:
    """The parts between commas that stand in no brackets or quotes."""
    commas = [i for i, depth in depths(value) if depth == 0 and value[i] == ","]
    return [value[i + 1 : j].strip() for i, j in zip([-1, *commas], [*commas, len(value)], strict=True)]


def depths(value: str) -> list[tuple[int, int]]:
    """For each character outside quotes its place and how many brackets are open behind it; a quote opens at a part's start."""
    found, closing, mark, start = [], list[str](), "", True
    for i, char in enumerate(value):
        if mark:
            mark = "" if char == mark and value[i - 1] != "\\" else mark
            continue
        if start and char in "'\"":
            mark, start = char, False
            continue
        if char in BRACKETS:
            closing.append(BRACKETS[char])
        elif closing and char == closing[-1]:
            closing.pop()
        start = char in ",[{(:" or (start and char.isspace())
        found.append((i, len(closing)))
    return found


def unreadable(words: Sequence[str], sweep: bool = True) -> str | None:
    """A sentence on the first override that Hydra cannot read or would take for a sweep, with what to write instead.

    Args:
        sweep: is it one?
    """
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            return f"{word} is no override; write key=value, and for the shell 'key=a value' where it has spaces."
        try:
            override = read(word)
            if not sweep and override.is_sweep_override():
                return (
                    f"{word} names several values, which needs a sweep (python -m opd_lightning -m ...); a list is written "
                    f"{shell(key, f'[{value}]')}, one text with a comma {shell(key, quoted(value))}."
                )
            broken = None if override.is_sweep_override() else interpolation(override.value())
        except HydraException as error:
            reason = str(error).splitlines()[0]
            text = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
            return f"{word} is not in Hydra's grammar ({reason}); as text it is written {shell(key, quoted(text))}."
        if broken:
            return f"{word}: {broken} is no ${{key}} to fill in; a literal one is written \\${{."
    return None


def interpolation(value: Any) -> str | None:
    """The first text, however nested, with a `${` that does not begin an interpolation."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return next((found for part in inside if (found := interpolation(part))), None)
    if not isinstance(value, str) or "${" not in value:
        return None
    try:
        OmegaConf.create({"value": value})
    except GrammarParseError:
        return value[value.index("${") :][:20]
    return None


def shell(key: str, value: str) -> str:
    """An override as a shell takes it."""
    return shlex.quote(f"{key}={value}")
