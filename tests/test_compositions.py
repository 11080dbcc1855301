"""Which paper is which composition: every row composes, binds and trains, or says why it stays out.

The rows are those that no composition could express in November 2026. `shown_by` names the test of the part that a row adds.
"""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from opd_lightning.config import compose
from opd_lightning.config.compatibility import check
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.step.scoring import Scoring
from opd_lightning.training.run import run
from opd_lightning.types import Verdict


class Row(NamedTuple):
    """A paper, its composition, and the test of its part."""

    overrides: str
    shown_by: str


SEEING = "tests.test_seeing."
SOLUTION = "teacher=frozen context=solution"
LAMBDA = "loss.coefficients.divergence=1.25 loss.coefficients.reference=-0.25"
ROUTED = "+teacher@teacher.teachers.math=frozen teacher.default=prior"
RISING = "loss.coefficients.divergence={_target_: opd_lightning.losses.schedules.Linear, start: 1.0, end: 0.1, steps: 100}"
CONTRAST = "reference=contrast loss/gate=evidence loss.gate.to=reference"
UNLIKELY = "loss/weight=ranked loss.weight.by=student_logprob loss.weight.lowest=true loss.weight.keep=0.2"

COMPOSITIONS = {
    "IW-OPD 2606.22600": Row(
        "method=opd_sampled loss/weight=by_prefix_gap", SEEING + "test_the_prefix_weight_falls_with_the_gap_so_far"
    ),
    "TIP 2604.14084": Row(
        "method=opd loss/weight=important",
        SEEING + "test_ranks_are_within_completions_and_tip_takes_uncertain_or_contradicted_tokens",
    ),
    "PACED 2603.11178": Row(
        "method=opd rollout=student_group loss/weight=by_pass_rate", SEEING + "test_pass_rates_weigh_prompts"
    ),
    "SCOPE 2604.10688": Row(
        "method=opd_sampled rollout=student_group loss/cross_entropy=nll loss/gate=by_verdict "
        "loss.gate.wrong={cross_entropy: 0.0} loss/weight=by_perplexity loss/aggregate=sequence_sum",
        SEEING + "test_perplexity_weights_are_scopes",
    ),
    "SDAR 2605.15155": Row(
        f"method=grpo {SOLUTION} loss/cross_entropy=nll loss.coefficients.cross_entropy=0.1 loss/gate=confident "
        "loss.gate.term=cross_entropy",
        SEEING + "test_gates_of_scores_by_hand",
    ),
    "SRPO 2604.02288": Row(
        "method=grpo_opd teacher=ema_fast context=sibling loss/gate=by_verdict loss.gate.untaught={divergence: 0.0}",
        SEEING + "test_verdicts_route_terms",
    ),
    "HDPO 2603.23871": Row(
        f"method=grpo_opd {SOLUTION} loss/divergence=jsd loss/gate=by_pass_rate", SEEING + "test_verdicts_route_terms"
    ),
    "RLSD 2604.03128": Row(f"method=grpo {SOLUTION} loss/gate=evidence", SEEING + "test_gates_of_scores_by_hand"),
    "RLCSD 2606.11709": Row(
        f"method=grpo teacher=frozen context=sibling {CONTRAST}", "tests.test_readings.test_a_wrong_sibling_is_shown_on_request"
    ),
    "contrast of two readings": Row(
        "method=opd teacher=mixed teacher.space=log teacher.weights={strong: 1.5, start: -0.5}",
        "tests.test_readings.test_a_negative_weight_contrasts_two_readings",
    ),
    "MOPD 2606.30406": Row(
        f"method=opd_sampled teacher=routed {ROUTED}",
        "tests.test_readings.test_routed_teachers_are_logged_by_name",
    ),
    "ExOPD 2602.12125": Row(
        f"method=opd loss/reference=reverse_kl {LAMBDA}",
        SEEING + "test_beyond_the_teacher_the_minimum_is_the_extrapolated_distribution",
    ),
    "REOPOLD 2603.11137": Row(
        "method=opd_sampled loss/vocab_support=sampled_clipped loss/weight=ranked rollout.num_iterations=2",
        SEEING + "test_the_cost_limit_is_a_floor_of_the_reward",
    ),
    "opd_sampled on a mixture": Row(
        "method=opd_sampled rollout=mixture loss/cross_entropy=nll loss/gate=by_source",
        "tests.test_readings.test_a_sampled_divergence_on_a_mixture_is_of_the_students_tokens",
    ),
    "student top k and a sampled tail": Row(
        "method=opd loss/vocab_support=topk_sampled", SEEING + "test_top_k_with_a_sampled_tail_is_unbiased"
    ),
    "served top k and a sampled tail": Row(
        "method=opd teacher=topk loss/vocab_support=topk_sampled loss.vocab_support.of=teacher",
        SEEING + "test_a_servers_top_k_suffices_for_a_sampled_tail",
    ),
    "MiniLLM 2306.08543": Row(
        "method=opd loss/returns=discounted loss.returns.length_normalized=true",
        SEEING + "test_returns_give_the_gradient_of_the_divergence_of_whole_completions",
    ),
    "discounted returns (Thinking Machines)": Row(
        "method=opd_sampled loss/returns=discounted loss.returns.discount=0.9",
        SEEING + "test_returns_discount_and_stay_within_completions",
    ),
    "TOP-D 2607.04751": Row(
        "method=opd loss/divergence=skew_reverse_kl loss/returns=discounted",
        SEEING + "test_returns_give_the_gradient_of_the_divergence_of_whole_completions",
    ),
    "TAID 2501.16937": Row(
        "method=opd loss/divergence=interpolated",
        SEEING + "test_the_interpolated_target_moves_from_the_student_to_the_teacher",
    ),
    "a scheduled coefficient": Row(f"method=grpo_opd|{RISING}", SEEING + "test_schedules_are_functions_of_the_step"),
    "OPSA 2608.31046": Row(
        f"loss/divergence=none teacher=none loss/cross_entropy=unlikelihood {UNLIKELY}",
        SEEING + "test_unlikelihood_pushes_down_until_its_clip",
    ),
    "a shuffled teacher": Row(
        "method=opd teacher=shuffled", "tests.test_readings.test_a_shuffled_teacher_moves_every_target_within_its_completion"
    ),
    "DFT 2508.05629": Row("method=sft loss/gate=own_probability", SEEING + "test_gates_of_scores_by_hand"),
    "entropy gates": Row("method=opd loss/gate=entropy loss.gate.most=3", SEEING + "test_gates_of_scores_by_hand"),
    "shared tokens (GOLD, KDFlow)": Row(
        "method=opd teacher.alignment=shared loss/divergence=jsd",
        "tests.test_aligned_teacher.test_gradients_against_a_plain_reference",
    ),
    "ULD 2402.12030": Row(
        "method=opd teacher.alignment=uld loss/divergence=total_variation",
        "tests.test_aligned_teacher.test_gradients_against_a_plain_reference",
    ),
    "spans (ALM 2503.20083, DPCA 2606.09456)": Row(
        "method=opd_sampled teacher.alignment=spans",
        "tests.test_aligned_teacher.test_the_signal_of_spans_is_unbiased_on_single_tokens_and_a_share_on_longer_ones",
    ),
    "SKD 2410.11325": Row(
        "method=opd rollout=speculative loss/divergence=forward_kl",
        "tests.test_readings.test_a_speculative_rollout_replaces_what_the_teacher_would_not_write",
    ),
}

