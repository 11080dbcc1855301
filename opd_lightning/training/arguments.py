"""Arguments of `Distillation`: objects in memory, and the configuration that names them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_lightning.config import plain
from opd_lightning.config.grammar import quoted
from opd_lightning.config.overrides import configured
from opd_lightning.models.in_memory import LanguageModel, tokenizer_of
from opd_lightning.tasks.columns import PARTS, UNNAMED, all_columns
from opd_lightning.tasks.in_memory import FunctionVerifier, rows_of
from opd_lightning.tasks.rows import Row
from opd_lightning.utils.in_memory import Held, held

LEFT_TO_THE_TRAINER = ("callbacks.progress=null", "callbacks.samples=null", "callbacks.checkpoint=null", "logger=none")
"""Callbacks that print or write files, and the logger."""


class Models:
    """Student and teacher: models in memory, or paths.

    Args: as for `Distillation`.

    Attributes:
        student, teacher: the paths that the configuration names them by; None for no teacher and for a `Teacher`.
        dtype: the dtype's name of a student in memory; None for a path.
        own_teacher: the `Teacher`, or None.
        holders: of models in memory.
    """

    def __init__(self, student: Any, tokenizer: Any = None, teacher: Any = None, teacher_tokenizer: Any = None):
        self.holders: list[Held] = []
        if student is None:
            raise ValueError("student is missing; give a causal language model of transformers, or a path.")
        if teacher_tokenizer is not None and (teacher is None or hasattr(teacher, "score")):
            raise ValueError("teacher_tokenizer goes with a teacher that is a model of transformers; leave it out.")
        self.student = self.path_of("student", student, tokenizer, frozen=False)
        self.dtype = str(self.holders[0].value.model.dtype).removeprefix("torch.") if self.holders else None
        self.own_teacher = teacher if hasattr(teacher, "score") else None
        self.teacher: str | None = None
        if teacher is student and teacher_tokenizer is None:
            self.teacher = self.student
        elif teacher is not None and self.own_teacher is None:
            self.teacher = self.path_of("teacher", teacher, teacher_tokenizer, frozen=True)

    def path_of(self, argument: str, model: Any, tokenizer: Any, frozen: bool) -> str:
        """The path of a model; one in memory is held."""
        if not isinstance(model, str | Path):
            option = "tokenizer" if argument == "student" else f"{argument}_tokenizer"
            self.holders.append(Held(LanguageModel(model, tokenizer_of(tokenizer, option), frozen, argument), argument))
            return self.holders[-1].path
        if tokenizer is not None:
            raise ValueError(f"{argument}={model} is a path with a tokenizer of its own; give no other beside it.")
        return str(model)

    def words(self) -> list[str]:
        """The overrides that name the models."""
        words = [f"model.path={quoted(self.student)}"]
        words.append(f"model.teacher={quoted(self.teacher)}" if self.teacher else "model.teacher=null")
        if self.dtype is not None:
            words.append(f"model.dtype={self.dtype}")
            # The Trainer's own precision is checked before training; this lets 16-bit weights pass until then.
            words += [] if self.dtype in ("float32", "float64") else ["trainer.precision=bf16-true"]
        return words


class Arguments:
    """The arguments of `Distillation`, which describes them; they live as long as this object."""

    def __init__(self, models: Models, data: Any, heldout: Any = None, verify: Any = None, adapter: Any = None):
        self.models, self.adapter, self.holders = models, adapter, list(models.holders)
        self.task = data if hasattr(data, "examples") and hasattr(data, "verify") else None
        self.data, self.heldout = None if self.task else data, heldout
        self.verifier = None if verify is None else FunctionVerifier(verify)
        for argument, value in (("heldout", heldout), ("verify", verify)):
            if value is not None and self.data is None:
                raise ValueError(f"{argument} goes with rows, and data has none; give data=<rows>, or leave {argument} out.")

    def configuration(self, method: str, overrides: Iterable[str] | Mapping[str, Any]) -> DictConfig:
        """The configuration of a method with these arguments.

        Raises:
            ValueError: an override is wrong, or an argument is missing or read by nothing.
        """
        own = words_of(overrides)
        self.check_overrides({word.partition("=")[0].lstrip("+~") for word in own})
        cfg = configured([f"method={method}", *LEFT_TO_THE_TRAINER, *self.models.words(), *self.data_words(own), *own])
        if self.verifier is not None:
            if "verifier" not in cfg.task:
                raise ValueError(f"verify judges rows, and {cfg.task._target_} has a verifier of its own; leave verify out.")
            cfg.task.verifier = self.node(self.verifier, "verify")
        if self.task is not None:
            cfg.task = self.node(self.task, "task") | {
                "batch_size": getattr(self.task, "batch_size", 8),
                "max_new_tokens": self.task.max_new_tokens,
                "contexts": dict(getattr(self.task, "contexts", {})),
            }
        if self.models.teacher is not None and cfg.teacher is not None:
            cfg.teacher = replaced(OmegaConf.to_container(cfg.teacher), "${model.teacher}", self.models.teacher)
        if self.models.own_teacher is not None:
            cfg.teacher = self.node(self.models.own_teacher, "teacher")
        if self.adapter is not None:
            cfg.adapter = adapter_node(self.adapter)
        self.check_teacher(cfg, method)
        return cfg

    def check_overrides(self, chosen: set[str]) -> None:
        """Raises ValueError if an override of these keys says again, or otherwise, what an argument says."""
        models, rows = self.models, self.data is not None
        taken = {
            "method": ("method",),
            "student": ("model.path",),
            "teacher": ("teacher", "model.teacher") if models.own_teacher else ("model.teacher", "teacher.path"),
            "data": ("task",) if self.task is not None else ("task.path",) if rows else (),
            "heldout": () if self.heldout is None else ("task.heldout",),
            "verify": () if self.verifier is None else ("task/verifier", "task.verifier"),
            "adapter": () if self.adapter is None else ("adapter",),
        }
        if not models.own_teacher and not models.teacher:
            del taken["teacher"]
        for argument, keys in taken.items():
            for key in sorted(chosen):
                if any(key == k or key.startswith((f"{k}.", f"{k}/")) for k in keys):
                    raise ValueError(
                        f"overrides set {key}, and {argument} is given, which sets it already; give one of the two."
                    )

    def data_words(self, own: list[str]) -> list[str]:
        """The overrides that name the rows; the user's `own` may choose another task of rows than `table`."""
        chosen = {word.partition("=")[0].lstrip("+") for word in own}
        if self.data is None:
            if self.task is None and "task" not in chosen:
                raise ValueError("data is missing; give prompts or rows, or choose a task (overrides=['task=gsm8k']).")
            return []
        words = [] if "task" in chosen else ["task=table"]
        path, rows = self.rows_at("data", self.data)
        words.append(f"task.path={quoted(path)}")
        if self.heldout is not None:
            words.append(f"task.heldout={{path: {quoted(self.rows_at('heldout', self.heldout)[0])}}}")
        if "task" not in chosen:
            found = () if any(key.startswith("task.columns") for key in chosen) else ("prompt", *UNNAMED)
            more = [part for part in PARTS if part not in found]
            words += [f"task.columns.{part}={part}" for part in more if any(part in row for row in rows)]
        if self.verifier is None and not chosen & {"task", "task/verifier", "evaluation"}:
            words.append("evaluation=text")
            words += [] if any(map(has_reply, rows)) else ["evaluation.suite.likelihood=null"]
        return words

    def rows_at(self, argument: str, data: Any) -> tuple[str, list[Row]]:
        """The path of rows, and the rows where they are in memory."""
        if isinstance(data, str | Path):
            return str(data), []
        self.holders.append(Held(rows_of(data, argument), argument))
        return self.holders[-1].path, self.holders[-1].value

    def node(self, value: Any, label: str) -> dict[str, Any]:
        """The configuration node of an object in memory."""
        self.holders.append(Held(value, label))
        return {"_target_": f"{held.__module__}.{held.__name__}", "path": self.holders[-1].path}

    def check_teacher(self, cfg: DictConfig, method: str) -> None:
        """Raises ValueError if the method reads a teacher that is not given, or does not read the given one."""
        tree = plain(cfg)
        readers = {key: tree[key] for key in ("teacher", "reference")}
        given = self.models.teacher
        if given and json.dumps(given) not in json.dumps(readers):
            raise ValueError(
                f"teacher is given, and method={method} does not read it: its teacher is "
                f"{'none' if readers['teacher'] is None else readers['teacher']['_target_']}; leave it out, or choose "
                "overrides=['teacher=external']."
            )
        if given is None and any(key == "path" and value is None for key, value in pairs(readers["teacher"])):
            raise ValueError(f"teacher is missing: method={method} reads another model; give teacher=<model or path>.")


