"""Scoring before training: the components of a configuration, and what its scores are kept with."""

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from opd_lightning.config import plain
from opd_lightning.config.compatibility import check
from opd_lightning.config.precision import with_precision
from opd_lightning.data.score_files import Index, fingerprint_of_vocabulary, fingerprint_of_weights
from opd_lightning.models import Pretrained, Student, is_run
from opd_lightning.models.output_layers import without_blocks
from opd_lightning.preflight.components import Components, assemble
from opd_lightning.preflight.resources import automatic_tokens
from opd_lightning.runs.identity import TRANSPORT, without
from opd_lightning.score.folder import begun, check_writable, digest_of_data, digest_of_templates, resumed
from opd_lightning.score.write import ScoreWriter
from opd_lightning.step.scoring import Scoring
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.utils.atomic_files import locked
from opd_lightning.utils.secrets import redact_secrets
from opd_lightning.utils.vocabulary import ValidIds


def score(cfg: DictConfig, out: Path, kind: str = "topk", k: int = 20, passes: int = 1, shard_size: int = 256) -> None:
    """Write the scores of the configured teacher on the configured rollouts.

    Args:
        out: the folder.
        kind: "topk" or "hidden".
        k: most probable tokens per position.
        passes: rollouts of each prompt.
        shard_size: prompts per file.

    Raises:
        ValueError: something is wrong with the options, the configuration, the data or a model.
    """
    check_options(kind, k, passes, shard_size)
    check(cfg)
    cfg = with_precision(cfg)  # no Trainer is made: scores are in the dtype of the weights, the same on every machine
    check_writable(out)
    with locked(out, "choose another out"):
        before = begun(out)
        parts = assemble(cfg, None)
        with closing(parts.generator):
            write(parts, cfg, out, before, kind, k, passes, shard_size)