LEFT_OUT = {
    "DASD 2601.09088": "it filters a data set of teacher completions before training; store the chosen ones in a table",
    "DOPD 2606.30626": "its routing reads both privileged teachers and a privileged student in four cells; a gate of one's own "
    "that returns factors for divergence and reference expresses it",
    "VA-OPD 2605.21924": "it reads degraded images, and training here reads text alone",
    "SimCT 2605.07711": "it compares short continuations of several tokens, whose probabilities cost a pass each; spans "
    "read the written one of them",
    "BLD 2604.07466": "it attaches a head over bytes to the student, which is another architecture",
    "AdaSwitch 2510.07842": "it hands over to the teacher within a completion by a running average; rollout=speculative does "
    "so by the teacher's ranks",
    "replay (DistiLLM 2402.03898)": "a buffer of completions is state that a run would save; num_iterations reuses a rollout",
    "AsyncOPD 2606.24143": "rollout.async_steps writes ahead with older weights (tests.test_overlap); its estimate by 64 draws "
    "is not here, and loss/vocab_support=topk_sampled reads a top k and one draw",
    "TCOD 2604.24005": "its limit of turns grows with the updates, and an environment's max_turns is one number",
    "Lightning OPD 2604.13010": "expressible since scores can be cached: teacher=cached rollout=recorded (tests.test_score)",
    "KETCHUP 2504.19024, GAE-OPD, CR-OPD": "they learn a value or bootstrap K steps; returns are whole sums",
    "OPRD 2606.06021, LOPD 2608.13040": "they match hidden states, which no teacher's targets carry",
    "GAD 2511.10643, OVD, OmniOPD 2606.01476": "a discriminator or judge is a reward model; a task's verifier may call one",
    "OPSDL 2604.17535": "a context of one's own shows the teacher the relevant slice (docs/extending.md)",
    "CaOPD 2604.16830": "it rewrites the confidence in a sample's text before training",
    "top-k set choices (Rethinking OPD 2604.13016)": "of=teacher and of=student are there; unions and intersections are not",
}


