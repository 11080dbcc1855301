"""The parts of run.py, one per process: python -m experiments.gpu.parts losses --device cpu --small --out <folder>."""

import argparse
import csv
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from experiments.gpu.models import save_models
from opd_lightning.config import compose
from opd_lightning.losses import Head, Objective, head_loss
from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.preflight.examine import examine
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.training.run import run
from opd_lightning.types import Tokens

GIB = 2**30


def tell(what: str, value: float | str, limit: str = "", holds: bool | None = None) -> None:
    """Print a row of the results."""
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print("ROW " + json.dumps({"what": what, "value": shown, "limit": limit, "holds": holds}), flush=True)


def at_most(what: str, value: float, most: float) -> None:
    """Print a number that should not exceed another."""
    tell(what, value, f"at most {most:g}", value <= most)


# --- losses


def gradients(divergence: Any, device: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> list[torch.Tensor]:
    """The loss and its gradients, of the same numbers on any device."""
    tokens, hidden, vocabulary = sizes
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    h, w, ht = draw(tokens, hidden), draw(vocabulary, hidden) * hidden**-0.5, draw(tokens, hidden)
    wt = draw(vocabulary, hidden) * hidden**-0.5
    h.requires_grad_()
    w.requires_grad_()
    zeros = torch.zeros(tokens, dtype=torch.long, device=device)
    some = Tokens(zeros, zeros, torch.full((tokens,), 1 / tokens, device=device))
    objective = Objective(completion_mask, token_mean, divergence, FullVocabulary())
    loss, _ = head_loss(h, Head(w), some, {"teacher": HiddenScores(ht, Head(wt).project, vocabulary)}, objective, 256)
    loss.backward()
    return [x.detach().float().cpu() for x in (loss, h.grad, w.grad) if x is not None]


def losses(a: argparse.Namespace) -> None:
    """Each divergence on the device against float32 on the CPU."""
    sizes = (32, 16, 100) if a.small else (512, 576, 49152)
    for divergence in (forward_kl, reverse_kl, jsd):
        truth = gradients(divergence, "cpu", torch.float32, sizes)
        for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            found = gradients(divergence, a.device, dtype, sizes)
            worst = max(float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True))
            kind = str(dtype).removeprefix("torch.")
            at_most(f"{divergence.__name__} in {kind}: relative error of loss and gradients", worst, most)


# --- runs


def overrides(a: argparse.Namespace, *more: str, steps: int = 4) -> list[str]:
    """What all runs have in common."""
    student, teacher = save_models(a.out, a.small)
    given = {
        "model.path": student,
        "teacher.path": teacher,
        "output_dir": a.out / "runs",
        "logger": "none",
        "evaluation": "none",
        "trainer.accelerator": "gpu" if a.device == "cuda" else "cpu",
        "trainer.max_steps": steps,
        "task": "world",
        "task.n_train": 64,
        "task.n_eval": 8,
        "data.batch_size": 4 if a.small else 32,
        "task.max_new_tokens": 8 if a.small else 64,
    }
    named = {one.split("=")[0] for one in more}
    reads = not any(one in ("method=sdft", "method=sft") for one in more)
    kept = {k: v for k, v in given.items() if k not in named and (k != "teacher.path" or reads)}
    return [*(f"{k}={v}" for k, v in kept.items()), *more]


def made(a: argparse.Namespace, *more: str, steps: int = 4) -> tuple[Path, list[dict[str, float]]]:
    """A run's folder, and its rows; the run is made."""
    folder = run(compose(overrides(a, *more, steps=steps)))
    rows = [row for row in read_csv(folder / "metrics.csv") if row.get("train/loss") is not None]
    return folder, rows


def trains(a: argparse.Namespace, name: str, *more: str) -> list[dict[str, float]]:
    """A run whose losses are finite and whose gradients are not nothing."""
    begun = time.perf_counter()
    _, rows = made(a, *more)
    good = [r for r in rows if torch.isfinite(torch.tensor(r["train/loss"])) and r["train/grad_norm"] > 0]
    tell(f"{name}: updates with finite loss and a gradient", str(len(good)), "4", len(good) == 4)
    tell(f"{name}: loss, first and last", f"{rows[0]['train/loss']:.4g}, {rows[-1]['train/loss']:.4g}")
    tell(f"{name}: seconds of 4 updates, loading included", time.perf_counter() - begun)
    return rows


