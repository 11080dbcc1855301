"""Numbers of short runs, recorded: what a change of the program's structure has to leave as it is.

    OMP_NUM_THREADS=1 python -m tests.recorded            records all cases anew, into tests/recorded/<group>.json
    OMP_NUM_THREADS=1 python -m tests.recorded sdpo grpo  those whose name holds one of the words; the others stay

tests/test_recorded.py makes the runs again and compares. A case is a list of overrides, as on the command line, and knows
the program by `compose`, `run` and `observe` alone: `observe` is the one place that follows when contracts change, and the
overrides are the one place that follows when names of options do. The recorded numbers follow neither.
"""

import contextlib
import io
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import machine
from typing import Any

import lightning as L
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.config import compose
from opd_lightning.training.run import run

RECORDED = Path(__file__).resolve().with_suffix("")
"""Where the numbers are: one file per group of cases."""

PRESETS = sorted(path.stem for path in (RECORDED.parent.parent / "conf" / "method").glob("*.yaml"))
"""Every method there is."""

DIGITS = 9
"""Significant digits that are kept: their rounding, 5e-10 relative, is far below every tolerance."""

SAME, OTHER = 1e-6, 1e-3
"""Relative tolerances: where the numbers were recorded on this kind of platform, and elsewhere.

The same platform gives the same bits, so SAME leaves room for little: a sum that is taken in another order shows, for three
updates of Adam raise its rounding to 1e-6 and more. Kernels for other instructions (AVX2, or none, in place of AVX-512) were
seen to move logged numbers and norms of changes by up to 3e-4, and no sampled token.
"""

FLOOR = 1e-3
"""Numbers below this share of their scale are compared as if they were that large.

Logged numbers are nats, ratios and shares: sums in float32 of terms of about one. However small such a sum is (the loss of a
policy gradient cancels to 1e-8, the mass outside of the top 16 is 1e-6), its rounding is that of its terms, 6e-8 each. So their
scale is the largest of the column, and at least one: less than 1e-9 is no difference with SAME, less than 1e-6 with OTHER. The
scale of one tensor's change is the change of all tensors together.
"""


RENAMED = {
    "rollout/teacher_valid": "rollout/teacher_told",
    "rollout/frac_reward_zero_std": "rollout/dead_groups",
}
"""Metrics by today's name, with the name that they were recorded by."""


def observe(trainer: L.Trainer, outputs: Any = None) -> tuple[list[list[int]], dict[str, Tensor], list[dict[str, float]]]:
    """THE ONLY FUNCTION HERE THAT MAY BE CHANGED WITH THE PROGRAM'S CONTRACTS: what is read out of a run while it goes on.

    Args:
        outputs: what the training step returned.

    Returns:
        The completions of the latest rollout as token ids, without padding (none before the first).
        The trained tensors by their name in the language model, not copied.
        All that was logged so far, a row per step; each has its "step".
    """
    module: Any = trainer.lightning_module
    logger: Any = trainer.loggers[0]
    weights = {name: p for name, p in module.student.lm.named_parameters() if p.requires_grad}
    rows = [{RENAMED.get(name, name): value for name, value in row.items()} for row in logger.rows]
    return ([] if outputs is None else [sample.completion_ids for sample in outputs["samples"]]), weights, rows


@dataclass(frozen=True)
class Case:
    """A short run.

    Attributes:
        name: unique in its group.
        group: the file that its numbers are in.
        overrides: of the command line; "{models}" is the folder that `make_models` fills.
    """

    name: str
    group: str
    overrides: tuple[str, ...]


SHARED = (
    "trainer.max_steps=3",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "data.batch_size=4",
    "logger=none",
    "evaluation=none",
    "callbacks.progress=null",
    "callbacks.checkpoint=null",  # a tenth of the time
    "callbacks.diagnostics.every=1",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",  # the first update of a warm-up has the rate 0
    "+callbacks.recorder._target_=tests.recorded.Recorder",
)
"""Of every run; a case's own come behind them and win."""

REWARDED = ("grpo", "grpo_opd", "reinforce", "rloo", "sdpo")
"""Presets that read rewards, and are to find some right and some wrong answers."""

GROUPED = tuple(preset for preset in REWARDED if preset != "reinforce")
"""Those of them that take several samples per prompt; eight are the default."""

FOUR = "rollout.samples_per_prompt=4"

QWEN = (
    "model.path={models}/student",
    "model.teacher={models}/teacher",
    "adapter=lora",
    "adapter.r=4",
    "adapter.lora_alpha=8",
    "optim.lr=1e-2",
    "task=table",
    "task/contexts=world",
    "task/verifier=function",
    "task.verifier.path=tests.recorded.score",
    "task.path={models}/rows.jsonl",
    "task.columns={prompt: prompt, completion: completion, answer: answer}",
    "task.max_new_tokens=10",  # references have eleven, so they are cut
)
"""A random Qwen3 with LoRA on a table. Not a `stand-in://qwen3`: that one's distributions are nearly uniform, which makes every
KL nearly zero, and it stays in the system's temporary folder, where another version of torch may have put it."""

