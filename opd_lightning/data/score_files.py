"""Files of scored samples: a teacher's scores on token ids, in shards of safetensors with an index.

index.json     what is scored: see `Index`
00000.safetensors, ...   samples packed on one axis of tokens, and their scores packed on the axis of trainable tokens
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_lightning.config.schema import leaves
from opd_lightning.types import Example, Sample
from opd_lightning.utils.atomic_files import replace_text

FORMAT = 1
TABLE = "table."
"""The beginning of the names of tensors that are of the vocabulary, and the same in every shard."""
PER_TOKEN = ("token_ids", "loss_mask", "logprobs")
PER_SAMPLE = ("key", "chat", "length", "trainable", "prompt_length", "truncated")

PLAIN = ("kind", "k", "num_generations", "source")
OPAQUE = {
    "tokenizer": "the tokens of the student's tokenizer",
    "vocabulary": "the tokens of the models",
    "absent": "the tokens of the models",
    "template": "the chat templates",
    "data": "the training examples",
    "output_layer": "the weights of the teacher's output layer",
}
"""What an index holds beside settings: to name with its values, and with words."""


@dataclass
class Index:
    """What a folder of scored samples holds.

    Attributes:
        kind: "topk" or "hidden".
        k: most probable tokens per position; 0 for hidden states.
        vocabulary, absent: the ids that the scores cover.
        tokenizer: the fingerprint of the student's tokenizer.
        output_layer: for hidden states, path, dtype and fingerprint of the teacher's output layer.
        settings: the configuration that the samples and scores are made of.
        num_generations: samples per prompt and pass.
        source: "student", "teacher" or "dataset".
        data, template: digests of the training examples, and of the chat templates.
        compared: "tokens", or "outcomes" of a teacher with another tokenizer; "" where an earlier version did not say.
        models: numbers of the models that score and write, by which they are known again; see `teachers.fingerprint`.
        shards: the number of samples and trainable tokens of each.
        complete: whether all shards are there.
    """

    kind: str
    k: int
    vocabulary: int
    absent: list[int]
    tokenizer: str
    output_layer: dict[str, str] | None
    settings: dict[str, Any]
    num_generations: int
    source: str
    data: str = ""
    template: str = ""
    compared: str = ""
    models: dict[str, Any] = field(default_factory=dict)
    shards: list[dict[str, int]] = field(default_factory=list)
    complete: bool = False
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path, name: str) -> "Index":
        """The index of a folder.

        Raises:
            ValueError: there is none, or it is of another format.
        """
        try:
            index = json.loads((folder / "index.json").read_text())
            read = cls(**{f.name: index[f.name] for f in fields(cls) if f.name in index})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{name}={folder} holds no scores (index.json); make them with python -m opd_lightning.score."
            ) from error
        if read.format != FORMAT:
            raise ValueError(f"{name}={folder} is of format {read.format}, and this version reads {FORMAT}; score it again.")
        return read

    def write(self, folder: Path) -> None:
        """Write the index."""
        replace_text(folder / "index.json", json.dumps(asdict(self), indent=1) + "\n")

    def difference(self, now: "Index") -> str | None:
        """What decides the scores and is another in the index of now, as text; None where nothing is."""
        if not self.data or not self.compared:
            return "an earlier version of this package began it"
        for name, text in OPAQUE.items():
            if getattr(self, name) != getattr(now, name):
                return f"{text} differ from those it was begun with"
        ours, theirs = (dict(leaves({name: getattr(i, name) for name in PLAIN} | i.settings)) for i in (self, now))
        changed = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"{changed[0]}={theirs.get(changed[0])}, and {ours.get(changed[0])} when it was begun{more}" if changed else None


def fingerprint_of_vocabulary(vocabulary: Mapping[str, int]) -> str:
    """A hash of a tokenizer's ids by token."""
    return hashlib.blake2b(json.dumps(sorted(vocabulary.items())).encode(), digest_size=8).hexdigest()


