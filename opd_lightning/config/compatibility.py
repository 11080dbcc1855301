"""Checks of a configuration that need no model: its values, and whether its choices fit together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from opd_lightning.config import build
from opd_lightning.config.ahead import check_ahead
from opd_lightning.config.schema import leaves, parameters_of, shipped
from opd_lightning.config.trainer_arguments import epochs_of
from opd_lightning.config.values import check_values


def check(cfg: DictConfig) -> list[str]:
    """Check a configuration before anything is loaded.

    Returns:
        Warnings, one sentence each.

    Raises:
        ValueError: the field, its value and the remedy.
    """
    resolved = check_values(cfg)
    chosen = Choices.of(resolved)
    return check_start(cfg, chosen) + check_choices(resolved, chosen)


@dataclass(frozen=True)
class Choices:
    """The objects of a configuration whose attributes decide what fits together; none has loaded anything.

    Attributes:
        rollout, teacher, context, support: built from their nodes; teacher and support may be None.
        reads: names of the teachers that gate and token weight read.
        own: what needs the student's own samples, as options.
    """

    rollout: Any
    teacher: Any
    context: Any
    support: Any
    reads: frozenset[str]
    own: tuple[str, ...]

    @classmethod
    def of(cls, cfg: dict[str, Any]) -> "Choices":
        """The objects of a resolved configuration."""
        offers = dict.fromkeys(("renderer", "tokenizer", "task", "folder", "environment", "window"))
        context, loss = build(cfg["context"]), cfg["loss"]
        support = build(loss["vocab_support"]) if loss["divergence"] else None
        functions = [getattr(part, "func", part) for part in (build(loss.get("gate")), build(loss["weight"]))]
        own = {
            "loss/vocab_support=sampled": getattr(support, "needs_own_samples", False),
            "loss/returns": bool(loss["divergence"] and loss.get("returns")),
            "loss/cross_entropy=unlikelihood": getattr(build(loss["cross_entropy"]), "needs_own_samples", False),
        }
        return cls(
            rollout=build(OmegaConf.create({"rollout": cfg["rollout"]}).rollout, **offers),  # for the place in errors
            teacher=build(cfg["teacher"], context=context),
            context=context,
            support=support,
            reads=frozenset(name for function in functions for name in getattr(function, "reads_teachers", ())),
            own=tuple(name for name, needed in own.items() if needed),
        )


def check_choices(cfg: dict[str, Any], chosen: Choices) -> list[str]:
    """Raises ValueError for choices that contradict each other; returns warnings."""
    check_teacher(cfg, chosen)
    check_rollout(cfg, chosen)
    check_ahead(cfg, chosen.rollout, chosen.support)
    if cfg["loss"]["reference"] and "full" not in build(cfg["reference"]).provides:
        raise ValueError("loss.reference reads the whole vocabulary of the reference, and this one gives less; choose another.")
    warnings = []
    loss, teacher = cfg["loss"], chosen.teacher
    if (environment := cfg.get("environment")) and not environment["_target_"].endswith(".SingleTurn"):
        suite = [node for node in cfg["evaluation"]["suite"].values() if node]
        if suite and not any("environment" in parameters_of(node["_target_"]) for node in suite):
            warnings.append("evaluations are of single replies: they do not play the environment; evaluation=episodes does.")
    if teacher is not None and not loss["divergence"] and "teacher" not in chosen.rollout.teachers | chosen.reads:
        warnings.append("the teacher is not loaded, for neither loss nor rollout uses it; set teacher=none.")
    if chosen.own and not chosen.rollout.on_policy and not loss["cross_entropy"]:
        warnings.append(
            f"{chosen.own[0]} learns from the student's completions alone, and the others have no term; add "
            "loss/cross_entropy=nll loss/gate=by_source, or choose rollout=student."
        )
    if teacher is not None and teacher.warning:
        warnings.append(teacher.warning)
    for name, value in loss["coefficients"].items():
        if name in loss and not loss[name] and value != shipped()["loss"]["coefficients"].get(name):
            warnings.append(f"loss.coefficients.{name}={value} has no term to scale; choose one with loss/{name}=.")
    return warnings + check_sampling(cfg, chosen)


def check_sampling(cfg: dict[str, Any], chosen: Choices) -> list[str]:
    """Warnings where a sampled gradient estimate assumes another distribution than the rollout's."""
    loss = cfg["loss"]
    sampling = {key: cfg["rollout"]["sampling"].get(key) for key in ("temperature", "top_p", "top_k")}
    sampled = chosen.support is not None and chosen.support.needs_own_samples
    terms = [term for term in (loss["policy_gradient"], loss["vocab_support"] if sampled else None) if term]
    matching = ({"temperature": loss["temperature"], "top_p": 1.0, "top_k": 0}, dict.fromkeys(sampling))
    if all(term.get("importance_sampling_cap") is not None for term in terms) or sampling in matching:
        return []
    return [
        f"rollout samples with {sampling} and the loss reads its gradient off those samples at temperature "
        f"{loss['temperature']} over the whole vocabulary: the estimate is biased where the two differ. "
        "importance_sampling_cap=2 in loss.policy_gradient or loss.vocab_support corrects for it."
    ]


