"""Long texts: padding costs no mask of rows x T x T, the loss's memory is flat in tokens, and the step's is linear."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_lightning.data.batching import collate
from opd_lightning.models import Pretrained, Student
from opd_lightning.rollout.base import single_turn
from opd_lightning.types import Completion, Rendered
from tests.architectures import ARCHITECTURES, config_of

ROOT = Path(__file__).parents[1]
QUICK = ("gpt2", "mistral")


def ragged() -> list:
    """Samples of prompts and completions of several lengths."""
    pairs = [([2, 3, 4], [5, 6, 7, 8, 9]), ([4], [6]), ([9, 8], [3, 2, 7])]
    return [single_turn(None, b, Rendered(p), Completion(c, "stop"), "dataset", False) for b, (p, c) in enumerate(pairs)]


def check(lm) -> None:
    """Hidden states of padded rows are those of each row alone."""
    student, cpu = Student(lm.eval()), torch.device("cpu")
    with torch.no_grad():
        together = student.hidden(collate(ragged(), 0, cpu))
        alone = torch.cat([student.hidden(collate([sample], 0, cpu)) for sample in ragged()])
    assert torch.allclose(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if not n.endswith("_vl")]
)
def test_rows_padded_on_the_right_are_read_as_if_alone(name):
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(config_of(name)))


def test_no_mask_is_made(tiny, monkeypatch):
    """sdpa would turn one into rows x T x T numbers."""
    student, seen = Student(Pretrained(tiny).model()), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(*inputs, attn_mask=None, **options):
        seen.append(attn_mask)
        return attend(*inputs, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    student.hidden(collate(ragged(), 0, torch.device("cpu")))
    assert seen == [None, None]


def peak(part: str, tokens: int) -> float:
    line = [sys.executable, "-m", "experiments.scale.memory", "--part", part, "--tokens", str(tokens)]
    return float(subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("part", ["loss", "step", "checkpointed", "padded"])
def test_memory_of_long_completions(part):
    """Of the loss flat; of the step at most in proportion to the tokens, in a batch with padding too."""
    short, long = peak(part, 2048), peak(part, 16384)
    assert long <= (2 if part == "loss" else 8) * short, (short, long)
