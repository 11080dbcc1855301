"""Files of a model folder: checks that they are complete, and names and shapes of its weights without loading them."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

POINTER = b"version https://git-lfs"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""

TEXTS: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
TEXTS += ("added_tokens.json", "vocab.json", "adapter_config.json", "chat_template.json", "chat_template.jinja")
TEXTS += ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
"""Text files beside the weights."""


class FolderError(ValueError):
    """A model folder is incomplete or damaged; the message names the field."""


def check_texts(folder: str | Path, name: str) -> None:
    """Check that configuration and tokenizer files are complete.

    Args:
        name: the field and its value, for the error.

    Raises:
        FolderError: one is empty, cut, or the pointer that Git LFS leaves where it has not fetched a file.
    """
    for path in (Path(folder) / file for file in TEXTS):
        if path.is_file():
            check_whole(path, name)
            if path.suffix == ".json":
                check_json(path, name)


def check_whole(path: Path, name: str) -> None:
    """Raises FolderError if the file is empty or a pointer of Git LFS."""
    with path.open("rb") as file:
        head = file.read(len(POINTER))
    if head == POINTER:
        raise FolderError(
            f"{name}: {path.name} is a pointer of Git LFS and not the file itself; run `git lfs pull` in that folder, or "
            "download it again."
        )
    if not head:
        raise FolderError(f"{name}: {path.name} is empty; download it again.")


def check_json(path: Path, name: str) -> None:
    """Raises FolderError unless the file holds JSON; of large files only both ends are checked."""
    if path.stat().st_size < 2**16:
        read_json(path, name)
        return
    with path.open("rb") as file:
        head = file.read(64).lstrip()
        file.seek(-64, 2)
        tail = file.read().rstrip()
    if head[:1] not in (b"{", b"[") or tail[-1:] not in (b"}", b"]"):
        raise FolderError(f"{name}: {path.name} is cut off or no JSON; download it again.")


def read_json(path: Path, name: str) -> Any:
    """The JSON object in a file; raises FolderError where there is none."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise FolderError(f"{name}: {path.name} is cut off or no JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise FolderError(f"{name}: {path.name} holds no JSON object; download it again.")
    return value


TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has a tokenizer's files; False for a repository of the hub."""
    return any(next(Path(folder).glob(pattern), None) for pattern in TOKENIZERS)


def check_tokenizer(folder: str | Path, name: str) -> None:
    """Raises FolderError if a folder has no tokenizer: transformers would take an empty one of the architecture's kind."""
    if not has_tokenizer(folder):
        raise FolderError(f"{name} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json ...); download it again.")


def weight_files(folder: str | Path, name: str) -> list[Path]:
    """The files that transformers would read the weights from; empty for formats other than those of `WEIGHTS`.

    Raises:
        FolderError: there are no weights, a part is missing, or a file is empty, cut or a pointer.
    """
    folder = Path(folder)
    first = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if first is None:
        config = read_json(folder / "config.json", name) if (folder / "config.json").is_file() else {}
        if "transformers_weights" in config or next(folder.rglob("*.distcp"), None):
            return []
        raise FolderError(f"{name} has no weights (model.safetensors or pytorch_model.bin); {no_weights(folder)}")
    check_whole(first, name)
    if first.suffix != ".json":
        return [first]
    index = read_json(first, name)
    parts = sorted(set(index.get("weight_map", {}).values())) if isinstance(index, dict) else []
    if not parts:
        raise FolderError(f"{name}: {first.name} lists no files (weight_map); download it again.")
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise FolderError(
            f"{name}: {len(missing)} of the {len(parts)} files that {first.name} lists are missing, {missing[0]} first; "
            "download the rest."
        )
    for part in parts:
        check_whole(folder / part, name)
    return [folder / part for part in parts]


def no_weights(folder: Path) -> str:
    """The remedy for a folder without weights."""
    subfolders = sorted(path.parent.name for file in WEIGHTS for path in folder.glob(f"*/{file}"))
    if subfolders:
        return f"give the folder inside it that has them, such as {folder.name}/{subfolders[-1]}."
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".gguf", ".pth", ".safetensors", ".bin", ".pt"))
    if files:
        return f"it has {files[0]}; convert that with the tool it comes from, or rename it if it has the weights."
    return "download the rest, or give another folder."


