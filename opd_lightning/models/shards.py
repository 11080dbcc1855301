"""Sharded checkpoints: a file and, in a folder beside it, its sharded tensors in the format of torch.distributed.checkpoint."""

import json
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

KEY = "shards"
"""The entry of a checkpoint that names its folder, and the size and checksum of each file in it."""

BLOCK = 1 << 22


def folder_of(directory: Path, step: int) -> Path:
    """The folder of the shards of a checkpoint in `directory` after so many updates."""
    return directory / f"{KEY}-{step}"


def remove_others(directory: Path, steps: Iterable[int]) -> None:
    """Remove the shards of all checkpoints in a folder but those after these numbers of updates."""
    kept = {folder_of(directory, step) for step in steps}
    for folder in directory.glob(f"{KEY}-*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def write(checkpoint: dict[str, Any], folder: Path) -> None:
    """Move a checkpoint's sharded tensors into a new folder, each device its own; every device calls it."""
    tensors = dict(_take(checkpoint))
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
    dist.barrier()
    with _plain_errors():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {path.name: _digest(path) for path in own})
    checkpoint[KEY] = {"folder": folder.name, "files": {name: digest for files in found for name, digest in files.items()}}


def damage(checkpoint: Mapping[str, Any], directory: Path) -> str | None:
    """The damage of a checkpoint's shards, as text; None if all are what was written, or there are none."""
    about = checkpoint.get(KEY, {"folder": "", "files": {}})
    for name, digest in about["files"].items():
        path = directory / about["folder"] / name
        if not path.is_file():
            return f"{path} is missing"
        if _digest(path) != list(digest):
            return f"{path} is not what was written"
    return None


def whole(checkpoint: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The checkpoint with its sharded tensors, full and on the host."""
    if KEY in checkpoint:
        read(checkpoint, directory, lambda *_: None)
    return checkpoint


def weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, full and on the host."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint |= {"optimizer_states": [], "teachers": {}}
    return whole(checkpoint, path.parent)["state_dict"]


def read(checkpoint: dict[str, Any], directory: Path, like: Callable[[Any, Any], Tensor | None]) -> None:
    """Read the shards into a checkpoint; each device reads for itself what it holds.

    Args:
        like: of "state_dict" and a weight's name, of an optimizer's number and a parameter's, or of "teachers" and a path in
            their states, a tensor that says where its values belong; None reads them in full. States of optimizers and teachers
            that the checkpoint does not list are left out.
    """
    reader = _Reader(directory / checkpoint[KEY]["folder"])
    entries = reader.tensors()
    places = {key: _place(key) for key in entries}
    tensors = {}
    with _plain_errors():
        for key, entry in entries.items():
            if not listed(checkpoint, *places[key][:2]):
                continue
            target, dtype = like(*places[key][:2]), entry.properties.dtype
            fitting = target if target is not None and target.shape == entry.size else None
            tensors[key] = torch.empty(entry.size, dtype=dtype) if fitting is None else torch.empty_like(fitting, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # each device reads for itself, as wanted
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    for key, tensor in tensors.items():
        kind, place, name = places[key]
        if kind == "state_dict":
            checkpoint[kind][place] = tensor
        elif kind == "teachers":
            reduce(lambda state, part: state[part], place[:-1], checkpoint[kind])[place[-1]] = tensor
        else:
            checkpoint["optimizer_states"][kind]["state"].setdefault(place, {})[name] = tensor
    del checkpoint[KEY]


def listed(checkpoint: Mapping[str, Any], kind: Any, place: Any) -> bool:
    """Whether a checkpoint has a place for a tensor."""
    if kind == "teachers":
        return place[0] in checkpoint[kind]
    return kind == "state_dict" or kind < len(checkpoint["optimizer_states"])


def _place(key: str) -> tuple[Any, Any, str]:
    """The place of a tensor: "state_dict" and its name, or an optimizer's number, a parameter's, and a name.

    Of a teacher it is "teachers" and the path in their states.
    """
    if key.startswith("teachers/"):
        return "teachers", tuple(json.loads(key.removeprefix("teachers/"))), ""
    kind, *place = key.split("/")
    return (kind, place[0], "") if kind == "state_dict" else (int(place[0]), int(place[1]), place[2])


def shapes(checkpoint: Mapping[str, Any], directory: Path) -> dict[str, torch.Size]:
    """The full shapes of a checkpoint's weights by name, those in shards included."""
    found = {name: value.shape for name, value in checkpoint.get("state_dict", {}).items()}
    if KEY in checkpoint:
        entries = _Reader(directory / checkpoint[KEY]["folder"]).tensors()
        found |= {key.removeprefix("state_dict/"): e.size for key, e in entries.items() if key.startswith("state_dict/")}
    return found


def check_shapes(saved: Mapping[str, torch.Size], own: Mapping[str, torch.Size]) -> None:
    """Check that weights fit a model.

    Raises:
        ValueError: they are of another one.
    """
    for name, shape in saved.items():
        if own.get(name) != shape:
            raise ValueError(
                f"checkpoints/last.ckpt is of another model: its {name} is {tuple(shape)}; remove it, or choose another "
                "study.name."
            )


def _take(checkpoint: dict[str, Any]) -> Iterator[tuple[str, DTensor]]:
    """The sharded tensors of weights, optimizers and teachers by key, taken out of the checkpoint."""
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: value for name, value in weights.items() if not isinstance(value, DTensor)}
    yield from ((f"state_dict/{name}", value) for name, value in weights.items() if isinstance(value, DTensor))
    for number, optimizer in enumerate(checkpoint["optimizer_states"]):
        kept: dict[int, dict[str, Any]] = {}
        for parameter, state in optimizer["state"].items():
            kept[parameter] = {name: value for name, value in state.items() if not isinstance(value, DTensor)}
            for name in state.keys() - kept[parameter].keys():
                yield f"optimizer_states/{number}/{parameter}/{name}", state[name]
        checkpoint["optimizer_states"][number] = {**optimizer, "state": kept}
    teachers = checkpoint.get("teachers", {})
    yield from ((f"teachers/{json.dumps(path)}", value) for path, value in sharded(teachers))
    checkpoint["teachers"] = _without(teachers)


def sharded(state: Mapping[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], DTensor]]:
    """The sharded tensors in a nested state, by path."""
    for name, value in state.items():
        if isinstance(value, DTensor):
            yield (*path, name), value
        elif isinstance(value, Mapping):
            yield from sharded(value, *path, name)


def _without(state: Any) -> Any:
    """A nested state without its sharded tensors."""
    if not isinstance(state, Mapping):
        return state
    return {name: _without(value) for name, value in state.items() if not isinstance(value, DTensor)}


def _digest(path: Path) -> list[int]:
    """The size of a file, and its checksum."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A context in which the first device's error is raised instead of torch's collection, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


class _Unpickler(pickle.Unpickler):
    """Reads descriptions of shards, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        described = module == "torch.distributed.checkpoint.metadata" and name[0].isupper()
        typed = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        others = {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
        others |= {("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")}
        path = module.partition(".")[0] == "pathlib" and name.endswith("Path")
        if described or typed or path or (module, name) in others:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a description of shards")


class _Reader(dcp.FileSystemReader):
    """Reads shards; torch's own would run whatever code their description holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The tensors that are there, by key."""
        found = self.read_metadata().state_dict_metadata
        return {key: entry for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
