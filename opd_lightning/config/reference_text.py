"""The reference of keys in the terminal: --help keys, --help <group> and --help <key>."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from opd_lightning.config.names import nearest
from opd_lightning.config.reference import options


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
