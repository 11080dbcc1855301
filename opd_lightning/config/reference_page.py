"""Pages of the reference of keys: in the terminal, and docs/keys.md (python -m opd_lightning.config.reference_page FILE)."""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from opd_lightning.config.names import nearest
from opd_lightning.config.reference import options


def markdown() -> str:
    """The page of all keys."""
    lines = [
        "# Keys",
        "",
        "Every key with its default, type and meaning; written by",
        "`python -m opd_lightning.config.reference_page docs/keys.md`. In a terminal: `python -m opd_lightning --help keys`,",
        "`--help optim`, `--help optim.lr`. [Configuration](configuration.md) says how to set them. A default in `${...}`",
        "follows another key; `???` has to be given.",
    ]
    found = options()
    for group in dict.fromkeys(option.group for option in found):
        members = [option for option in found if option.group == group]
        lines += ["", f"## {group or 'Every run'}", ""]
        lines += [f"- `{option.title}`: {option.meaning}" for option in members if group]
        rows = [(option, key) for option in members for key in option.keys]
        if rows:
            lines += [""] if group else []
            lines += ["| option | key | default | type | meaning |", "|---|---|---|---|---|"]
        for option, key in rows:
            meaning = key.meaning.replace("<", "\\<")
            cells = (f"`{option.name}`" if group else "", f"`{key.place}`", f"`{key.default}`", key.type, meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def terminal(topic: str, folders: Sequence[Path], width: int) -> str:
    """The keys of a topic as text: "keys" for all, a group, an option of one, or a key or its end.

    Raises:
        ValueError: there is no such topic.
    """
    found = options(folders)
    chosen = [o for o in found if topic == "keys" or topic in (o.group, o.title)]
    if not chosen:
        parts = [(o, [k for k in o.keys if is_of(k.place, topic)]) for o in found]
        chosen = [option._replace(keys=keys) for option, keys in parts if keys]
    if not chosen:
        places = {k.place for o in found for k in o.keys}
        deeper = {**{place.rpartition(".")[2]: place for place in places}, **{place: place for place in places}}
        raise ValueError(
            f"--help {topic}: no group or key is called so{nearest(topic, {o.group for o in found if o.group}, deeper)}"
        )
    lines = []
    for option in chosen:
        lines += ["", *wrapped(f"{option.title or 'every run'}: {option.meaning}", width, "")]
        for key in option.keys:
            kind = f"  ({key.type})" if key.type else ""
            lines += wrapped(f"{key.place} = {key.default}{kind}", width, "  ") + wrapped(key.meaning, width, "      ")
    return "\n".join(lines[1:])


def is_of(place: str, topic: str) -> bool:
    """Whether a key is the topic, inside it, or ends in it."""
    return f".{place}.".startswith(f".{topic}.") or f".{place}".endswith(f".{topic}")


def wrapped(text: str, width: int, indent: str) -> list[str]:
    """A text in lines."""
    options = {"initial_indent": indent, "subsequent_indent": f"{indent}    ", "break_on_hyphens": False}
    return textwrap.wrap(text, width, **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown())
