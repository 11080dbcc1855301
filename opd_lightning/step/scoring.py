"""Scoring: verdicts, advantages and teachers' targets for the samples of a step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from opd_lightning.data.batching import pack
from opd_lightning.losses.objective import Objective
from opd_lightning.types import Example, Sample, Tokens, Verdict
from opd_lightning.utils.dtypes import real_dtype
from opd_lightning.utils.metrics import StepMetrics
from opd_lightning.utils.vocabulary import valid_ids_of


@dataclass
class Scoring:
    """Scoring of the samples of a step.

    Attributes:
        objective: determines which teachers and rewards are needed.
        teachers: by name.
        renderer: the student's.
        verify: the task's verifier, for samples without an environment's verdict.
        group_size: samples per prompt.
        max_tokens: padded tokens that a teacher reads at a time; None reads all at once.
        mixed: whether the student writes some of the samples and others write the rest.
    """

    objective: Objective
    teachers: Mapping[str, Any]
    renderer: Any
    verify: Callable[[Example, str], Verdict] | None
    group_size: int
    max_tokens: int | None
    mixed: bool = False

    @property
    def needs_verdicts(self) -> bool:
        """Whether the objective or a teacher's context reads verdicts."""
        contexts = [part.context for teacher in self.teachers.values() for part in teacher.parts]
        return self.objective.reads_verdicts or any(context.needs_rollouts for context in contexts)

    def pack(self, samples: list[Sample], metrics: StepMetrics, module: Any) -> tuple[list[Sample], Tokens]:
        """The samples with verdicts, if these are needed, and their tokens with rewards and advantages.

        Args:
            module: gives the device, its rank and `all_gather`.

        Raises:
            ValueError: a completion is empty or has an id that is no token, or prompts are more than text.
        """
        empty = next((sample.example.id for sample in samples if sample.trainable < 1), None)
        if empty is not None:
            raise ValueError(f"the completion of example {empty} is empty; a completion holds EOS at least.")
        if inputs := next((name for sample in samples for name in sample.model_inputs), None):
            raise ValueError(f"the prompts have {inputs} beside their text, which training does not read; use text prompts.")
        self.objective.set_step(module.global_step)
        for name, number in self.objective.scheduled.items():
            metrics.mean(f"train/{name}", torch.tensor(number, device=module.device))
        tokens = pack(samples, module.device)
        if self.mixed:
            own = torch.tensor([sample.source == "student" for sample in samples], device=module.device)
            tokens = replace(tokens, own=own[tokens.sample])
        valid_ids = self.renderer.valid_ids
        if valid_ids is not None and not (known := valid_ids.contains(tokens.ids)).all():
            raise ValueError(
                f"a completion holds the id {int(tokens.ids[~known].max())}, which is no token of the student's tokenizer "
                f"({valid_ids.count} tokens); let the generator draw from these alone."
            )
        if not self.needs_verdicts:
            return samples, tokens
        samples = self.judge(samples)
        contents = [sample.verdict.content for sample in samples if sample.verdict]
        rewards = torch.tensor(contents, device=module.device, dtype=real_dtype())
        metrics.mean("rollout/reward", rewards)
        tokens = replace(tokens, reward=rewards[tokens.sample], pass_rate=pass_rates(rewards, samples)[tokens.sample])
        if self.objective.rewarded:
            tokens = replace(tokens, advantage=self.advantages(samples, tokens, rewards, metrics, module))
        return samples, tokens

    def judge(self, samples: list[Sample]) -> list[Sample]:
        """The samples with verdicts: the environment's, else the task's."""
        if all(sample.verdict is not None for sample in samples):
            return samples
        assert self.verify is not None, "an objective that reads rewards, and a context that reads attempts, need a verifier"
        texts = self.renderer.decode_all([sample.reply_ids for sample in samples])
        return [
            sample if sample.verdict is not None else replace(sample, verdict=self.verify(sample.example, text))
            for sample, text in zip(samples, texts, strict=True)
        ]

    def advantages(self, samples: list[Sample], tokens: Tokens, rewards: Tensor, metrics: StepMetrics, module: Any) -> Tensor:
        """Advantages [N] of rewards [B]; samples of one prompt are adjacent."""
        n, ids = self.group_size, [sample.group for sample in samples]
        if len(ids) % n or any(len(set(ids[i : i + n])) != 1 for i in range(0, len(ids), n)):
            raise ValueError(f"rollout: the {n} samples of a prompt must be adjacent, for advantages compare them.")
        groups = rewards.view(-1, n)
        metrics.mean("rollout/frac_reward_zero_std", (groups == groups[:, :1]).all(1).float())
        turns = turn_of_tokens(samples).to(rewards.device)
        most = int(module.all_gather(turns.max() + 1).max())  # devices exchange tensors of one shape
        assert self.objective.policy_gradient is not None and tokens.sample is not None
        returns = self.objective.policy_gradient.credit(rewards, turn_rewards(samples, rewards, most))
        # A baseline may be over the batch of all devices.
        gathered = module.all_gather(returns.view(-1, n, returns.shape[1])).reshape(-1, n, returns.shape[1])
        found = torch.stack([self.objective.advantages(part) for part in gathered.unbind(-1)], -1)
        first = module.global_rank * len(groups)
        own = found[first : first + len(groups)].flatten(0, 1)
        return own[tokens.sample, turns.clamp_max(own.shape[1] - 1)]

    def served_scores(self, samples: list[Sample]) -> dict[str, Any]:
        """The scores of teachers behind servers, for samples without verdicts; may be called in another thread."""
        read = {name: self.teachers[name] for name in sorted(self.objective.teachers)}
        served = {k: teacher for k, teacher in read.items() if teacher.served and not teacher.context.needs_rollouts}
        return {name: teacher.score(samples, self.max_tokens) for name, teacher in served.items()}

    def teacher_scores(
        self, samples: list[Sample], metrics: StepMetrics, known: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """The scores of each teacher that the objective reads; their costs are logged.

        Args:
            known: scores that are at hand, by teacher.

        Raises:
            ValueError: a completion holds an id that a teacher does not have.
        """
        results = {}
        written = torch.cat([sample.token_ids[sample.loss_mask] for sample in samples])
        for name in sorted(self.objective.teachers):
            scores = known[name] if name in known else self.teachers[name].score(samples, self.max_tokens)
            results[name] = scores
            metrics.total(f"{name}_tokens", scores.cost.tokens)
            metrics.total("flops/teacher", scores.cost.flops)
            for key, values in scores.metrics.items():
                metrics.mean(f"rollout/{name}_{key}", values, where=~values.isnan())
            missing = ~valid_ids_of(scores).contains(written)
            if scores.valid is not None:
                missing &= scores.valid.to(missing.device)
            if missing.any():
                raise ValueError(
                    f"a completion holds the id {int(written[missing].max())}, which {name} does not have (its vocabulary is "
                    f"{scores.vocabulary}); choose models of one family."
                )
        return results


def turn_of_tokens(samples: Sequence[Sample]) -> Tensor:
    """The reply [N] to which each trainable token belongs, from 0 in each sample: a run of the loss mask."""
    found = []
    for sample in samples:
        begins = sample.loss_mask & ~torch.cat([sample.loss_mask.new_zeros(1), sample.loss_mask[:-1]])
        found.append((begins.cumsum(0) - 1)[sample.loss_mask])
    return torch.cat(found)


def turn_rewards(samples: Sequence[Sample], rewards: Tensor, turns: int) -> Tensor:
    """The rewards [B, T] of replies: the environment's verdicts on them, and the sample's reward [B] on a last one without."""
    found = rewards.new_zeros(len(samples), turns)
    for b, sample in enumerate(samples):
        last = int(turn_of_tokens([sample]).max())
        own = [*sample.turn_verdicts, *[None] * turns][: last + 1]
        for t, verdict in enumerate(own):
            found[b, t] = verdict.content if verdict is not None else rewards[b] if t == last else 0.0
    return found


def pass_rates(rewards: Tensor, samples: Sequence[Sample]) -> Tensor:
    """The mean reward [B] of the completions of each sample's prompt."""
    _, group = torch.tensor([sample.group for sample in samples], device=rewards.device).unique(return_inverse=True)
    total = torch.zeros_like(rewards).index_add_(0, group, rewards)
    return (total / torch.bincount(group, minlength=len(rewards)).clamp_min(1))[group]
