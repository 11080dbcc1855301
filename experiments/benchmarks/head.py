"""Time and peak memory of a distillation loss from hidden states to gradients, several ways in one run.

    python experiments/benchmarks/head.py --tokens 512 --hidden 576 --vocab 49152

matmul: the bare products that no exact loss can avoid (two projections, two gradients); naive: full logits and autograd; ours:
the head with diagnostics on, by its closed form; ours_generic: the same through autograd on each chunk; trl: the function of
TRL 1.16.0, where it is installed, with its own chunks (`--chunk` is for the others; on a CPU it does without its Triton
kernels). One JSON line each; ratios are medians of rounds in which the ways take turns. Peak memory is measured in a process
of its own: resident memory (allocated memory on a GPU) above that of inputs and gradients.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import kl_div, linear, log_softmax

from opd_lightning.losses import Head, Objective, head_loss
from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.types import Tokens

DIVERGENCES = {"forward_kl": (forward_kl, 0.0), "reverse_kl": (reverse_kl, 1.0), "jsd": (jsd, 0.5)}


def inputs(a: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of student and teacher; the student's take gradients."""
    generator = torch.Generator(a.device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=a.device).to(getattr(torch, a.dtype))  # noqa: E731
    scale = a.hidden**-0.5
    student, head = draw(a.tokens, a.hidden), draw(a.vocab, a.hidden) * scale
    return student.requires_grad_(), head.requires_grad_(), draw(a.tokens, a.hidden), draw(a.vocab, a.hidden) * scale


def ways(a: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What is timed, by name: each leaves gradients on the student's hidden states and head."""
    h, w, ht, wt = inputs(a)
    divergence, beta = DIVERGENCES[a.divergence]
    zeros = torch.zeros(a.tokens, dtype=torch.long, device=a.device)
    tokens = Tokens(zeros, zeros, torch.full((a.tokens,), 1 / a.tokens, device=a.device))
    scores = HiddenScores(ht, Head(wt).project, a.vocab)
    fast = Objective(completion_mask, token_mean, divergence, FullVocabulary())

    def generic(logits, targets, some):
        """The same loss without its closed form."""
        return fast(logits, targets, some)

    def clear() -> None:
        h.grad = w.grad = None

    def matmul() -> None:
        clear()
        with torch.no_grad():
            h.grad, w.grad = torch.empty_like(h), torch.zeros_like(w)
            for start in range(0, a.tokens, a.chunk):
                rows = slice(start, start + a.chunk)
                logits, _ = h[rows] @ w.T, ht[rows] @ wt.T
                h.grad[rows] = logits @ w
                w.grad.addmm_(logits.T, h[rows])

    def ours(loss) -> None:
        clear()
        head_loss(h, Head(w), tokens, {"teacher": scores}, loss, a.chunk)[0].backward()

    def naive() -> None:
        clear()
        log_s, log_t = log_softmax(linear(h, w).float(), -1), log_softmax(linear(ht, wt).float(), -1)
        if beta == 0.0:
            loss = kl_div(log_s, log_t, reduction="sum", log_target=True)
        elif beta == 1.0:
            loss = kl_div(log_t, log_s, reduction="sum", log_target=True)
        else:
            log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0))
            parts = [kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_s, log_t)]
            loss = 0.5 * (parts[0] + parts[1])
        (loss / a.tokens).backward()

    found = {"matmul": matmul, "ours": lambda: ours(fast), "ours_generic": lambda: ours(generic), "naive": naive}
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        return found

    def trl() -> None:
        clear()
        ChunkedDivergenceFunction.apply(h, w, None, ht, wt, None, beta)[0].mean().backward()

    return found | {"trl": trl}


def synchronise(a: argparse.Namespace) -> None:
    if a.device == "cuda":
        torch.cuda.synchronize()


def peak(a: argparse.Namespace) -> float:
    """MiB above inputs and gradients, of one way in this process."""
    way = ways(a)[a.only]
    grads = sum(
        p * torch.empty(0, dtype=getattr(torch, a.dtype)).element_size() for p in (a.tokens * a.hidden, a.vocab * a.hidden)
    )
    if a.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before - grads) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now; Linux only
    before = resident("VmRSS")
    way()
    return resident("VmHWM") - before - grads / 2**20


def resident(field: str) -> float:
    """A memory field of this process, in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("hidden", 576), ("vocab", 49152), ("chunk", 256), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--divergence", choices=list(DIVERGENCES), default="reverse_kl")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="measure the peak memory of one way, and nothing else")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.only:
        print(peak(a))
        return
    timed = ways(a)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for way in timed.values():  # warm-up
        way()
    for _ in range(a.rounds):
        for name, way in timed.items():
            synchronise(a)
            begun = time.perf_counter()
            way()
            synchronise(a)
            seconds[name].append(time.perf_counter() - begun)
    base = statistics.median(seconds["matmul"])
    for name, values in seconds.items():
        memory = subprocess.run([sys.executable, *sys.argv, "--only", name], capture_output=True, text=True, check=True).stdout
        line = {"name": name, "seconds": round(statistics.median(values), 4), "peak_mib": round(float(memory), 1)}
        line |= {"ratio_to_matmul": round(statistics.median(values) / base, 3)}
        line |= {"spread": [round(min(values) / base, 3), round(max(values) / base, 3)]}
        print(json.dumps(line), flush=True)
    sizes = {
        name: getattr(a, name) for name in ("tokens", "hidden", "vocab", "chunk", "divergence", "dtype", "device", "rounds")
    }
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }
    print(json.dumps({"sizes": sizes, "machine": machine}))


if __name__ == "__main__":
    main()