def write(
    parts: Components, cfg: DictConfig, out: Path, before: Index | None, kind: str, k: int, passes: int, shard_size: int
) -> None:
    """Check the components, and write the scores, going on with those of the index `before`; see `score`."""
    teacher = parts.teachers.get("teacher")
    check_teacher(teacher, kind, k)
    if kind == "topk":
        check_k(teacher, k, parts)
    parts.preflight()
    if cfg.max_tokens_per_microbatch == "auto":
        cfg.max_tokens_per_microbatch = (
            automatic_tokens(parts, cfg)[0] if before is None else before.settings.get("max_tokens_per_microbatch")
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = Student(parts.model.model(), cfg.logits_chunk_size, parts.renderer.valid_ids).to(device).eval()
    parts.generator.update_weights(student, 0)
    for each in parts.teachers.values():
        each.setup(student, parts.renderer)
    models = {role: part.fingerprint for role, part in all_parts(parts.teachers) if part.fingerprint is not None}
    if parts.rollout.student_writes:
        models["student"] = Fingerprint.of(f"model.path={parts.model.path}", student)
    index = resumed(describe(cfg, parts, student, kind, k, passes, shard_size), before, models, out)
    writer = ScoreWriter(
        rollout=parts.rollout,
        generator=parts.generator,
        teachers=parts.teachers,
        teacher=teacher,
        renderer=parts.renderer,
        judge=judge(cfg, parts),
        index=index,
        seed=cfg.seed,
        batch_size=cfg.data.batch_size,
        max_tokens=cfg.max_tokens_per_microbatch,
    )
    writer.write(out, list(parts.examples), passes, shard_size)


def check_options(kind: str, k: int, passes: int, shard_size: int) -> None:
    """Raises ValueError for an option out of range."""
    if kind not in ("topk", "hidden"):
        raise ValueError(f"kind={kind} is unknown; choose topk or hidden.")
    for name, value in (("k", k), ("passes", passes), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def check_teacher(teacher: Any, kind: str, k: int) -> None:
    """Raises ValueError if a teacher's scores cannot be kept."""
    if teacher is None:
        raise ValueError("the method reads no teacher's scores; choose one such as method=kd or method=opd.")
    if not teacher.frozen:
        raise ValueError("the teacher follows the student in training, so its scores cannot be kept; choose teacher=frozen.")
    if kind == "hidden" and not teacher.gives_hidden_states:
        raise ValueError(f"kind=hidden: {type(teacher).__name__} gives no hidden states of one model; choose kind=topk.")
    for part in (part for part in teacher.parts if part.aligned):
        reason = getattr(part.alignment, "unkept", None)
        if reason is None and "full" not in teacher.provides:
            reason = "of a teacher with another tokenizer the top k are chosen from its whole vocabulary"
        if reason is None and len(teacher.parts) > 1:
            reason = "it is one of several teachers, each of which is compared on outcomes of its own"
        if reason is not None:
            raise ValueError(
                f"scores of {part.own_tokenizer.name}, which has another tokenizer, cannot be kept: {reason}; choose "
                "teacher.alignment=shared with teacher=external or remote_hidden."
            )
    if "topk" not in teacher.provides or (teacher.top_k is not None and k > teacher.top_k):
        raise ValueError(f"k={k} exceeds the {teacher.top_k or 0} tokens that the teacher gives; lower it.")


def check_k(teacher: Any, k: int, parts: Components) -> None:
    """Raises ValueError if student and teacher have fewer than k tokens."""
    own = teacher.valid_ids if not any(part.aligned for part in teacher.parts) else None
    ids = [parts.renderer.valid_ids, *([] if own is None else [own])]
    known = ValidIds(parts.model.vocab_size()).intersection(ids).count
    if k > known:
        raise ValueError(f"k={k} exceeds the {known} tokens that the teacher gives; lower it.")


def describe(cfg: DictConfig, parts: Components, student: Student, kind: str, k: int, passes: int, shard_size: int) -> Index:
    """The index of the scores."""
    resolved = redact_secrets(plain(cfg))
    names = ("model", "adapter", "task", "environment", "rollout", "teacher", "context", "data", "seed")
    settings = {name: without(resolved[name], TRANSPORT) for name in names if name in resolved}
    settings |= {"trainer.precision": resolved["trainer"]["precision"], "passes": passes, "shard_size": shard_size}
    settings["max_tokens_per_microbatch"] = cfg.max_tokens_per_microbatch
    if parts.rollout.student_writes or parts.rollout.teachers:  # an engine draws
        settings["generator"] = resolved["generator"]["_target_"]
    teacher, ids, layer = parts.teachers["teacher"], student.head.known, None
    if kind == "hidden":
        source: Pretrained = teacher.output_layer or parts.model
        if is_run(source.path) or source.is_adapter():
            raise ValueError(f"kind=hidden: {source.name} is a run or an adapter; export it first, or choose kind=topk.")
        head = Student(without_blocks(source)).head
        dtype = str(source.dtype).removeprefix("torch.")
        layer = {"path": source.path, "dtype": dtype, "fingerprint": fingerprint_of_weights(head.weight, head.bias)}
    return Index(
        kind=kind,
        k=k if kind == "topk" else 0,
        vocabulary=ids.size,
        absent=list(ids.absent),
        tokenizer=fingerprint_of_vocabulary(parts.tokenizer.get_vocab()),
        output_layer=layer,
        settings=settings,
        num_generations=parts.rollout.sampling.n,
        source="student" if parts.rollout.student_writes else "teacher" if parts.rollout.teachers else "dataset",
        data=digest_of_data(parts),
        template=digest_of_templates(parts),
        compared="outcomes" if any(part.aligned for part in teacher.parts) else "tokens",
    )


def judge(cfg: DictConfig, parts: Components) -> Any:
    """A function that adds verdicts to samples where the teacher's context reads them."""
    n = parts.rollout.sampling.n
    scoring = Scoring(parts.objective, parts.teachers, parts.renderer, parts.task.verify, n, cfg.max_tokens_per_microbatch)
    return scoring.judge if scoring.needs_verdicts else lambda samples: samples
