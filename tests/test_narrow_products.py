"""The bfloat16 check: differences in closed form, advice where bfloat16 agrees, a warning where it does not."""

from types import SimpleNamespace

import pytest
import torch

from opd_lightning.check import examine
from opd_lightning.config import compose
from opd_lightning.preflight import narrow
from opd_lightning.preflight.narrow import differences, nll

pytestmark = pytest.mark.skipif(not narrow.has_bfloat16(torch.device("cpu")), reason="no bfloat16 here")


class Fixed:
    """A student whose logits are given; in bfloat16 they are multiplied by a factor."""

    def __init__(self, logits, factor):
        self.logits, self.factor, self.lm = logits, factor, SimpleNamespace(device=torch.device("cpu"))

    def read(self, batches):
        factor = self.factor if torch.is_autocast_enabled("cpu") else 1.0
        return SimpleNamespace(hidden=self.logits[batches[0].column] * factor, project=lambda hidden: hidden)


def test_differences_in_closed_form():
    logits, ids = torch.randn(5, 7, dtype=torch.float64), [3, 1, 4, 1]
    p, q = logits[:4].log_softmax(-1), (2 * logits[:4]).log_softmax(-1)
    following = torch.tensor(ids[1:])
    exact, other = (-float(x[:3].gather(1, following[:, None]).sum()) for x in (p, q))
    loss, kl = differences(Fixed(logits, 2.0), [ids])
    assert loss == pytest.approx(abs(other / exact - 1)) and kl == pytest.approx(float((p.exp() * (p - q)).sum()) / 4)
    assert differences(Fixed(logits, 1.0), [ids]) == (0.0, 0.0)
    assert nll(p[:1], torch.tensor([[2]])) == 0.0


@pytest.mark.parametrize(
    ("chosen", "bound"),
    [("32-true", 0.02), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bf16-mixed", 0.0), ("bf16-mixed", 0.02)))],
)
def test_the_check_advises(monkeypatch, chosen, bound):
    monkeypatch.setattr(narrow, "BOUND", bound)
    found = {result.name: result for result in examine(compose(["method=grpo", "logger=none", f"trainer.precision={chosen}"]))}
    result = found["bfloat16"]
    assert ("times as long" in result.text) == (bound > 0)
    assert result.state == ("warn" if bound == 0 and chosen == "bf16-mixed" else "pass")
