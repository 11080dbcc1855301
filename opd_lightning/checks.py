"""Checks that need no model: does every node bind to its target, and do the choices make sense together?"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from transformers import SchedulerType

from opd_lightning.config import CONF_DIR, ENDLESS_SCHEDULES, build, plain
from opd_lightning.names import find, nearest

EXTRAS = {
    "rollout": {"tokenizer", "folder"},
    "teacher": {"tokenizer"},
    "reference": {"tokenizer"},
    "evaluation": {"task", "tokenizer", "model"},
    "trainer": {"logger", "callbacks", "default_root_dir"},
    "logger": {"save_dir", "id", "name"},
}
"""Arguments that the program adds to a node, by the beginning of its place in the configuration."""

KEYS = {
    "data": {"batch_size", "max_prompt_tokens", "overlong"},
    "evaluation": {"every", "suite", "answers"},
    "study": {"name", "sweep", "baseline", "lr"},
}
"""What stands in nodes that are no object's."""

NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check(cfg: DictConfig) -> list[str]:
    """Find what can be known to be wrong before anything is loaded.

    Returns:
        Warnings, one sentence each.

    Raises:
        ValueError: the field, its value and the remedy.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{missing[0]} has no default; give it ({missing[0]}=...).")
    resolved = plain(cfg)
    check_names(resolved)
    for place, node in targets(resolved):
        check_binding(place, node)
    return check_choices(resolved)


def check_names(cfg: dict[str, Any]) -> None:
    """Top-level keys are known ones, and whatever names a folder can be a folder's name on every system."""
    primary = yaml.safe_load((Path(CONF_DIR) / "config.yaml").read_text())
    groups = [next(iter(entry)).split("/")[0] for entry in primary.pop("defaults") if isinstance(entry, dict)]
    known = {*primary, *groups} - {"override hydra"}
    for key, value in cfg.items():
        if key not in known:
            raise ValueError(f"{key}={value!r} is no key of a run{nearest(key, known)}")
    for place, keys in KEYS.items():
        for key, value in cfg[place].items():
            if key not in keys:
                raise ValueError(f"{place}.{key}={value!r} is no key{nearest(key, keys)}")
    for key, value in cfg["callbacks"].items():
        if value is not None and "_target_" not in value:
            raise ValueError(f"callbacks.{key} is no callback{nearest(key, [k for k in cfg['callbacks'] if k != key])}")
    for key, value in cfg["evaluation"]["suite"].items():
        if value is not None and "_target_" not in value:
            raise ValueError(
                f"evaluation.suite.{key} has options and no evaluation: they belong to another option of evaluation=; choose "
                f"that one, or drop them (~evaluation.suite.{key})."
            )
    if cfg["evaluation"]["answers"] is not None and "_target_" not in cfg["evaluation"]["answers"]:
        raise ValueError(
            "evaluation.answers has options of another option of evaluation=; drop them (evaluation.answers=null)."
        )
    for key, value in (("name", cfg["name"]), ("study.name", cfg["study"]["name"])):
        if not NAMES.fullmatch(str(value)):
            raise ValueError(f"{key}={value!r} names a folder; use letters, digits, '.', '_' and '-' only.")


