"""callbacks=estimators where a divergence is no sum over tokens, and with teachers that have another tokenizer."""

import logging
import re

import pytest

from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.training.run import run

PANEL = ("callbacks=estimators", "callbacks.estimators.every=2", "callbacks.estimators.draws=2", "evaluation=none")


def compared(folder) -> set[str]:
    """The estimators that a run has numbers of."""
    names = {name for row in read_csv(folder / "metrics.csv") for name in row if name.startswith("estimators/")}
    return {name.split("/")[1] for name in names}


@pytest.mark.parametrize(
    ("options", "found", "sentence"),
    [
        (("loss/divergence=entropy_aware",), {"top1", "top4", "top16"}, "leaves sampled tokens out: loss.divergence is no sum"),
        pytest.param(
            ("teacher=topk", "loss/vocab_support=topk"), set(), "compares nothing: .* whole vocabulary", marks=pytest.mark.slow
        ),
        pytest.param(("loss/divergence=interpolated",), {"top1", "top4", "top16"}, "leaves sampled", marks=pytest.mark.slow),
        pytest.param(("method=grpo", "teacher=none"), set(), "compares nothing: the loss has no div", marks=pytest.mark.slow),
    ],
)
def test_what_is_no_sum_over_tokens_is_left_out(small, options, found, sentence, caplog):
    with caplog.at_level(logging.WARNING):
        assert compared(run(small("method=opd", *options, *PANEL))) == found
    assert [record for record in caplog.records if re.search(sentence, record.getMessage())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("teacher.alignment=uld", "loss/divergence=total_variation"), set()),
        (("teacher.alignment=spans", "loss/vocab_support=sampled"), set()),
        ((), {"top1", "top4", "sampled", "sampled_baseline"}),  # 13 shared tokens and the rest
    ],
)
def test_another_tokenizer(small, paths, options, found):
    assert compared(run(small(f"teacher.path={paths['byte_bpe']}", *options, *PANEL))) == found