def bf16(a: argparse.Namespace) -> None:
    trains(a, "OPD bf16-mixed", "method=opd", "trainer.precision=bf16-mixed")


def lora(a: argparse.Namespace) -> None:
    trains(a, "SDFT LoRA bf16-mixed", "method=sdft", "adapter=lora", "optim.lr=1e-3", "trainer.precision=bf16-mixed")


def fsdp2(a: argparse.Namespace) -> None:
    """FSDP2 on one device against one device without it, on given completions."""
    states = []
    for more in ([], ["trainer=fsdp2", "trainer.devices=1"]):
        folder, _ = made(
            a, "method=kd", "trainer.precision=32-true", *more, f"study.name={'fsdp2' if more else 'one'}", steps=3
        )
        states.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"])
    one, two = states
    at_most("greatest difference of weights after 3 updates", max(float((one[k] - two[k]).abs().max()) for k in one), 2e-6)


def memory(a: argparse.Namespace) -> None:
    """The peak of a run beside what `check` estimates."""
    more = ["method=opd", "trainer.precision=bf16-mixed", "max_tokens_per_microbatch=null", "study.name=memory"]
    lines = [one.text for one in examine(compose(overrides(a, *more)), fast=True) if one.name.startswith("memory")]
    told = next((re.search(r"about ([\d.e+-]+) GiB", line) for line in lines if "GiB" in line), None)
    before = resident("VmRSS")  # the run sets the peak back to what is resident
    if a.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    made(a, *more, steps=2)
    peak = torch.cuda.max_memory_allocated() / GIB if a.device == "cuda" else resident("VmHWM") - before
    tell("peak of 2 updates, GiB", peak)
    if told is None:
        tell("estimate of `check`", "none: " + "; ".join(lines))
        return
    ratio = float(told[1]) / peak if peak else float("inf")
    tell("estimate of `check`, GiB", float(told[1]))
    tell("estimate / peak", ratio, "0.8 to 1.2 at full sizes", None if a.small else 0.8 <= ratio <= 1.2)


def resident(field: str) -> float:
    """This process's resident memory in GiB: now (VmRSS), or its peak (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 2**20


def step(a: argparse.Namespace) -> None:
    """The step benchmark, ours alone."""
    student, teacher = save_models(a.out, a.small)
    sizes = ("--prompts", "2", "--new", "4", "--steps", "1") if a.small else ("--prompts", "32", "--new", "256", "--steps", "3")
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "step.py"
    results = a.out / "step.csv"
    given = ["--model", student, "--teacher", teacher, "--device", a.device, "--results", str(results), "--verbose"]
    subprocess.run([sys.executable, str(script), *given, *sizes, "--dtypes", "bfloat16"], check=True)
    with results.open() as file:
        tell_steps(csv.DictReader(file))


def tell_steps(rows: Iterable[dict[str, str]]) -> None:
    """Print the benchmark's results; of the unavoidable seconds, which are predicted, there is no rate and no peak."""
    for row in rows:
        parts = ", ".join(f"{name} {row[name]}" for name in ("rollout", "score", "update"))
        tell(f"{row['way']}: seconds of a step ({row['work'].partition(', ')[2]})", f"{row['seconds']} ({parts})")
        if row["tokens_per_second"]:
            tell(f"{row['way']}: tokens per second; peak MiB", f"{row['tokens_per_second']}; {row['peak_mib']}")


def vllm(a: argparse.Namespace) -> None:
    if importlib.util.find_spec("vllm") is None:
        tell("vLLM", "is not installed")
        return
    trains(a, "OPD, rollouts by vLLM", "method=opd", "generator=vllm", "generator.options.gpu_memory_utilization=0.3")


FUNCTIONS: dict[str, Callable[[argparse.Namespace], None]] = {f.__name__: f for f in (losses, bf16, lora, fsdp2, memory)}
FUNCTIONS |= {"step": step, "vllm": vllm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(FUNCTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    FUNCTIONS[a.part](a)


if __name__ == "__main__":
    main()