def fingerprint_of_weights(*tensors: Tensor | None) -> str:
    """A hash of tensors, from their values."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def key_of(token_ids: Tensor, prompt_length: int) -> int:
    """The key under which a sample's scores are found: a 63-bit hash of its tokens and the length of its prompt."""
    return hash_of(token_ids.to(torch.int64).cpu().numpy().tobytes() + prompt_length.to_bytes(8, "little"))


def chat_of(example: Example) -> int:
    """A 63-bit hash of an example's prompt as the task gives it."""
    return hash_of(json.dumps([example.messages, example.tools], default=str).encode())


def hash_of(data: bytes) -> int:
    """A 63-bit hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"{number:05d}.safetensors"


def pack_samples(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The tensors of samples: those per sample [n], and those per token, packed."""
    logprobs = [s.logprobs for s in samples if s.logprobs is not None]
    tensors = {
        "key": torch.tensor([key_of(s.token_ids, s.prompt_length) for s in samples]),
        "chat": torch.tensor([chat_of(s.example) for s in samples]),
        "length": torch.tensor([len(s.token_ids) for s in samples], dtype=torch.int32),
        "trainable": torch.tensor([s.trainable for s in samples], dtype=torch.int32),
        "prompt_length": torch.tensor([s.prompt_length for s in samples], dtype=torch.int32),
        "truncated": torch.tensor([s.finish_reason == "length" for s in samples]),
        "token_ids": torch.cat([s.token_ids for s in samples]).to(torch.int32),
        "loss_mask": torch.cat([s.loss_mask for s in samples]),
    }
    return tensors | ({"logprobs": torch.cat(logprobs).float()} if len(logprobs) == len(samples) else {})


def save_shard(path: Path, tensors: Mapping[str, Tensor], example_ids: Sequence[str]) -> None:
    """Write a shard; it is whole or not there."""
    beside = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"examples": json.dumps(list(example_ids))})
    beside.replace(path)


@dataclass(frozen=True)
class Place:
    """Where a sample stands: its key, its shard, its row there, and the slices of its tokens and of its trainable tokens."""

    key: int
    shard: int
    row: int
    tokens: slice
    trainable: slice


