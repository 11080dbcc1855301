"""The nouns of a run, from its configuration: what training, and the check before it, both need."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from opd_lightning.config import build
from opd_lightning.losses import Objective
from opd_lightning.models import Pretrained
from opd_lightning.preflight.data import drop_overlong, preflight
from opd_lightning.teachers import Scorer
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, RolloutPolicy, Task


@dataclass(frozen=True)
class Nouns:
    """What a run is made of; no weights are loaded yet.

    Attributes:
        model, tokenizer: the student's.
        task, given, examples: the task, its training examples, and those that are not dropped for their length.
        rollout, objective: who writes, and what is minimised.
        scorers: the models beside the student that one of these two asks.
        suite: evaluations by name.
        max_prompt_tokens: the student's limit.
    """

    model: Pretrained
    tokenizer: PreTrainedTokenizerBase
    task: Task
    given: Sequence[Example]
    examples: Sequence[Example]
    rollout: RolloutPolicy
    objective: Objective
    scorers: dict[str, Scorer]
    suite: dict[str, Any]
    max_prompt_tokens: int | None

    def preflight(self) -> dict[str, Any]:
        """See `preflight.preflight`; what was dropped is counted too."""
        found = preflight(
            self.model,
            self.tokenizer,
            self.task,
            self.examples,
            self.rollout,
            self.objective,
            self.scorers,
            self.suite,
            self.max_prompt_tokens,
        )
        dropped = len(self.given) - len(self.examples)
        return found | ({"dropped": dropped} if dropped else {})


def assemble(cfg: DictConfig, folder: Path | None) -> Nouns:
    """Instantiate them.

    Args:
        folder: the run's, for what keeps files there.

    Raises:
        ValueError: something is wrong with the configuration, the data or a tokenizer.
    """
    model: Pretrained = build(cfg.model)
    tokenizer, task = model.tokenizer(), build(cfg.task)
    offers = {"task": task, "tokenizer": tokenizer, "folder": folder}
    rollout, objective = build(cfg.rollout, **offers), build(cfg.loss)
    # Models that neither the loss nor the rollout asks are not even looked for.
    contexts = {"teacher": build(cfg.context), "reference": NoContext(model.template_options)}
    needed = sorted(objective.sources | rollout.sources)
    scorers = {name: Scorer(build(cfg[name], **offers), contexts[name], tokenizer) for name in needed}
    suite = {name: build(node, model=model, **offers) for name, node in cfg.evaluation.suite.items()}
    given = examples = task.examples("train")
    limit = cfg.data.max_prompt_tokens
    if cfg.data.overlong == "drop":
        readers = [(scorer.weights.source or model, scorer.context) for scorer in scorers.values()]
        readers.append((model, NoContext(model.template_options, limit)))
        examples = drop_overlong(given, tokenizer, readers, rollout.max_new_tokens)
    return Nouns(model, tokenizer, task, given, examples, rollout, objective, scorers, suite, limit)
