"""Rollouts of a run: each written when it is needed, or ahead, while the one before is scored and learned from."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from opd_lightning.contracts import Generator, RolloutPolicy
from opd_lightning.types import Completion, Example, Prompts, Rendered, Rollout, Sample, SamplingParams, Verdict
from opd_lightning.utils.metrics import StepMetrics
from opd_lightning.utils.ranks import barrier, of_all_ranks, rank, world_size
from opd_lightning.utils.seeds import derive_seed
from opd_lightning.utils.worker import Worker


class Rollouts:
    """Rollouts that are written when they are needed, by the current weights.

    Args:
        generator: the engine.

    Attributes:
        generator: the engine for everything else, such as evaluations.
    """

    def __init__(self, generator: Generator):
        self.generator = generator

    def start(self, module: Any) -> None:
        """Give the engine the weights, which a checkpoint may have restored."""
        self.generator.update_weights(module.student, module.global_step)

    def take(self, module: Any, prompts: Prompts, metrics: StepMetrics) -> Rollout:
        """The rollout of this step."""
        # Ranks may generate unequally often, so sharded weights are gathered once, around all of it.
        own = module.student.eval_mode() if module.rollout.student_writes else nullcontext()
        with module.student.gathered() if module.rollout.teachers else own:
            seed = derive_seed(module.seed, "rollout", module.global_step, module.global_rank)
            return module.rollout(prompts, seed, self.generator, module.teachers)

    def after_update(self, module: Any, metrics: StepMetrics) -> None:
        """Give the engine the new weights."""
        self.generator.update_weights(module.student, module.global_step)

    def close(self) -> None:
        """End what was begun; the engine stays."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from a checkpoint."""


