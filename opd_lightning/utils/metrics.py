"""StepMetrics: means and totals of a step, reduced over devices in one call. Ledger: the costs of a run."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def _wide(values: Tensor) -> Tensor:
    """To the widest float the device has (Apple's GPU has no float64)."""
    return values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)


class StepMetrics:
    """Means over tokens or completions, and totals, by name. Every device must add the same names in the same order."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Add values of any shape to a mean; `where` (same shape, boolean) selects them."""
        values = _wide(values.to(self.device))
        where = torch.ones_like(values) if where is None else _wide(where)
        self.sums[name] = self.sums.get(name, 0.0) + torch.where(where > 0, values, 0.0).sum()
        self.counts[name] = self.counts.get(name, 0.0) + where.sum()

    def total(self, name: str, value: Tensor | float) -> None:
        """Add to a sum over micro-batches and devices."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, device=self.device)
        self.totals[name] = self.totals.get(name, 0.0) + _wide(tensor).sum()

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """(means, totals) over all devices, through one call of `all_sum`; a mean over nothing is left out."""
        columns = [*self.sums.values(), *self.counts.values(), *self.totals.values()]
        values = all_sum(torch.stack(columns)).tolist()
        n = len(self.sums)
        means = {name: values[i] / values[n + i] for i, name in enumerate(self.sums) if values[n + i] > 0}
        return means, dict(zip(self.totals, values[2 * n :], strict=True))


class Ledger:
    """The costs of a run so far: tokens and FLOPs over all devices, and this process's seconds by part of a step."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time spent inside to a part; waits for the GPU."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[part] += time.perf_counter() - begun

    def add(self, totals: Mapping[str, float]) -> None:
        """A step's totals over all devices: names that end with "_tokens", and FLOPs as "flops/<part>"."""
        self.tokens.update({name: int(n) for name, n in totals.items() if name.endswith("_tokens")})
        flops = {name.split("/")[1]: int(n) for name, n in totals.items() if name.startswith("flops/")}
        self.flops.update(flops)

    def so_far(self) -> dict[str, float]:
        """The costs until now: prompt, student and teacher tokens, FLOPs and seconds of training steps, both also by part."""
        tokens = {name: float(self.tokens[name]) for name in ("prompt_tokens", "student_tokens", "teacher_tokens")}
        training = sum(s for part, s in self.seconds.items() if part != "evaluation")
        parts = {f"flops_{part}": float(n) for part, n in self.flops.items()}
        parts |= {f"seconds_{part}": seconds for part, seconds in self.seconds.items()}
        return tokens | {"flops": float(sum(self.flops.values())), "seconds": training} | parts

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The costs, for the checkpoint and for ledger.json."""
        return {"tokens": dict(self.tokens), "flops": dict(self.flops), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Restore from a checkpoint; seconds add up over interruptions."""
        self.tokens = Counter({name: int(n) for name, n in state["tokens"].items()})
        self.flops = Counter({name: int(n) for name, n in state["flops"].items()})
        self.seconds = defaultdict(float, state["seconds"])
