"""The components of a run, from its configuration: what training, and the check before it, both need."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from opd_lightning.config import build
from opd_lightning.config.compatibility import check_built
from opd_lightning.config.limits import limited
from opd_lightning.config.trainer_arguments import epochs_of, last_update
from opd_lightning.contracts import Generator, RolloutPolicy, Task
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.losses import Objective
from opd_lightning.models import Pretrained
from opd_lightning.preflight.data import drop_overlong, preflight
from opd_lightning.preflight.references import drop_long, limit_for, reference_limit
from opd_lightning.preflight.rendering import check_rows
from opd_lightning.runs.status import started
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example


@dataclass(frozen=True)
class Components:
    """What a run is made of; no weights are loaded yet.

    Attributes:
        model, tokenizer, renderer: the student's.
        generator: the engine that writes.
        task, given, examples: the task, its training examples, and those that are not dropped for their length or their
            reference's.
        rollout, objective: who writes, and what is minimised.
        teachers: those that one of these two needs.
        suite: evaluations by name.
        max_prompt_tokens: the student's limit.
        refused: what the chat template cannot render, which `preflight` raises; None where it renders every row.
    """

    model: Pretrained
    tokenizer: PreTrainedTokenizerBase
    renderer: ChatRenderer
    generator: Generator
    task: Task
    given: Sequence[Example]
    examples: Sequence[Example]
    rollout: RolloutPolicy
    objective: Objective
    teachers: dict[str, Any]
    suite: dict[str, Any]
    max_prompt_tokens: int | None
    refused: str | None

    def preflight(self) -> dict[str, Any]:
        """See `preflight.data.preflight`; what was dropped is counted too."""
        if self.refused:
            raise ValueError(self.refused)
        found = preflight(self)
        dropped = len(self.given) - len(self.examples)
        return found | ({"dropped": dropped} if dropped else {})

    def bounded(self, cfg: DictConfig) -> DictConfig:
        """The configuration with the update that ends the run, where passes through the data decide it."""
        if epochs_of(cfg.trainer) is None:
            return cfg
        cfg = cfg.copy()
        cfg.trainer.max_steps = last_update(cfg.trainer, len(self.examples), cfg.data.batch_size, self.rollout.num_iterations)
        return cfg

    def readers(self) -> dict[str, tuple[Pretrained, Any]]:
        """Who reads prompts, with the model that bounds their length and the context that words them."""
        found: dict[str, tuple[Pretrained, Any]] = {
            "student": (self.model, NoContext(self.model.template_options, self.max_prompt_tokens))
        }
        return found | {name: (part.source or self.model, part.context) for name, part in all_parts(self.teachers)}


def assemble(cfg: DictConfig, folder: Path | None) -> Components:
    """Instantiate them.

    Args:
        folder: the run's, for what keeps files there.

    Raises:
        ValueError: something is wrong with the configuration, the data or a tokenizer.
    """
    check_built(cfg)
    model: Pretrained = build(cfg.model)
    renderer, task = model.renderer(started(folder)), build(cfg.task)
    tokenizer = renderer.tokenizer
    if task.max_new_tokens is None:
        task.max_new_tokens = limit_for(task, renderer, model.window())
    cfg = limited(cfg, task.max_new_tokens)
    offers = {"task": task, "tokenizer": tokenizer, "renderer": renderer, "folder": folder}
    environment = build(cfg.get("environment"), task=task)
    rollout, objective = build(cfg.rollout, environment=environment, **offers), build(cfg.loss)
    teachers = build_teachers(cfg, objective.teachers | rollout.teachers, model)
    for teacher in teachers.values():
        teacher.check_tokenizer(tokenizer)
    contexts = {"student": NoContext(model.template_options)} | {name: part.context for name, part in all_parts(teachers)}
    refused = None
    try:
        check_rows(task, renderer, contexts)
    except ValueError as error:
        refused = str(error)
    nodes = {} if refused else cfg.evaluation.suite  # some evaluations render their prompts at once
    suite = {name: build(node, model=model, **offers) for name, node in nodes.items() if node is not None}
    given = task.examples("train")
    parts = Components(
        model=model,
        tokenizer=tokenizer,
        renderer=renderer,
        generator=build(cfg.generator, **offers),
        task=task,
        given=given,
        examples=given,
        rollout=rollout,
        objective=objective,
        teachers=teachers,
        suite=suite,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        refused=refused,
    )
    if cfg.data.overlong != "drop" or refused:
        return parts
    kept = drop_overlong(given, renderer, list(parts.readers().values()), rollout.sampling.max_new_tokens)
    if rollout.reads_references:
        kept = drop_long(kept, renderer, reference_limit(rollout))
    return Components(**{**vars(parts), "examples": kept})


def build_teachers(cfg: DictConfig, names: frozenset[str], model: Pretrained) -> dict[str, Any]:
    """The teachers of these names; the others are not even looked for."""
    contexts = {"teacher": build(cfg.context), "reference": NoContext(model.template_options)}
    return {name: build(cfg[name], context=contexts[name]) for name in sorted(names)}