class RolloutsAhead(Rollouts):
    """Rollouts that a thread writes ahead: rollout j by the weights after update j - k, the first k by the start weights.

    After an update the engine finishes what it has begun, gets the new weights in the main thread, where devices may gather
    them, and goes on with the next rollout. So a step takes as long as the longer of its two parts, and the weights' transfer.
    The scores of served teachers are asked for by another thread, as soon as a rollout is written. A signal does not end
    the wait for a rollout: it is by weights that are gone, and a checkpoint needs it.

    Args:
        generator: an engine with a copy of the weights.
        ahead: k.
        num_iterations: optimizer steps per rollout.
    """

    def __init__(self, generator: Generator, ahead: int, num_iterations: int):
        if not getattr(generator, "holds_weights", False):
            raise ValueError(
                f"rollout.async_steps={ahead}: {type(generator).__name__} has no copy of the weights, so it cannot write "
                "while they are trained; choose another generator, or rollout.async_steps=0."
            )
        self.engine, self.ahead, self.num_iterations = generator, ahead, num_iterations
        self.writer, self.reader = Worker("rollouts"), Worker("scores")
        self.generator: InTurn = InTurn(generator, [self.writer, self.reader])
        self.written: deque[tuple[Future, Future]] = deque()
        self.restored: list[list[Sample]] = []
        self.waited, self.since, self.busy = 0.0, 0.0, 0.0

    def start(self, module: Any) -> None:
        """Give the engine the weights, and begin with the first rollouts; those of a checkpoint are not written again."""
        super().start(module)
        self.written.clear()
        first = module.global_step // self.num_iterations
        for j in range(first, first + self.ahead + 1):
            self.begin(module, j, self.restored.pop(0) if self.restored else None)

    def begin(self, module: Any, j: int, samples: list[Sample] | None = None) -> None:
        """Begin to write the rollout of step j, and to score it; `samples` are those of a checkpoint."""
        step, last = j * self.num_iterations, module.trainer.max_steps
        if 0 < last <= step:
            return
        written: Future = Future()
        if samples is not None:
            written.set_result(Rollout(samples))
        else:
            prompts = module.trainer.datamodule.prompts(j)
            seed = derive_seed(module.seed, "rollout", step, module.global_rank)
            written = self.writer.submit(lambda: module.rollout(prompts, seed, self.engine, module.teachers))
        scored = self.reader.submit(lambda: module.scoring.served_scores(written.result().samples))
        self.written.append((written, scored))

    def take(self, module: Any, prompts: Prompts, metrics: StepMetrics) -> Rollout:
        """The rollout of this step, when it is written and scored."""
        self.waited, self.since, self.busy = 0.0, time.perf_counter(), self.writer.busy_seconds()
        written, scored = self.written[0]  # until the update is made, for a checkpoint before it
        with self.waiting():
            rollout = replace(written.result(), scores=scored.result())
        ids, n = [sample.example.id for sample in rollout.samples], len(rollout.samples) // len(prompts.examples)
        assert ids == [e.id for e in prompts.examples for _ in range(n)], "a rollout is of other prompts than its step"
        versions = [sample.policy_version for sample in rollout.samples if sample.policy_version is not None]
        lag = torch.tensor([module.global_step - version for version in versions])
        metrics.mean("rollout/policy_lag", lag)
        return rollout

    def after_update(self, module: Any, metrics: StepMetrics) -> None:
        """Wait for the engine, give it the new weights, and begin with the next rollout."""
        with module.ledger.timing("rollout"), self.waiting():
            self.generator.finish(everywhere=True)
        self.written.popleft()
        super().after_update(module, metrics)
        self.begin(module, module.global_step // self.num_iterations + self.ahead)
        idle = time.perf_counter() - self.since - (self.writer.busy_seconds() - self.busy)
        metrics.mean("rollout/trainer_idle_seconds", torch.tensor(self.waited))
        metrics.mean("rollout/engine_idle_seconds", torch.tensor(max(idle, 0.0)))

    def close(self) -> None:
        """End the threads."""
        for worker in self.generator.workers:
            worker.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as the trainer's idle time."""
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    def state_dict(self) -> dict[str, Any]:
        """The next k rollouts of each rank, which are by weights that a resumed run does not have."""
        pending = [written.result().samples for written, _ in list(self.written)[: self.ahead]]
        return {"rollouts": of_all_ranks([[asdict(sample) for sample in samples] for samples in pending])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rollouts of this rank; with another number of ranks they are written anew."""
        every = state.get("rollouts", [])
        self.restored = [list(map(sample_of, rows)) for rows in every[rank()]] if len(every) == world_size() else []


def sample_of(row: dict[str, Any]) -> Sample:
    """The sample of `asdict`."""
    verdict, *by_turn = [None if v is None else Verdict(**v) for v in (row["verdict"], *row.get("turn_verdicts", ()))]
    return Sample(**row | {"example": Example(**row["example"]), "verdict": verdict, "turn_verdicts": by_turn})


class InTurn:
    """An engine whose calls wait until it has written the rollouts that were given before.

    Args:
        engine: the engine, which the first worker uses.
        workers: those that end with it.
    """

    holds_weights = True

    def __init__(self, engine: Generator, workers: Sequence[Worker]):
        self.engine, self.workers = engine, workers

    @property
    def metrics(self) -> dict[str, float]:
        """The engine's."""
        return getattr(self.engine, "metrics", {})

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, model: Any = None) -> list[Completion]:
        """The engine's completions; another model's need its weights in the engine for a while."""
        self.finish(model is not None)
        with self.workers[0].working():
            return self.engine.generate(prompts, sampling, seed, model)

    def update_weights(self, student: Any, version: int | None) -> None:
        """Give the engine new weights."""
        self.finish(True)
        with self.workers[0].working():
            self.engine.update_weights(student, version)

    def finish(self, everywhere: bool) -> None:
        """Wait until the rollouts are written; `everywhere` on all ranks, which may share the engine's servers."""
        self.workers[0].wait()
        if everywhere:
            barrier()

    def close(self) -> None:
        """End the workers, then the engine."""
        for worker in self.workers:
            worker.close()
        self.engine.close()


def rollouts_of(policy: RolloutPolicy, generator: Generator) -> Rollouts:
    """The rollouts of a policy, ahead by its `async_steps`."""
    ahead = getattr(policy, "async_steps", 0)
    return RolloutsAhead(generator, ahead, policy.num_iterations) if ahead else Rollouts(generator)
