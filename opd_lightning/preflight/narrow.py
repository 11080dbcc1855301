"""The bfloat16 check: how far products in bfloat16 are from those in float32, and how much faster a step is with them."""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor

from opd_lightning.models.cost_model import Model, Rates, predicted
from opd_lightning.models.student import Student
from opd_lightning.preflight.checks import CheckResult
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.rendering import as_played
from opd_lightning.preflight.seconds import sizes_of, work_of
from opd_lightning.types import Sequences
from opd_lightning.utils.products import onednn

BOUND = 0.02
"""The relative difference of the loss, and the KL in nats per token, up to which both precisions are taken to agree."""
PROMPTS, LENGTH = 8, 64
"""Prompts that are read, and the last tokens of each that are compared."""


def bfloat16(parts: Components, cfg: DictConfig, student: Student, tentative: bool = False) -> Iterator[CheckResult]:
    """A check result on `trainer.precision=bf16-mixed`: a warning where it is chosen and differs, else advice.

    There is none for other precisions, weights that are not float32, and hardware without bfloat16.

    Args:
        tentative: whether a run would compare too, and train in float32 where both differ.
    """
    chosen, device = str(cfg.trainer.precision), student.lm.device
    if chosen not in ("32-true", "bf16-mixed") or student.lm.dtype != torch.float32 or not has_bfloat16(device):
        return
    loss, kl = differences(student, texts(parts))
    found = sentence(loss, kl)
    if not agree(loss, kl):
        state = "warn" if chosen == "bf16-mixed" and not tentative else "pass"
        end = "auto goes on in float32" if tentative else "trainer.precision=32-true is the safe choice"
        yield CheckResult("bfloat16", state, f"{found}: {end}")
        return
    work, sizes = work_of(parts, cfg, sizes_of(student.lm, cfg)), sizes_of(student.lm, cfg)
    slow, fast = (
        sum(predicted(work, Rates.measure(device, dtype, student.lm.config), Model.of(student.lm, sizes, dtype)).values())
        for dtype in (torch.float32, torch.bfloat16)
    )
    advice = f"trainer.precision=bf16-mixed takes about {fast / slow:.2g} times as long as 32-true"
    yield CheckResult("bfloat16", "pass", f"{found}: {advice}")


def agree(loss: float, kl: float) -> bool:
    """Whether both differences are within the bound; what is no number is not."""
    return loss <= BOUND and kl <= BOUND


def sentence(loss: float, kl: float) -> str:
    """Both differences in words, with the bound where one exceeds it."""
    text = f"products in bfloat16 change the loss on prompts by {loss:.2g} of it, the next token by a KL of {kl:.2g} nats"
    return text if agree(loss, kl) else f"{text}, more than {BOUND:g}"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and onednn(torch.bfloat16)


def texts(parts: Components) -> list[list[int]]:
    """Token ids of the first prompts."""
    played = as_played(parts.examples[:PROMPTS], parts.environment)
    return [list(parts.renderer.render(example.messages, example.tools).token_ids) for example in played]


def differences(student: Student, ids: list[list[int]]) -> tuple[float, float]:
    """The loss of the texts' tokens in bfloat16 over that in float32, less one, and the mean KL of the next token in nats."""
    exact, narrow, kl, count = 0.0, 0.0, 0.0, 0
    device = student.lm.device
    for text in ids:
        row = torch.tensor([text], device=device)
        wide = logprobs(student, row)
        with torch.autocast(device.type, torch.bfloat16):
            short = logprobs(student, row)
        kl += float((wide.exp() * (wide - short)).masked_fill(wide.isneginf(), 0.0).sum())
        exact, narrow = exact + nll(wide, row), narrow + nll(short, row)
        count += len(wide)
    return abs(narrow / exact - 1) if exact else 0.0, max(kl / max(count, 1), 0.0)


def logprobs(student: Student, row: Tensor) -> Tensor:
    """Log-probabilities [T, V] behind the last tokens of a text [1, L]."""
    column = torch.arange(max(row.shape[1] - LENGTH, 0), row.shape[1], device=row.device)
    scores = student.read([Sequences(row, torch.ones_like(row), torch.zeros_like(column), column)])
    return scores.project(scores.hidden).double().log_softmax(-1)


def nll(logprobs: Tensor, row: Tensor) -> float:
    """The negative log-likelihood of the tokens that follow."""
    following = row[0, 1:][-(len(logprobs) - 1) :] if len(logprobs) > 1 else row[0, :0]
    return -float(logprobs[: len(following)].gather(1, following[:, None]).sum())