LEFT_OUT: dict[str, str] = {}
"""Presets that do not run on the random Qwen3, and why."""


def world_overrides(preset: str) -> tuple[str, ...]:
    """A preset on the embedded world: rewards for skills that the start model has, at a temperature at which it errs."""
    more = ("task.train_on=prior", "rollout.temperature=2.5") if preset in REWARDED else ()
    return (f"method={preset}", *more, *([FOUR] if preset in GROUPED else []))


def qwen_overrides(preset: str) -> tuple[str, ...]:
    """A preset on the random Qwen3: rewards are shares of the answer, so a share has to do for a right sibling."""
    more = ("context.choices.sibling.solved=0.2",) if preset == "sdpo" else ()
    return (*QWEN, f"method={preset}", *more, *([FOUR] if preset in GROUPED else []))


TWICE = ("rollout.updates_per_rollout=2", "trainer.max_steps=6")
SEVERAL = ("rollout.updates_per_rollout=3", "trainer.max_steps=9")

VARIANTS: dict[str, tuple[str, ...]] = {
    # who writes
    "mixture_teacher": (
        *(*QWEN, "method=gkd", "rollout=mixture_teacher", "rollout.share=0.4", "rollout.samples_per_prompt=2"),
        *("loss/support=topk", "loss.support.k=3", "loss.divergence.beta=0.1"),
    ),
    "warped_sampling": (
        *(*QWEN, "method=opd", "rollout.temperature=1.3", "rollout.top_p=0.9", "rollout.top_k=9", "rollout.truncated=mask"),
        *("data.batch_size=8", "task.max_new_tokens=16", "loss/divergence=skew_reverse_kl"),
    ),
    # who teaches, and what it is shown
    "ema": ("method=sdft", "teacher=ema", "teacher.rate=0.5"),
    "ema_effective": (*QWEN, "method=sdft", "teacher=ema", "teacher.rate=0.5", "teacher.of=effective"),
    "ema_factors": (*QWEN, "method=sdft", "teacher=ema", "teacher.rate=0.5", "teacher.of=factors"),
    "sync": ("method=opcd", "teacher=sync", "teacher.every=3", *TWICE),
    "live": ("method=sdft", "teacher=live", *TWICE),
    "trust_region": (
        *(*QWEN, "method=opsd", "teacher=trust_region", "teacher.share=0.3", "loss/clip=positions", "loss.clip.limit=1"),
        *("loss/weight=by_position", "loss.weight.decay=0.8", "loss.weight.last=6"),
    ),
    "feedback": ("method=sdpo", "context=feedback", FOUR, "loss/divergence=forward_kl", "loss/support=full"),
    # which divergence, over which tokens, bounded and weighed how
    "topk_student": ("method=opd_topk", "loss.support.k=4", "loss.support.of=student", "loss.support.rest=renormalise"),
    "clip_entries": ("method=sdft", "loss/clip=entries", "loss/weight=skip_first", "loss.weight.n=2"),
    "entropy_aware": (
        *(*QWEN, "method=opd", "loss/divergence=entropy_aware", "loss.divergence.threshold=2.8"),
        *("loss.temperature=1.5", "loss.temperature_squared=true"),
    ),
    "total_variation": (
        *(*QWEN, "method=opd", "loss/divergence=total_variation", "loss/aggregate=sequence_mean"),
        *("loss/reference=forward_kl", "reference=external", "reference.path={models}/teacher"),
    ),
    "sampled_baseline": (
        *(*QWEN, "method=opd_sampled", "loss/support=sampled_baseline", "loss.support.sampler_cap=1.2"),
        *("rollout.temperature=1.3", *TWICE),
    ),
    "ratio_cap": (*QWEN, "method=sdpo", "context=sibling", "context.solved=0.2", FOUR, "loss.ratio_cap=1.1", *TWICE),
    # rewards, alone and among other terms
    "grpo_updates": (
        *(*QWEN, "method=grpo", FOUR, "loss/policy_gradient=clip_higher", "loss.policy_gradient.clip=0.1"),
        *("loss.policy_gradient.sampler_cap=1.5", "rollout.temperature=1.2", "micro_tokens=60", *SEVERAL),
    ),
    "dr_grpo": (
        *QWEN,
        "method=grpo",
        FOUR,
        "loss/policy_gradient=dr_grpo",
        "loss/aggregate=constant",
        "rollout.truncated=mask",
    ),
    "all_terms": (
        *(
            *QWEN,
            "method=grpo_opd",
            FOUR,
            "loss/cross_entropy=nll",
            "loss/reference=reverse_kl",
            "loss.coefficients.divergence=0.5",
        ),
        *("loss.coefficients.policy_gradient=2", "loss.coefficients.cross_entropy=0.3", "micro_tokens=60", "chunk=5"),
    ),
    "silent": ("method=grpo", FOUR),  # nothing is right in the first rollout
    # how weights move, and what else is measured
    "sgd": ("method=opd", "optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas", "optim.lr=0.1"),
    "cosine": (
        *("method=kd", "loss/divergence=skew_forward_kl", "optim.schedule=cosine", "optim.warmup_steps=1"),
        *("optim.optimizer.weight_decay=0.1", "optim.clip_norm=null"),
    ),
    "checkpointing": (*QWEN, "method=opd", "model.checkpointing=true", "adapter.lora_dropout=0.2"),
    "measured": (
        *("method=sdft", "callbacks=estimators", "callbacks.estimators.every=1", "callbacks.estimators.draws=2"),
        *("evaluation=forgetting", "evaluation.every=2", "task.n_eval=4"),
    ),
}
"""What no preset has."""