def words_of(overrides: Iterable[str] | Mapping[str, Any]) -> list[str]:
    """Overrides as words of a command line."""
    if isinstance(overrides, str):
        raise ValueError(f"overrides={overrides!r} is one text; give a list, [{overrides!r}], or a mapping.")
    if not isinstance(overrides, Mapping):
        return [str(word) for word in overrides]
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def has_reply(row: Row) -> bool:
    """Whether a row has a reference completion."""
    if row.get("completion") is not None or ("question" in row and "completion" in all_columns(row, {}, "data")):
        return True
    turns: list[Any] = next((row[key] for key in ("prompt", "messages", "conversations") if isinstance(row.get(key), list)), [])
    last = turns[-1] if turns and isinstance(turns[-1], Mapping) else {}
    return last.get("role", last.get("from")) in ("assistant", "gpt")


def adapter_node(adapter: Any) -> dict[str, Any]:
    """The configuration node of an adapter's configuration: its values that are not PEFT's defaults."""
    if not hasattr(adapter, "to_dict") or not hasattr(adapter, "peft_type"):
        raise ValueError(f"adapter={type(adapter).__name__} is no configuration of PEFT; give a peft.LoraConfig.")
    kind = type(adapter)
    default = kind().to_dict()
    values = {key: value for key, value in adapter.to_dict().items() if value != default.get(key)}
    listed = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    module = kind.__module__ if kind.__module__.startswith("opd_lightning.") else "peft"
    return {"_target_": f"{module}.{kind.__name__}", **listed}


def replaced(node: Any, old: str, new: str) -> Any:
    """A tree with `new` for every text that is `old`."""
    if isinstance(node, dict):
        return {key: replaced(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [replaced(value, old, new) for value in node]
    return new if node == old else node


def pairs(node: Any) -> Iterable[tuple[str, Any]]:
    """Every key with its value in a tree."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from pairs(value)