def words(row: Row) -> list[str]:
    """The overrides; values with spaces stand behind a bar, or in braces."""
    if "|" in row.overrides:
        return row.overrides.split("|")
    found: list[str] = []
    for word in row.overrides.split(" "):
        found.append(f"{found.pop()} {word}" if found and found[-1].count("{") > found[-1].count("}") else word)
    return found


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_row_names_a_test(name):
    module, _, test = COMPOSITIONS[name].shown_by.rpartition(".")
    assert callable(getattr(importlib.import_module(module), test))


FAST = ("SCOPE 2604.10688", "ExOPD 2602.12125", "RLCSD 2606.11709", "OPSA 2608.31046")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in COMPOSITIONS])
def test_a_composition_binds_without_a_warning(name):
    assert check(compose(words(COMPOSITIONS[name]))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_trains(name, small, paths, monkeypatch):
    """On verdicts that differ within a prompt, and with another tokenizer where an alignment is chosen."""

    def mixed(self: Scoring, samples):
        return [replace(sample, verdict=Verdict(float(b % 2))) for b, sample in enumerate(samples)]

    monkeypatch.setattr(Scoring, "judge", mixed)
    other = [f"teacher.path={paths['byte_bpe']}"] if "teacher.alignment" in COMPOSITIONS[name].overrides else []
    own = [] if "rollout.num_iterations" in COMPOSITIONS[name].overrides else ["rollout.num_iterations=2"]
    folder = run(small(*words(COMPOSITIONS[name]), "evaluation=none", "rollout.sampling.max_new_tokens=6", *own, *other))
    updates = [row for row in read_csv(folder / "metrics.csv") if row.get("train/loss") is not None]
    assert updates and all(math.isfinite(row["train/loss"]) for row in updates)
    assert any(row["train/grad_norm"] > 0 for row in updates)


def test_the_page_lists_the_compositions():
    page = (Path(__file__).resolve().parents[1] / "docs" / "papers.md").read_text()
    for name, row in COMPOSITIONS.items():
        overrides, test = row.overrides.replace("|", " "), row.shown_by.rpartition(".")[2]
        assert f"| {name} | `{overrides}` | `{test}` |" in page, name


def test_what_stays_out_has_a_reason():
    assert all(len(reason.split()) > 4 for reason in LEFT_OUT.values()) and not set(LEFT_OUT) & set(COMPOSITIONS)