def cases() -> Iterator[Case]:
    """Every preset on both models, and variants that reach the code which no preset does."""
    for preset in PRESETS:
        yield Case(preset, "world", world_overrides(preset))
    for preset in PRESETS:
        if preset not in LEFT_OUT:
            yield Case(preset, "qwen3_lora", qwen_overrides(preset))
    for name, overrides in VARIANTS.items():
        yield Case(name, "variants", overrides)


WORDS = ("<pad>", "<eos>", *map(str, range(10)), "rotate", "result", ",", "[", "]", "=", "<unk>")
"""What the random models speak."""

TEMPLATE = (
    "{% for m in messages %}{{ '= ' if m['role'] == 'assistant' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def make_models(folder: Path) -> Path:
    """A student and a teacher, random Qwen3s, and the rows of a table; made once per folder.

    The weights come from numpy's generator, whose numbers no version of torch or transformers changes.
    """
    if (folder / "rows.jsonl").is_file():
        return folder
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([f"<{i}>" for i in range(len(WORDS), 24)])  # the models' other rows are words that no text shows
    marks = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **marks)
    sizes = dict(vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True)
    config = Qwen3Config(**sizes, **heads, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    for seed, name in ((3, "student"), (4, "teacher")):  # this student ends half of its completions
        draw, model = np.random.RandomState(seed), Qwen3ForCausalLM(config)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:  # norms stay at one
                parameter.data.copy_(torch.from_numpy(0.3 * draw.standard_normal(parameter.shape)))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw, rows = np.random.RandomState(2), []
    for digits in draw.randint(0, 10, (60, 5)).tolist():
        prompt, completion = " ".join(map(str, digits)), " , ".join(map(str, [*digits[1:], digits[0]]))
        rows.append({"prompt": f"rotate {prompt}", "completion": f"result {completion}", "answer": prompt})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def score(completion: str, answer: str) -> float:
    """A reward that random text gets something of: the share of the answer's words that it holds."""
    words = set(answer.split())
    return len(words & set(completion.split())) / len(words)


class Recorder(L.Callback):
    """Writes what `observe` sees into recorder.json in the run's folder."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The weights before the first update."""
        self.ids: list[list[list[int]]] = []
        self.start = {name: value.detach().clone() for name, value in observe(trainer)[1].items()}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: object) -> None:
        """The rollout that was learned from."""
        self.ids.append(observe(trainer, outputs)[0])

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What was logged, and how far each tensor has come: the norm of its change and the sum of it."""
        _, weights, rows = observe(trainer)
        change = {name: weights[name].detach().double() - start.double() for name, start in self.start.items()}
        moved = {name: [d.norm().item(), d.sum().item()] for name, d in change.items()}
        total = [math.hypot(*(norm for norm, _ in moved.values())), sum(s for _, s in moved.values())]
        told = {"ids": self.ids, "rows": rows, "weights": {"total": total, **moved}}
        (Path(trainer.default_root_dir) / "recorder.json").write_text(json.dumps(told))


def record(case: Case, folder: Path) -> dict[str, Any]:
    """Make a case's run and return its numbers, as they are recorded.

    Args:
        folder: for models and runs; the models are made once.
    """
    torch.set_num_threads(1)
    made, chosen = make_models(folder), {}
    for override in (*SHARED, f"output_dir={folder / case.group / case.name}", *case.overrides):
        chosen[override.partition("=")[0]] = override.replace("{models}", str(made))
    with contextlib.redirect_stdout(io.StringIO()):
        done = run(compose(list(chosen.values())))
    return compact(json.loads((done / "recorder.json").read_text()))


def compact(told: Mapping[str, Any]) -> dict[str, Any]:
    """Ids as one string per completion, logged numbers as one column per name, everything with `DIGITS` digits.

    Seconds are left out: they are no function of the configuration.
    """
    rows = told["rows"]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if "seconds" not in name]
    return {
        "ids": [[" ".join(map(str, ids)) for ids in step] for step in told["ids"]],
        "logged": {name: [rounded(row.get(name)) for row in rows] for name in names},
        "weights": {name: [rounded(value) for value in pair] for name, pair in told["weights"].items()},
    }


def rounded(value: float | None) -> float | None:
    """A number with `DIGITS` significant digits."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def platform() -> str:
    """What decides how sums are rounded: torch, the instructions it uses, the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    cpu = dict([part.strip() for part in line.split(":", 1)] for line in reversed(lines) if ":" in line)
    name = [cpu[key] for key in ("model name", "cpu family", "model") if key in cpu] or [machine()]
    return " / ".join([f"torch {torch.__version__}", torch.backends.cpu.get_cpu_capability(), *name])


def differences(told: Mapping[str, Any], found: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    """Where a run's numbers are not the recorded ones, a line each.

    Args:
        told, found: what is recorded, and what `record` returns.
        tolerance: SAME compares everything. OTHER asks for the first rollout's tokens, and for numbers while the tokens are the
            same; sums of changes are left out, for a single weight can decide them: Adam moves it by the whole rate even
            where its gradient is but rounding.
    """
    same = next((i for i, (a, b) in enumerate(zip(told["ids"], found["ids"], strict=False)) if a != b), len(told["ids"]))
    if len(told["ids"]) != len(found["ids"]) or same < (len(told["ids"]) if tolerance == SAME else 1):
        yield f"ids: {len(told['ids'])} rollouts became {len(found['ids'])}, the first {same} are the same"
    for kind in ("logged", "weights"):
        if other := set(told[kind]) ^ set(found[kind]):
            yield f"{kind}: recorded or found alone: {', '.join(sorted(other))}"
    for name in (name for name in told["logged"] if name in found["logged"]):
        a, b = told["logged"][name], found["logged"][name]
        scale = max([1.0, *(abs(value) for value in a if value is not None)])
        rows = zip(a[: same + 1], b[: same + 1], strict=False)  # the first is that of step 0
        if len(a) != len(b) or any(unlike(*row, FLOOR * scale, tolerance) for row in rows):
            yield f"{name}: {a} became {b}"
    if same == len(told["ids"]):
        yield from other_changes(told["weights"], found["weights"], tolerance)


def other_changes(told: Mapping[str, list[float]], found: Mapping[str, list[float]], tolerance: float) -> Iterator[str]:
    """Where the changes of weights are not the recorded ones: their norms, and with SAME their sums."""
    total = told["total"][0]
    for name in (name for name in told if name in found):
        (norm, moved), (other_norm, other_moved) = told[name], found[name]
        if unlike(norm, other_norm, FLOOR * total, tolerance):
            yield f"norm of the change of {name}: {norm} became {other_norm}"
        # Changes of either sign cancel in a sum, so the norm is what its rounding goes by.
        if tolerance == SAME and unlike(moved, other_moved, norm, tolerance):
            yield f"sum of the change of {name}: {moved} became {other_moved}"


def unlike(told: float | None, found: float | None, least: float, tolerance: float) -> bool:
    """Are two numbers further apart than the tolerance allows, of the recorded one or of `least` if that is larger?"""
    if told is None or found is None:
        return told is not found
    return not abs(told - found) <= tolerance * max(abs(told), least)


def load(group: str) -> dict[str, Any]:
    """What is recorded of a group: the platform that each case was recorded on, and its numbers."""
    path = RECORDED / f"{group}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def save(group: str, told: Mapping[str, Any]) -> None:
    """Write a group's file, a line per kind of number, so that a diff shows which have changed."""
    parts = {
        name: ",\n".join(f"  {json.dumps(kind)}: {json.dumps(value)}" for kind, value in case.items())
        for name, case in sorted(told.items())
    }
    RECORDED.mkdir(exist_ok=True)
    text = ",\n".join(f"{json.dumps(name)}: {{\n{part}\n }}" for name, part in parts.items())
    (RECORDED / f"{group}.json").write_text(f"{{\n{text}\n}}\n")


def main(words: Sequence[str]) -> None:
    """Record the cases whose name holds one of the words, or all."""
    chosen = [case for case in cases() if not words or any(word in case.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        for group in sorted({case.group for case in chosen}):
            mine = [case for case in chosen if case.group == group]
            found = {case.name: {"platform": platform(), **record(case, Path(folder))} for case in mine}
            save(group, (load(group) if words else {}) | found)
            print(f"{group}: {len(found)} cases, {(RECORDED / f'{group}.json').stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