class ScoreFiles:
    """Reads a folder of scored samples, shard by shard as needed.

    Args:
        folder, name: the folder, and the configuration's field, for errors.

    Raises:
        ValueError: it is no such folder, or not complete.
    """

    def __init__(self, folder: str | Path, name: str = "teacher.path"):
        self.folder, self.name = Path(folder), name
        self.index = Index.read(self.folder, name)
        if not self.index.complete:
            raise ValueError(f"{name}={folder} is not complete; the same python -m opd_lightning.score goes on with it.")
        self.by_key: dict[int, list[Place]] = {}
        self.by_example: dict[str, list[Place]] = {}
        self.open = lru_cache(maxsize=16)(self._open)
        for number in range(len(self.index.shards)):
            self._read_places(number)
        self.by_group: dict[tuple[str, tuple[int, ...]], list[Place]] = {}
        for example, places in self.by_example.items():
            for i in range(0, len(places), n := self.index.num_generations):
                self.by_group[example, tuple(place.key for place in places[i : i + n])] = places[i : i + n]

    def _open(self, number: int) -> Any:
        try:
            return safe_open(str(shard_path(self.folder, number)), framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.name}={self.folder} has no shard {number}, or not all of it; score it again.") from error

    def _read_places(self, number: int) -> None:
        shard = self.open(number)
        keys, lengths, counts = (shard.get_tensor(name).tolist() for name in ("key", "length", "trainable"))
        token = trainable = 0
        for row, example in enumerate(json.loads(shard.metadata()["examples"])):
            place = Place(keys[row], number, row, slice(token, token + lengths[row]), slice(trainable, trainable + counts[row]))
            token, trainable = token + lengths[row], trainable + counts[row]
            self.by_key.setdefault(place.key, []).append(place)
            self.by_example.setdefault(example, []).append(place)

    def tables(self) -> dict[str, Tensor]:
        """The tensors that are of the vocabulary, by name; none where each of the student's tokens is an outcome."""
        if not self.index.shards:
            return {}
        shard = self.open(0)
        return {name.removeprefix(TABLE): shard.get_tensor(name) for name in shard.keys() if name.startswith(TABLE)}  # noqa: SIM118

    def has(self, name: str) -> bool:
        """Whether any shard has this tensor."""
        return any(name in self.open(number).keys() for number in range(len(self.index.shards)))  # noqa: SIM118

    def rows(self, name: str, place: Place) -> Tensor | None:
        """A sample's part of a tensor; None if the shard has no such tensor."""
        shard = self.open(place.shard)
        if name not in shard.keys():  # noqa: SIM118
            return None
        if name in PER_SAMPLE:
            return shard.get_slice(name)[place.row : place.row + 1][0]
        return shard.get_slice(name)[place.tokens if name in PER_TOKEN else place.trainable]

    def find(self, samples: Sequence[Sample]) -> list[Place | None]:
        """Where the scores of each sample are; None where there are none.

        The samples of a prompt are looked up together: the teacher may have read one behind the others (siblings), and
        equal groups were read alike.

        Raises:
            ValueError: the scores of a sample are several, and no group says which.
        """
        places: list[Place | None] = []
        for _, part in groupby(samples, key=lambda sample: (sample.example.id, sample.group)):
            group = list(part)
            keys = tuple(key_of(sample.token_ids, sample.prompt_length) for sample in group)
            whole = self.by_group.get((group[0].example.id, keys))
            places += whole or [self.find_one(sample, key) for sample, key in zip(group, keys, strict=True)]
        return places

    def find_one(self, sample: Sample, key: int) -> Place | None:
        """Where the scores of a sample are, by itself: those of its own example first, then of any with these tokens."""
        name = sample.example.id
        own = [place for place in self.by_example.get(name, []) if place.key == key] or self.by_key.get(key, [])
        if any(not self.alike(own[0], place) for place in own[1:]):
            raise ValueError(
                f"{self.name}={self.folder} has several scores of a completion of example {name}, which the teacher read "
                f"behind different contexts; take rollout=recorded rollout.path={self.folder}, which tells them apart."
            )
        return own[0] if own else None

    def alike(self, a: Place, b: Place) -> bool:
        """Whether two places have the same scores, up to rounding."""
        return torch.allclose(self.numbers(a), self.numbers(b), 0.02, 0.02)

    def first_numbers(self) -> Tensor:
        """The scores of the first sample, by which the folder is known again."""
        return self.numbers(next(iter(self.by_example.values()))[0]).flatten()[:256]

    def numbers(self, place: Place) -> Tensor:
        """The scores of a sample: of what it wrote, the hidden states, or of what is most probable."""
        found = next(part for name in ("sampled", "hidden", "top_logprobs") if (part := self.rows(name, place)) is not None)
        return found.float().clamp_min(-1e4)

    def why_other(self, example: Example, prompt: Sequence[int]) -> str:
        """Why there is nothing here for an example, of which the student now reads this prompt."""
        if not (places := self.by_example.get(example.id)):
            return f"example {example.id} is not in it; it was made from other data (task, split, seed)"
        chat, length, ids = (self.rows(name, places[0]) for name in ("chat", "prompt_length", "token_ids"))
        assert length is not None and ids is not None
        if chat is not None and int(chat) != chat_of(example):
            return f"the data have changed: the task has another prompt for example {example.id} than the recorded one"
        if ids[: int(length)].tolist() != list(prompt):
            return (
                f"the chat template, its options or the date in it now render another prompt for example {example.id} "
                "(model.chat_template)"
            )
        return (
            f"the completion of example {example.id} is another than the recorded one (another reference, or another rollout)"
        )