def targets(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`, and its place such as "loss.divergence"."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield place, node
        for key, value in node.items():
            yield from targets(value, f"{place}.{key}" if place else str(key))


def check_binding(place: str, node: dict[str, Any]) -> None:
    """The node's keys are parameters of its target, and none that it needs is missing."""
    try:
        target = find(node["_target_"])
    except ValueError as error:
        raise ValueError(f"{place}._target_={node['_target_']} cannot be imported ({error}).") from error
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    given = {key for key in node if not key.startswith("_")}
    extra = {name for start, names in EXTRAS.items() if f"{place}.".startswith(f"{start}.") for name in names}
    for key in given - set(parameters):
        raise ValueError(f"{place}.{key}={node[key]!r} is no option of {node['_target_']}{nearest(key, parameters)}")
    for key in given & set(parameters):
        check_type(f"{place}.{key}", node[key], parameters[key].annotation)
    if not node.get("_partial_"):
        needed = {n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
        for key in needed - given - extra:
            raise ValueError(f"{place}.{key} is missing; {node['_target_']} needs it.")


PLAIN = (int, float, bool, str, type(None))


def check_type(place: str, value: Any, annotation: Any) -> None:
    """A number is where a number is meant; annotations that are more than plain types are left to their targets."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if not all(kind in PLAIN for kind in kinds) or type(value) in kinds or (type(value) is int and float in kinds):
        return
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    if value is None:
        raise ValueError(f"{place} has no value and should be {names}; give it ({place}=...).")
    raise ValueError(f"{place}={value!r} should be {names}.")


def check_choices(cfg: dict[str, Any]) -> list[str]:
    """Choices that contradict each other, told from what the chosen classes say of themselves."""
    check_numbers(cfg)
    check_teacher(cfg)
    check_rollout(cfg)
    warnings = []
    loss, policies = cfg["loss"], parts(cfg["rollout"])
    shipped = yaml.safe_load((Path(CONF_DIR) / "config.yaml").read_text())
    if cfg["teacher"] and not loss["divergence"] and not any("teacher" in part.sources for part in policies):
        warnings.append("the teacher is not loaded, for neither loss nor rollout asks it; teacher=none says so.")
    if cfg["teacher"] and (caution := get_object(cfg["teacher"]["_target_"]).caution):
        warnings.append(caution)
    sampling = {key: cfg["rollout"].get(key) for key in ("temperature", "top_p", "top_k")}
    for name, value in loss["coefficients"].items():
        if name in loss and not loss[name] and value != shipped["loss"]["coefficients"].get(name):
            warnings.append(f"loss.coefficients.{name}={value} has no term to scale; choose one with loss/{name}=.")
    sampled = loss["divergence"] and get_object(loss["support"]["_target_"]).needs_own_samples
    estimates = [term for term in (loss["policy_gradient"], loss["support"] if sampled else None) if term]
    if any(term["sampler_cap"] is None for term in estimates) and sampling not in (
        {"temperature": loss["temperature"], "top_p": 1.0, "top_k": 0},
        dict.fromkeys(sampling),
    ):
        warnings.append(
            f"rollout samples with {sampling} and the loss reads its gradient off those samples at temperature "
            f"{loss['temperature']} over the whole vocabulary: the estimate is biased where the two differ. A sampler_cap "
            "(2.0, say) in loss.policy_gradient or loss.support corrects for it."
        )
    return warnings


def parts(node: dict[str, Any]) -> list[Any]:
    """The classes of a node and of the nodes inside it, such as a mixture's two writers."""
    return [get_object(inner["_target_"]) for _, inner in targets(node)]


def check_teacher(cfg: dict[str, Any]) -> None:
    """A divergence has a teacher, and the teacher knows something that the student does not."""
    loss, writes = cfg["loss"], any("teacher" in part.sources for part in parts(cfg["rollout"]))
    if not cfg["teacher"] and writes:
        raise ValueError("teacher=none, but rollout lets a teacher write; choose teacher=external, or rollout=student.")
    context = get_object(cfg["context"]["_target_"])
    if writes and not get_object(cfg["teacher"]["_target_"]).writes:
        raise ValueError(
            "rollout lets the teacher write, and teacher=trust_region can only score; choose teacher=frozen or teacher=ema."
        )
    if writes and context.reads_attempts:
        raise ValueError(
            "rollout lets the teacher write, and its context waits for the student's attempts; choose rollout=student_group, "
            "or context=demonstration."
        )
    if not loss["divergence"]:
        return
    if not cfg["teacher"]:
        raise ValueError(
            "teacher=none, but loss.divergence reads a teacher; choose teacher=external, or teacher=frozen with a context."
        )
    informed = context.informs
    other_signal = any(loss[name] and loss["coefficients"].get(name) != 0 for name in ("policy_gradient", "cross_entropy"))
    if cfg["teacher"].get("path") == cfg["model"]["path"] and not cfg["start_from"] and not informed and not other_signal:
        raise ValueError(
            f"teacher.path={cfg['teacher']['path']} is the student's own start model, so the gradient is zero by "
            "construction; choose another teacher.path, or context=demonstration."
        )
    if get_object(cfg["teacher"]["_target_"]).self_teacher and not informed and not other_signal:
        raise ValueError(
            "context=none gives a self-teacher nothing that the student does not see, so its gradient is zero by "
            "construction; choose context=demonstration, or teacher=external teacher.path=<model>."
        )


def check_rollout(cfg: dict[str, Any]) -> None:
    """The completions are such that the loss's terms can learn from them."""
    loss, samples = cfg["loss"], cfg["rollout"]["samples_per_prompt"]
    policies = parts(cfg["rollout"])
    own = policies[0].on_policy
    chosen = cfg["rollout"]["_target_"].rsplit(".", 1)[-1]
    if loss["policy_gradient"] and not own:
        raise ValueError(
            f"rollout={chosen} has no samples of the student's own to reward; choose rollout=student_group with "
            "loss/policy_gradient."
        )
    if loss["policy_gradient"] and samples >= 1:
        build(loss["policy_gradient"]).advantage(torch.zeros(cfg["data"]["batch_size"], samples))
    if loss["cross_entropy"] and own and not (loss["divergence"] or loss["policy_gradient"]):
        raise ValueError("rollout=student with cross-entropy alone imitates the student's own samples; choose rollout=dataset.")
    if loss["divergence"] and get_object(loss["support"]["_target_"]).needs_own_samples and not own:
        raise ValueError(
            f"loss/support=sampled estimates from the student's own samples, and rollout={chosen} has others; choose "
            "rollout=student or loss/support=full."
        )
    budget, steps = cfg["budget"]["student_tokens"], cfg["trainer"]["max_steps"]
    writes = any(part.student_writes for part in policies) and cfg["rollout"].get("share") != 0
    others = [name for name in ("flops", "seconds") if cfg["budget"][name] is not None]
    if budget is not None and not writes and not others and (steps is None or steps < 1):
        raise ValueError(
            f"budget.student_tokens={budget} never ends method={cfg['name']}, whose student writes nothing; set "
            "trainer.max_steps or budget.flops beside it."
        )


def check_numbers(cfg: dict[str, Any]) -> None:
    """Numbers that no constructor sees."""
    precision, steps = str(cfg["trainer"]["precision"]), cfg["trainer"]["max_steps"]
    if precision.startswith("16"):
        raise ValueError(f"trainer.precision={precision} needs loss scaling, which the walk does not do; use bf16-mixed.")
    check_type("trainer.max_steps", steps, int)
    budgets = [key for key in ("student_tokens", "flops", "seconds") if cfg["budget"][key] is not None]
    endless = bool(budgets) and steps == -1
    if steps is None or (steps < 1 and not endless):
        raise ValueError(
            f"trainer.max_steps={steps} must be at least 1, unless budget.student_tokens, flops or seconds end it."
        )
    updates = cfg["rollout"]["updates_per_rollout"]
    if updates >= 1 and steps > 0 and steps % updates:
        raise ValueError(f"trainer.max_steps={steps} is no multiple of rollout.updates_per_rollout={updates}; make it one.")
    schedule, schedules = cfg["optim"]["schedule"], [s.value for s in SchedulerType]
    if schedule not in schedules:
        raise ValueError(f"optim.schedule={schedule} is no schedule{nearest(schedule, schedules)}")
    if endless and schedule not in ENDLESS_SCHEDULES:
        raise ValueError(
            f"optim.schedule={schedule} needs to know its end, and budget.{budgets[0]} leaves it open; choose "
            "constant_with_warmup, or set trainer.max_steps too."
        )
    counts = {"data.batch_size": cfg["data"]["batch_size"], "chunk": cfg["chunk"]}
    for key, value in {**counts, "seed": cfg["seed"], "evaluation.every": cfg["evaluation"]["every"]}.items():
        check_type(key, value, int)
    check_type("data.max_prompt_tokens", cfg["data"]["max_prompt_tokens"], int | None)
    if cfg["data"]["overlong"] not in ("refuse", "drop"):
        raise ValueError(f"data.overlong={cfg['data']['overlong']!r} is unknown; choose refuse or drop.")
    check_type("micro_tokens", cfg["micro_tokens"], int | None)
    for key, value in (counts | {"rollout.max_new_tokens": cfg["rollout"]["max_new_tokens"]}).items():
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1.")
    if cfg["micro_tokens"] is not None and cfg["micro_tokens"] < 1:
        raise ValueError(f"micro_tokens={cfg['micro_tokens']} must be at least 1; null takes the whole batch at once.")
    if cfg["evaluation"]["every"] < 1:
        raise ValueError(f"evaluation.every={cfg['evaluation']['every']} must be at least 1; evaluation=none switches it off.")
