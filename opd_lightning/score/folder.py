"""The folder of scores: whether it can be written, and whether what was begun there can go on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from opd_lightning.data.score_files import Index
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.data import digest
from opd_lightning.teachers.fingerprint import Fingerprint, another_model

LEFT = (".tmp", ".safetensors")
"""Files that an interruption before the first index leaves."""


def check_writable(folder: Path) -> None:
    """Make the folder; raises ValueError if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"out={folder} cannot be written ({error}); choose another folder.") from error


def begun(folder: Path) -> Index | None:
    """The index of scores that were begun in a folder, which this process has locked; None in an empty one.

    Raises:
        ValueError: the folder holds something else.
    """
    if (folder / "index.json").is_file():
        return Index.read(folder, "out")
    if others := sorted(path.name for path in folder.iterdir() if path.name != ".lock" and path.suffix not in LEFT):
        raise ValueError(f"out={folder} is not empty (it has {others[0]}); choose another folder.")
    return None


def resumed(index: Index, before: Index | None, models: Mapping[str, Fingerprint], folder: Path) -> Index:
    """The index with the shards of what was begun; the given one where nothing was.

    Args:
        models: the fingerprints of the models that score and write, by role.

    Raises:
        ValueError: what decides the scores is another than before.
    """
    if before is None:
        return replace(index, models={role: fingerprint.numbers.tolist() for role, fingerprint in models.items()})
    if sentence := before.difference(index) or another_model(before.models, models):
        raise ValueError(
            f"out={folder} holds scores of other settings: {sentence}. Bring that back to go on with it, choose another out, "
            "or remove the folder."
        )
    return replace(index, models=before.models, shards=before.shards, complete=before.complete)


def digest_of_data(parts: Components) -> str:
    """A digest of the training examples, with what a teacher is chosen by."""
    content: list[Any] = [digest(parts.examples), [[example.id, example.skill] for example in parts.examples]]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def digest_of_templates(parts: Components) -> str:
    """A digest of the chat templates of student and teachers."""
    templates = {name: reader.renderer.template.tokenizer.chat_template for name, reader in parts.readers().items()}
    return hashlib.blake2b(json.dumps(templates, sort_keys=True).encode(), digest_size=8).hexdigest()
