"""The architecture check of the student, with its losses and generation; the first check that loads weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from opd_lightning.config import build
from opd_lightning.data.batching import collate, pack
from opd_lightning.generation.batches import GROUPING, batch_support
from opd_lightning.losses.not_finite import NotFinite
from opd_lightning.models import Student, adapters
from opd_lightning.preflight.checks import CheckResult
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.rendering import as_played
from opd_lightning.rollout.base import single_turn
from opd_lightning.rollout.dataset import reference_sample
from opd_lightning.types import Completion, Sample, Sequences
from opd_lightning.utils.vocabulary import valid_ids_of


def load(parts: Components, cfg: DictConfig) -> Student:
    """The student on the training device, with its adapter and its teachers set up.

    Raises:
        ValueError: a model, or the adapter, is refused.
    """
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    lm = parts.model.model()
    adapter = build(cfg.adapter)
    if adapter is not None:
        adapters.add(lm, adapter)
    student = Student(lm, cfg.logits_chunk_size, parts.renderer.valid_ids).to(device)
    student.verify_head(f"model.path={parts.model.path}")
    for teacher in parts.teachers.values():
        teacher.setup(student, parts.renderer)
    return student


def architecture(parts: Components, student: Student) -> Iterator[CheckResult]:
    """Check results on the architecture of a student that `load` accepts."""
    kind, adapted = type(student.lm).__name__, len(adapters.layers(student.lm))
    adapter_note = f"; the adapter changes {adapted} layers" if adapted else ""
    yield CheckResult("architecture", "pass", f"{kind}: backbone and output layer together are the model{adapter_note}")
    with student.eval_mode() as lm:
        batch = batch_support(lm, parts.renderer.render(parts.examples[0].messages, parts.examples[0].tools).token_ids)
    if batch != "any":
        yield CheckResult("architecture", "warn", f"{kind}'s completions depend on the batch; generated for {GROUPING[batch]}.")


def logits(parts: Components, student: Student) -> Iterator[CheckResult]:
    """Check results on tokens that student or teachers rule out (logits of -inf), and on the loss of one reply with them."""
    names = sorted(parts.objective.teachers)
    if any(part.context.needs_rollouts for name in names for part in parts.teachers[name].parts):
        yield CheckResult("logits", "pass", "not probed: a teacher reads attempts, which there are in training only")
        return
    with student.eval_mode():
        sample, masked = probe_sample(parts, student)
        scores: dict[str, Any] = {name: parts.teachers[name].score([sample]) for name in names}
        targets = {name: score.chunk(slice(0, 1)) for name, score in scores.items()}
        counts = {"the student": len(masked)} | {
            name: int(torch.isneginf(target.logits[0]).sum()) - len(valid_ids_of(scores[name]).absent)
            for name, target in targets.items()
            if hasattr(target, "logits")
        }
    ruled_out = [f"{name} rules out {n} token{'s' * (n > 1)} (logits of -inf)" for name, n in counts.items() if n > 0]
    if parts.rollout.reads_references and masked and (cut := with_ids(parts, masked)):
        yield CheckResult("logits", "fail", f"{ruled_out[0]}, and {cut}; leave them out (task.prepare), or take the mask off.")
        return
    tokens = pack([sample], student.lm.device)
    ones = torch.ones_like(tokens.weight)
    sequences = collate([sample], parts.tokenizer.pad_token_id, student.lm.device)  # type: ignore[arg-type]
    try:
        with student.eval_mode():
            student(sequences, replace(tokens, reward=ones, advantage=ones), scores, parts.objective)
    except NotFinite as error:
        yield CheckResult("logits", "fail", "; ".join([*ruled_out, str(error)]))
        return
    text = "no token is ruled out, and the loss of a reply is finite"
    if ruled_out:
        text = f"{' and '.join(ruled_out)}; the losses take such a token's probability as 0, and stay finite"
    yield CheckResult("logits", "warn" if ruled_out else "pass", text)


def probe_sample(parts: Components, student: Student) -> tuple[Sample, set[int]]:
    """A sample of the first example, and the ids that the student rules out: the reference, or the most probable token."""
    example = as_played(parts.examples[:1], parts.environment)[0]
    prompt = parts.renderer.render(example.messages, example.tools)
    ids = torch.tensor([prompt.token_ids], device=student.lm.device)
    hidden = student.hidden(Sequences(ids, torch.ones_like(ids), ids.new_zeros(1), ids.new_tensor([ids.shape[1] - 1])))
    row = student.head.project(hidden)[0]
    masked = set(torch.isneginf(row).nonzero().flatten().tolist()) - set(student.head.known.absent)
    reply = [int(row.nan_to_num(neginf=float("-inf")).argmax())]
    if parts.rollout.reads_references and example.reference is not None:
        return reference_sample(parts.renderer, example), masked
    return single_turn(example, 0, prompt, Completion(reply, "stop"), "student", False), masked


def with_ids(parts: Components, masked: set[int], n: int = 512) -> str | None:
    """The references, among the first n, that have one of these ids, as the end of a sentence; None where none has."""
    examples = [e for e in parts.examples[:n] if e.reference is not None]
    samples = [reference_sample(parts.renderer, example) for example in examples]
    found = [s.example.id for s in samples if masked & set(s.token_ids[s.loss_mask].tolist())]
    return f"{len(found)} of {len(examples)} references have one, {found[0]} first, whose loss is infinite" if found else None