def check_teacher(cfg: dict[str, Any], chosen: Choices) -> None:
    """Raises ValueError if a divergence lacks a teacher, or the teacher equals the student."""
    loss, teacher, writes = cfg["loss"], chosen.teacher, "teacher" in chosen.rollout.teachers
    if teacher is not None and not hasattr(teacher, "parts"):
        raise ValueError(
            f"teacher={type(teacher).__name__} lacks members of a teacher; derive it from opd_lightning.teachers.BaseTeacher."
        )
    if teacher is None and writes:
        raise ValueError("teacher=none, but rollout lets a teacher write; choose teacher=external, or rollout=student.")
    if writes and not teacher.writes:
        kind = type(getattr(teacher, "weights", teacher)).__name__
        raise ValueError(f"rollout lets the teacher write, and {kind} can only score; choose teacher=frozen, ema or external.")
    needed = getattr(chosen.rollout, "requires", None)
    if writes and needed is not None and needed not in teacher.provides:
        raise ValueError(
            f"rollout={type(chosen.rollout).__name__} reads {PROVIDED[needed]} of the teacher; choose another teacher."
        )
    if writes and teacher.context.needs_rollouts:
        raise ValueError(
            "rollout lets the teacher write, and its context waits for the student's attempts; choose rollout=student_group, "
            "or context=demonstration."
        )
    if teacher is None and "teacher" in chosen.reads:
        raise ValueError("teacher=none, but loss.gate or loss.weight reads a teacher; choose teacher=external, or another one.")
    if not loss["divergence"]:
        return
    if teacher is None:
        raise ValueError(
            "teacher=none, but loss.divergence reads a teacher; choose teacher=external, or teacher=frozen with a context."
        )
    check_provides(teacher, chosen.support)
    if unread := next((part for part in teacher.parts if part.context.privileged and not part.reads_context), None):
        raise ValueError(
            f"teacher={type(unread).__name__} scores without reading its context; choose context=none, or set "
            "reads_context = True in the class if it does."
        )
    if loss["temperature"] != 1 and "full" not in teacher.provides:
        raise ValueError(f"loss.temperature={loss['temperature']} needs a teacher of the whole vocabulary; use 1.")
    other_signal = any(loss[name] and loss["coefficients"].get(name) != 0 for name in ("policy_gradient", "cross_entropy"))
    informed = other_signal or any(part.context.privileged for part in teacher.parts)
    if cfg["teacher"].get("path") == cfg["model"]["path"] and not cfg["init_from_run"] and not informed:
        raise ValueError(
            f"teacher.path={cfg['teacher']['path']} is the student's own start model, so the gradient is zero by "
            "construction; choose another teacher.path, or context=demonstration."
        )
    if teacher.self_teacher and not informed:
        raise ValueError(
            "context=none gives a self-teacher nothing that the student lacks, so its gradient is zero by "
            "construction; choose context=demonstration, or teacher=external teacher.path=<model>."
        )


def check_start(cfg: DictConfig, chosen: Choices) -> list[str]:
    """A warning if a model option's teacher would teach another model than its own because nobody chose a teacher.

    Raises:
        ValueError: it is the embedded world's, which has no use for another model.
    """
    path, reads = inherited_teacher(cfg), cfg.loss.divergence is not None or "teacher" in chosen.rollout.teachers
    if path is None or not reads:
        return []
    if path.startswith(EMBEDDED):
        raise ValueError(
            f"teacher.path is still that of the embedded model, and model.path={cfg.model.path} is another model; give "
            "teacher.path=<folder, hub id or run>, or choose a method without another model (method=sdft, sft or grpo)."
        )
    return [
        f"teacher.path={path} comes with the option of model=, and model.path={cfg.model.path} is another model; give "
        "teacher.path=<folder, hub id or run>, the same if it is meant."
    ]


def inherited_teacher(cfg: DictConfig) -> str | None:
    """The teacher's path that came with a model option beside another `model.path`; None where it belongs or was chosen."""
    tree: Any = OmegaConf.to_container(cfg)  # unresolved, so that a path that was set differs from the option's
    own, teacher = str(tree["model"]["path"]), str(tree["model"].get("teacher"))
    follows = any(value == "${model.teacher}" for _, value in leaves(tree["teacher"] or {}))
    if not follows or own.startswith(EMBEDDED) or Path(str(cfg.model.path), "config.yaml").is_file():
        return None
    options = teacher.startswith(EMBEDDED) or ("${stand_in:" in teacher and "${stand_in:" not in own)
    return str(cfg.model.teacher) if options else None


