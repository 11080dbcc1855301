"""The components of a run, built from its configuration, for training and for the check before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from opd_lightning.config import build
from opd_lightning.config.compatibility import check_built, check_provides
from opd_lightning.config.limits import limited
from opd_lightning.config.trainer_arguments import epochs_of, last_update
from opd_lightning.contracts import Generator, RolloutPolicy, Task
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.losses import Objective
from opd_lightning.losses.seeing_weights import columns_read
from opd_lightning.models import Pretrained
from opd_lightning.preflight.data import drop_overlong, preflight
from opd_lightning.preflight.options import check_adapter, check_optimizer
from opd_lightning.preflight.references import drop_long, limit_for, reference_limit
from opd_lightning.preflight.rendering import as_played, check_rows
from opd_lightning.runs.status import started
from opd_lightning.teachers.alignment import aligned
from opd_lightning.teachers.base import all_parts, linked
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example


@dataclass(frozen=True)
class Components:
    """The components of a run; no weights are loaded yet.

    Attributes:
        model, tokenizer, renderer: the student's.
        generator: the engine that generates completions.
        task, all_examples, examples: the task, its training examples, and those left after long prompts and references
            are dropped.
        rollout, objective: the source of completions, and the loss.
        teachers: those that rollout or objective need, by name.
        suite: evaluations by name.
        environment: makes the episodes of training; None where the task's own prompts are read.
        max_prompt_tokens: limit of the student's prompts, in tokens.
        template_error: the first error of the chat template, which `preflight` raises; None where it renders every row.
    """

    model: Pretrained
    tokenizer: PreTrainedTokenizerBase
    renderer: ChatRenderer
    generator: Generator
    task: Task
    all_examples: Sequence[Example]
    examples: Sequence[Example]
    rollout: RolloutPolicy
    objective: Objective
    teachers: dict[str, Any]
    suite: dict[str, Any]
    environment: Any
    max_prompt_tokens: int | None
    template_error: str | None

    def preflight(self) -> dict[str, Any]:
        """The counts of `preflight.data.preflight`, with that of dropped examples."""
        if self.template_error:
            raise ValueError(self.template_error)
        counts = preflight(self)
        dropped = len(self.all_examples) - len(self.examples)
        return counts | ({"dropped": dropped} if dropped else {})

    def bounded(self, cfg: DictConfig) -> DictConfig:
        """The configuration with max_steps set to the update at which max_epochs ends the run."""
        if epochs_of(cfg.trainer) is None:
            return cfg
        cfg = cfg.copy()
        cfg.trainer.max_steps = last_update(cfg.trainer, len(self.examples), cfg.data.batch_size, self.rollout.num_iterations)
        return cfg

    def readers(self) -> "dict[str, Reader]":
        """The readers of prompts by name."""
        own = NoContext(self.model.template_options, self.max_prompt_tokens)
        return {"student": Reader(self.model, own, self.renderer)} | {
            name: Reader(part.source or self.model, part.context, part.own if part.aligned else self.renderer)
            for name, part in all_parts(self.teachers)
        }


class Reader(NamedTuple):
    """A reader of prompts: the model that limits their length, the context that builds them, and what renders them."""

    model: Pretrained
    context: Any
    renderer: ChatRenderer


def assemble(cfg: DictConfig, folder: Path | None) -> Components:
    """Build the components of a run.

    Args:
        folder: the run's folder, for components that keep files there.

    Raises:
        ValueError: something is wrong with the configuration, the data or a tokenizer.
    """
    check_built(cfg)
    check_optimizer(cfg)
    model: Pretrained = build(cfg.model)
    check_adapter(cfg, model)
    renderer, task = model.renderer(started(folder)), build(cfg.task)
    tokenizer = renderer.tokenizer
    if task.max_new_tokens is None:
        task.max_new_tokens = limit_for(task, renderer, model.window())
    cfg = limited(cfg, task.max_new_tokens)
    shared = {"task": task, "tokenizer": tokenizer, "renderer": renderer, "folder": folder}
    window = model.window()
    environment = build(cfg.get("environment"), task=task, renderer=renderer)
    rollout, objective = build(cfg.rollout, environment=environment, window=window, **shared), build(cfg.loss)
    teachers = build_teachers(cfg, objective.teachers | rollout.teachers, model)
    teachers = {name: aligned(teacher, renderer) for name, teacher in teachers.items()}
    check_aligned(teachers, objective, rollout, cfg.get("environment"))
    if "teacher" in teachers:
        check_columns(objective.weight, teachers["teacher"])
    contexts = {"student": NoContext(model.template_options)} | {name: part.context for name, part in all_parts(teachers)}
    own_renderers = {name: part.own for name, part in all_parts(teachers) if part.aligned}
    template_error = None
    try:
        check_rows(task, renderer, contexts, environment, own_renderers)
    except ValueError as error:
        template_error = str(error)
    nodes = {} if template_error else cfg.evaluation.suite  # some evaluations render their prompts at once
    offers = {"model": model, "environment": environment, "window": window, **shared}
    suite = {name: build(node, **offers) for name, node in nodes.items() if node is not None}
    all_examples = task.examples("train")
    parts = Components(
        model=model,
        tokenizer=tokenizer,
        renderer=renderer,
        generator=build(cfg.generator, **shared),
        task=task,
        all_examples=all_examples,
        examples=all_examples,
        rollout=rollout,
        objective=objective,
        teachers=teachers,
        suite=suite,
        environment=environment,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        template_error=template_error,
    )
    if cfg.data.overlong != "drop" or template_error:
        return parts
    try:
        return Components(**{**vars(parts), "examples": fitting(parts)})
    except BaseException:
        parts.generator.close()
        raise


def fitting(parts: Components) -> list[Example]:
    """The training examples whose prompts and references are short enough."""
    played, rollout = as_played(parts.all_examples, parts.environment), parts.rollout
    short = {e.id for e in drop_overlong(played, list(parts.readers().values()), rollout.sampling.max_new_tokens)}
    kept = [example for example in parts.all_examples if example.id in short]
    return drop_long(kept, parts.renderer, reference_limit(rollout)) if rollout.reads_references else kept


def check_aligned(teachers: dict[str, Any], objective: Objective, rollout: RolloutPolicy, environment: Any) -> None:
    """Raises ValueError if a teacher with another tokenizer is asked for what such teachers do not give."""
    for name, teacher in teachers.items():
        others = [part for part in teacher.parts if part.aligned]
        if not others:
            continue
        if getattr(teacher.context, "at", "first") == "every":
            raise ValueError(
                f"context.at=every is rendered in the student's chat template, which the {name} with another tokenizer cannot "
                "read; choose context.at=first, or a teacher of the student's family."
            )
        if name in rollout.teachers:
            raise ValueError(
                f"rollout lets the {name} write, and it has another tokenizer ({others[0].own_tokenizer.name}): its tokens are "
                "not the student's; choose rollout=student, or a teacher of the student's family."
            )
        if environment and not environment["_target_"].endswith(".SingleTurn"):
            raise ValueError(
                f"environment={environment['_target_']} answers in the student's chat template, which the {name} with another "
                "tokenizer cannot read; choose environment=single_turn, or a teacher of the student's family."
            )
        if name == "teacher" and objective.divergence is not None:
            check_provides(teacher, objective.divergence.support)
            check_reading(teacher, others, objective, rollout)


def check_reading(teacher: Any, others: Sequence[Any], objective: Objective, rollout: RolloutPolicy) -> None:
    """Raises ValueError if what is read of parts with another tokenizer does not suit the loss or the sampling."""
    assert objective.divergence is not None
    if objective.temperature != 1 and ("full" not in teacher.provides or getattr(teacher, "fixed_temperature", False)):
        raise ValueError(
            f"loss.temperature={objective.temperature} needs the logits of one teacher's whole vocabulary, and with another "
            "tokenizer this one gives less; use 1."
        )
    k = getattr(objective.divergence.support, "k", None)
    for part in others:
        part.alignment.check_divergence(objective.divergence.divergence)
        if hasattr(part.alignment, "check_sampling") and rollout.student_writes:
            part.alignment.check_sampling(rollout.sampling)
        if k is not None and "full" in part.provides and k > len(part.ids[0]):
            raise ValueError(
                f"loss.vocab_support.k={k} exceeds the {len(part.ids[0])} tokens that the student shares with "
                f"{part.own_tokenizer.name}; lower it, or use loss/vocab_support=full."
            )


def check_columns(weight: Any, teacher: Any) -> None:
    """Raises ValueError if a token weight reads a statistic that this teacher does not give."""
    exact = columns_read(weight) & {"teacher_entropy", "forward_kl", "reverse_kl"}
    if exact and (teacher.apart or "full" not in teacher.provides):
        raise ValueError(
            f"loss.weight reads {' and '.join(sorted(exact))}, which follows from a teacher's whole vocabulary in the "
            "student's tokens; choose another weight (loss/weight=ranked reads student_entropy), or another teacher."
        )


def build_teachers(cfg: DictConfig, names: frozenset[str], model: Pretrained) -> dict[str, Any]:
    """The teachers of these names; others are not built."""
    contexts = {"teacher": build(cfg.context), "reference": NoContext(model.template_options)}
    return linked({name: build(cfg[name], context=contexts[name]) for name in sorted(names)})
