"""Hydra's grammar: quotes for text that Hydra cannot parse, where its meaning is clear, and error messages with them."""

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
"""Hydra's flags whose value may be the next word; it is optional for -i and --info."""

KEY = re.compile(r"(\+{1,2}|~)?[\w$./:@-]+")
CALL = re.compile(
    r"(choice|range|interval|glob|shuffle|sort|tag|extend_list|bool|int|float|str|json_str|cast)\(.*\)", re.DOTALL
)
OPEN = re.compile(r"(model\.template_options|task\.options)\.\w+(\.\w+)*=.*", re.DOTALL)
"""Keys of mappings with free names."""

TEXT = ("name", "path", "output_dir", "split", "teacher")
"""Last parts of keys that hold text: there 2024_01 is a name, not the number 202401."""

COMMANDS = ("check", "evaluate", "export", "study", "dashboard")
"""Modules of this package that are commands."""

BRACKETS = {"[": "]", "{": "}", "(": ")"}


def split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags with their values, and the overrides, of a command line."""
    flags: list[str] = []
    words: list[str] = []
    expects_value = False
    for word in arguments:
        (flags if expects_value or word.startswith("-") else words).append(word)
        expects_value = not expects_value and word in VALUED
    return flags, words


def quote_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with quoted overrides and current keys; see `quote_override`."""
    flags, words = split_words(arguments)
    return [*flags, *(quote_override(renamed(word), is_sweep(arguments)) for word in words)]


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether a command line runs a sweep."""
    return any(word in ("-m", "--multirun") or re.fullmatch(r"hydra\.mode=multirun", word, re.I) for word in arguments)


def parse(word: str) -> Override:
    """The override as parsed by Hydra.

    Raises:
        HydraException: it is not in Hydra's grammar.
    """
    return OverridesParser.create().parse_override(word)


def parses(word: str) -> bool:
    """Whether Hydra can parse an override."""
    try:
        parse(word)
    except HydraException:
        return False
    return True


def quote_override(word: str, sweep: bool = False) -> str:
    """The override with its text quoted where Hydra needs it: non-ASCII letters, '=', '#', brackets, apostrophes.

    Quotes, lists, options by name, calls such as range(1,5), commas of a sweep and ${...} keep their meaning.

    Args:
        sweep: whether a comma separates the values of a sweep.
    """
    if OPEN.fullmatch(word):
        word = f"++{word}"
    key, equals, value = word.partition("=")
    if not equals or not KEY.fullmatch(key):
        return word
    if parses(word):
        number = key.split(".")[-1] in TEXT and isinstance(parse(word)._value, int | float)
        plain = number and not isinstance(parse(word)._value, bool)
        return f"{key}={quoted(value.strip())}" if plain else word
    made = f"{key}={quoted_value(value.strip(), sweep)}"
    return made if parses(made) else word


def quoted_value(value: str, sweep: bool = False) -> str:
    """The value, quoted for Hydra; unchanged where its meaning is not clear."""
    if parses(f"x={value}") or value[:1] in ("'", '"') or CALL.fullmatch(value):
        return value
    if value[:1] in ("[", "{") and all(depth for _, depth in depths(value)):
        return value  # a bracket that is not closed
    inside = split(value[1:-1]) if encloses(value) else []
    if value.startswith("[") and inside:
        return f"[{','.join(quoted_value(part) for part in inside)}]"
    if inside and all(re.match(r"[\w.-]+\s*:", part) for part in inside):
        pairs = [part.partition(":") for part in inside]
        return f"{{{','.join(f'{name.strip()}:{quoted_value(part.strip())}' for name, _, part in pairs)}}}"
    if sweep and len(parts := split(value)) > 1:
        return ",".join(quoted_value(part) for part in parts)
    return quoted(value)


def quoted(value: str) -> str:
    """Text in quotes, for Hydra."""
    mark = "'" if '"' in value else '"'
    escaped = re.sub(rf"(\\*)({mark}|$)", lambda m: m[1] * 2 + (f"\\{mark}" if m[2] else ""), value)
    return f"{mark}{escaped}{mark}"


def encloses(value: str) -> bool:
    """Whether a value's first bracket closes at its end."""
    return value[:1] in ("[", "{") and next((i for i, depth in depths(value) if depth == 0), None) == len(value) - 1


def split(value: str) -> list[str]:
    """The parts between commas outside brackets and quotes."""
    commas = [i for i, depth in depths(value) if depth == 0 and value[i] == ","]
    return [value[i + 1 : j].strip() for i, j in zip([-1, *commas], [*commas, len(value)], strict=True)]


def depths(value: str) -> list[tuple[int, int]]:
    """(index, depth of brackets behind it) for each character outside quotes; a quote opens at the start of a part."""
    depths, stack, quote, start = [], list[str](), "", True
    for i, char in enumerate(value):
        if quote:
            quote = "" if char == quote and value[i - 1] != "\\" else quote
            continue
        if start and char in "'\"":
            quote, start = char, False
            continue
        if char in BRACKETS:
            stack.append(BRACKETS[char])
        elif stack and char == stack[-1]:
            stack.pop()
        start = char in ",[{(:" or (start and char.isspace())
        depths.append((i, len(stack)))
    return depths


def grammar_error(words: Sequence[str], sweep: bool = True) -> str | None:
    """The error of the first override that Hydra cannot parse or reads as a sweep, with the form to write.

    Args:
        sweep: whether the command line runs a sweep.
    """
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            if word in COMMANDS:
                return f"{word} is a command of its own; write python -m opd_lightning.{word} ..."
            return f"{word} is no override; write key=value, and for the shell 'key=a value' where it has spaces."
        try:
            override = parse(word)
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
    """The first text in nested values with a `${` that does not begin an interpolation."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return next((broken for part in inside if (broken := interpolation(part))), None)
    if not isinstance(value, str) or "${" not in value:
        return None
    try:
        OmegaConf.create({"value": value})
    except GrammarParseError:
        return value[value.index("${") :][:20]
    return None


def shell(key: str, value: str) -> str:
    """An override, quoted for the shell."""
    return shlex.quote(f"{key}={value}")