EMBEDDED = "pkg://opd_lightning/"
"""The beginning of the embedded models' paths."""

PROVIDED = {
    "full": "its whole vocabulary",
    "topk": "its most probable tokens",
    "sampled": "the written token's log-probability",
}


def check_provides(teacher: Any, support: Any) -> None:
    """Check that the teacher provides the scores that the divergence reads.

    Raises:
        ValueError: it does not.
    """
    if support.requires not in teacher.provides:
        provided = [kind for kind in PROVIDED if kind in teacher.provides]
        raise ValueError(
            f"loss/vocab_support={type(support).__name__} reads of the teacher {PROVIDED[support.requires]}, and this teacher "
            f"gives {' and '.join(PROVIDED[kind] for kind in provided)}; choose loss/vocab_support={' or '.join(provided)}, or "
            "another teacher."
        )
    k = getattr(support, "k", None)
    if support.requires == "topk" and teacher.top_k is not None and k > teacher.top_k:
        raise ValueError(
            f"loss.vocab_support.k={k} exceeds the {teacher.top_k} tokens that the teacher gives (teacher.k); lower it."
        )


def check_rollout(cfg: dict[str, Any], chosen: Choices) -> None:
    """Raises ValueError if the loss's terms cannot learn from the rollout's completions."""
    loss, rollout = cfg["loss"], chosen.rollout
    on_policy, name = rollout.on_policy, type(rollout).__name__
    if environment := cfg.get("environment"):
        takes = "environment" in parameters_of(cfg["rollout"]["_target_"])
        suite = [node["_target_"] for node in cfg["evaluation"]["suite"].values() if node]
        if not takes or not (rollout.student_writes or any("environment" in parameters_of(target) for target in suite)):
            also = ", evaluation=episodes, which plays them" if takes else ""
            raise ValueError(
                f"environment={environment['_target_']} answers the student, and rollout={name} plays no episodes; choose "
                f"rollout=student{also}, or environment=single_turn."
            )
    if loss["policy_gradient"] and not on_policy:
        raise ValueError(
            f"rollout={name} has no samples of the student's own to reward; choose rollout=student_group with "
            "loss/policy_gradient."
        )
    if loss["policy_gradient"]:
        build(loss["policy_gradient"]).advantage(torch.zeros(cfg["data"]["batch_size"], rollout.sampling.n))
    imitates = loss["cross_entropy"] and "loss/cross_entropy=unlikelihood" not in chosen.own
    if imitates and on_policy and not (loss["divergence"] or loss["policy_gradient"]):
        raise ValueError("rollout=student with cross-entropy alone imitates the student's own samples; choose rollout=dataset.")
    if chosen.own and not rollout.student_writes:
        raise ValueError(
            f"{chosen.own[0]} estimates from the student's own samples, and rollout={name} has others; choose "
            "rollout=student, rollout=mixture or loss/vocab_support=full."
        )
    if "loss/cross_entropy=unlikelihood" in chosen.own and not on_policy:
        raise ValueError(
            f"loss/cross_entropy=unlikelihood pushes down what rollout={name} has from others, too; choose student."
        )
    budget, steps = cfg["budget"]["student_tokens"], cfg["trainer"]["max_steps"]
    writes = rollout.student_writes and cfg["rollout"].get("share") != 0
    other_budgets = [name for name in ("flops", "seconds") if cfg["budget"][name] is not None]
    if budget is not None and not writes and not other_budgets and steps < 1 and not epochs_of(cfg["trainer"]):
        raise ValueError(
            f"budget.student_tokens={budget} never ends method={cfg['name']}, whose student writes nothing; set "
            "trainer.max_steps or budget.flops beside it."
        )


def check_built(tree: DictConfig) -> None:
    """Build the budget, the callbacks, and the optimizer with its schedule on one weight, to find errors early.

    Raises:
        ValueError: one cannot be built, with the target's own message.
    """
    for node in (tree.budget, *tree.callbacks.values()):
        build(node)
    optim = build(tree.optim)
    try:
        optim.build([torch.nn.Parameter(torch.zeros(1))], max(tree.trainer.max_steps, 1))
    except (ValueError, TypeError, RuntimeError) as error:
        options = ", ".join(f"{key}={value}" for key, value in tree.optim.optimizer.items() if not str(key).startswith("_"))
        raise ValueError(
            f"optim.optimizer with {options or 'no options'} and optim.schedule={optim.schedule} cannot be made "
            f"({' '.join(str(error).split())[:300]}); change them (optim.optimizer.<option>=...), or choose another schedule."
        ) from error