def headers(files: list[Path], name: str) -> dict[str, torch.Size]:
    """The names and shapes of all weights; their values are not read.

    Raises:
        FolderError: a file is cut or of another kind.
    """
    shapes: dict[str, torch.Size] = {}
    for path in files:
        shapes |= safetensors_header(path, name) if path.suffix == ".safetensors" else pickle_header(path, name)
    return shapes


NARROW = ("I8", "U8", "I16", "I32", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0")
"""Types of quantised weights in safetensors."""


def check_floats(files: list[Path], name: str) -> None:
    """Check that matrices are stored as floats of 16 bits or more, for a model whose configuration names no quantisation.

    Raises:
        FolderError: one is not; its integers would be taken for its values.
    """
    for path in (file for file in files if file.suffix == ".safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                if key.endswith(".weight") and len(part.get_shape()) > 1 and (kind := part.get_dtype()) in NARROW:
                    raise FolderError(
                        f"{name}: {key} is stored as {kind}, quantised, and config.json has no quantization_config to "
                        "read it by; give the weights in float32 or bfloat16."
                    )


def safetensors_header(path: Path, name: str) -> dict[str, torch.Size]:
    """The names and shapes in a safetensors file; raises FolderError if its length does not fit its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = file.read(length) if 0 < length <= 2**27 else b""
    try:
        if length > size - 8 and text[:1] == b"{":
            raise FolderError(f"{name}: {path.name} is cut off inside its header; download it again.")
        entries = {key: entry for key, entry in json.loads(text).items() if key != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {key: torch.Size(entry["shape"]) for key, entry in entries.items()}
    except FolderError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FolderError(f"{name}: {path.name} is no safetensors file (its header is damaged); download it again.") from error
    if size < end:
        raise FolderError(f"{name}: {path.name} is cut off, {size:,} bytes of {end:,}; download it again.")
    return shapes


def pickle_header(path: Path, name: str) -> dict[str, torch.Size]:
    """The names and shapes in a file of torch.save."""
    try:
        try:
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damaged files raise many kinds of errors
        reason = " ".join(str(error).split())[:120]
        raise FolderError(
            f"{name}: {path.name} is damaged, or holds more than tensors ({type(error).__name__}: {reason}); download it "
            "again, or save the model anew as safetensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        contents = sorted(map(str, state))[:3] if isinstance(state, dict) else [type(state).__name__]
        raise FolderError(
            f"{name}: {path.name} is no state dict of tensors (it holds {', '.join(contents)}); save the model's own weights "
            "with save_pretrained."
        )
    return {key: value.shape for key, value in state.items()}


def differ(files: list[Path], first: str, second: str, rows: int = 4096) -> bool:
    """Whether two weights of these files have different values; of safetensors a few rows are read at a time."""
    one, two = weight(files, first), weight(files, second)
    n = len(one) if isinstance(one, torch.Tensor) else one.get_shape()[0]
    return any(not torch.equal(one[at : at + rows], two[at : at + rows]) for at in range(0, n, rows))


def weight(files: list[Path], key: str) -> Any:
    """One weight of these files, which `headers` has read: a tensor, or a view of safetensors that reads what is sliced."""
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                if key in file.keys():  # noqa: SIM118, for it is no dict
                    return file.get_slice(key)
        elif key in (state := torch.load(path, map_location="cpu", weights_only=True)):
            return state[key]
    raise KeyError(key)


def check_vocabulary(vocabulary: dict[str, int], rows: int, name: str) -> None:
    """Check that every token of a tokenizer has a row in its model's embedding.

    Raises:
        FolderError: one has none.
    """
    outside = [word for word, i in vocabulary.items() if i >= rows]
    if outside:
        raise FolderError(
            f"{name}: its tokenizer has {len(vocabulary)} tokens and the model has {rows}, {outside[0]!r} has no row; "
            "give the tokenizer of the model's own version, or a model for all of its tokens."
        )
