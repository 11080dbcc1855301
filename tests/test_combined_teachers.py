"""Teachers that combine others where these tell less than the whole vocabulary, and teachers that share weights."""

from dataclasses import replace

import pytest
import torch

from opd_lightning.config import plain
from opd_lightning.config.compatibility import Choices, check
from opd_lightning.config.overrides import configured, explain
from opd_lightning.data.batching import pack
from opd_lightning.losses import Objective
from opd_lightning.losses.divergences import forward_kl, reverse_kl
from opd_lightning.losses.targets import TopKLogProbs, TopKScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.models import Pretrained
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.teachers import (
    BaseTeacher,
    MixedTeacher,
    RoutedTeacher,
    SharedWeights,
    TopKTeacher,
    average,
    external,
    frozen,
)
from opd_lightning.teachers.base import linked
from opd_lightning.teachers.contexts import PrivilegedContext
from opd_lightning.training.run import run
from tests.test_contracts import by_autograd, by_package, close, log_probs, renderer, samples, student  # noqa: F401


class Told(BaseTeacher):
    """A remote teacher: the first ids, all alike."""

    provides = frozenset({"topk", "sampled"})

    def __init__(self, vocabulary: int = 32, k: int | None = 2, provides: str | None = None):
        super().__init__()
        self.vocabulary, self.top_k, self.provides = vocabulary, k, frozenset({provides}) if provides else self.provides

    def score(self, samples, max_tokens=None):
        n = sum(sample.trainable for sample in samples)
        top = torch.arange(self.top_k or 1).expand(n, -1)
        return TopKScores(TopKLogProbs(top, torch.full(top.shape, -2.0), torch.full((n,), -2.0)), self.vocabulary)


def coarse_kl(log_s, log_t, _):
    """Forward KL over the teacher's 4 most probable tokens and the rest."""
    top = log_t.topk(4, -1).indices
    s, t = (torch.cat([c := x.gather(-1, top), (1 - c.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_s, log_t))
    return (t.exp() * (t - s)).sum(-1)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kinds", ["unequal k", "top k and all"])
def test_a_routed_teacher_of_top_k_teachers_is_each_samples_own(student, renderer, other, narrow, kinds, gaps):  # noqa: F811
    some = samples(renderer, gaps)
    one, two = external(other), external(narrow[1])
    teacher = RoutedTeacher({"new": one if kinds == "top k and all" else TopKTeacher(one, 6), "prior": TopKTeacher(two, 4)})
    assert teacher.provides == {"topk", "sampled"} and teacher.top_k == 4
    models = {"new": Pretrained(other).model(), "prior/sort": Pretrained(narrow[1]).model()}
    with torch.no_grad():
        targets = {s.example.id: log_probs(models[s.example.skill], s) for s in some}
    exact = by_autograd(student, lambda s: targets[s.example.id], some, coarse_kl)
    assert close(by_package(student, teacher, some, forward_kl, TopK(4), renderer), exact)


@pytest.mark.parametrize("make", ["routed", "mixed", "routed of mixed"])
def test_written_tokens_of_combined_teachers_are_those_of_whole_ones(student, renderer, other, narrow, make):  # noqa: F811
    """A mixture's probability of the written token follows from those of its teachers."""

    def teacher(view):
        parts = {"new": view(external(other)), "prior": view(external(narrow[1]))}
        if make == "routed":
            return RoutedTeacher(parts)
        mixed = MixedTeacher(parts, {"new": 3.0, "prior": 1.0})
        return mixed if make == "mixed" else RoutedTeacher({"new": mixed, "prior": view(external(other))})

    some, cut = samples(renderer, gaps=True), teacher(lambda whole: TopKTeacher(whole, 3))
    assert cut.provides == ({"topk", "sampled"} if make == "routed" else {"sampled"})
    exact = by_package(student, teacher(lambda whole: whole), some, reverse_kl, SampledToken(), renderer)
    assert close(by_package(student, cut, some, reverse_kl, SampledToken(), renderer), exact)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MixedTeacher({"a": TopKTeacher(frozen(), 2), "b": frozen()}, space="log"), "whole vocabulary .* a gives less"),
        (lambda: MixedTeacher({"a": Told(provides="topk")}), "a gives less, from which no distribution .*teacher=routed"),
        (lambda: RoutedTeacher({"a": Told(provides="topk"), "b": Told(provides="sampled")}), "no kind of target in common"),
        (lambda: RoutedTeacher({"a": frozen(), "b": Told(k=None)}), "teachers.b does not say how many tokens .*top_k"),
        (lambda: TopKTeacher(SharedWeights("teacher"), 2), "of=teacher is no teacher .*there is no other"),
        (lambda: MixedTeacher({"a": frozen(), "b": SharedWeights("c")}), r"teacher.teachers.b.of=c is no teacher .* a\."),
        (lambda: linked({"reference": SharedWeights("teacher"), "teacher": Told()}), "reference.of=teacher has no single set"),
        (lambda: SharedWeights("teacher").setup(None, None), "of=teacher names a teacher that is not here"),
    ],
)
def test_combinations_that_are_not_defined_are_refused_when_built(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("make", [RoutedTeacher, MixedTeacher])
def test_teachers_of_few_tokens_have_the_same_words(student, renderer, make):  # noqa: F811
    """A probability of the top k alone cannot be renormalised to the words of another teacher."""
    teacher = make({"new": Told(), "prior": Told(vocabulary=20)})
    teacher.setup(student, renderer)
    with pytest.raises(ValueError, match="differ in the tokens that they have"):
        teacher.score(samples(renderer))


SELF = ["method=opsd", "loss/vocab_support=topk"]
START = "context@teacher.teachers.start.context"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "informed"),
    [
        ([*SELF, "teacher=topk", "teacher@teacher.teacher=frozen"], [True]),
        ([*SELF, "teacher=routed", "teacher@teacher.teachers.prior=topk", "teacher@teacher.teachers.new=ema"], [True, True]),
        (["method=opsd", "teacher=mixed", "teacher@teacher.teachers.strong=ema"], [True, True]),
        (["method=opsd", "teacher=mixed", "context=none", f"+{START}=solution"], [False, True]),
        pytest.param(["method=opsd", "teacher=mixed", f"+{START}=none"], [True, False], marks=pytest.mark.slow),
    ],
)
def test_a_self_teacher_is_combined_from_the_command_line(overrides, informed):
    """`context=` is of all its teachers; one may have its own."""
    cfg = configured(overrides)
    assert check(cfg) == []
    assert [part.context.privileged for part in Choices.of(plain(cfg)).teacher.parts] == informed


def test_a_part_that_is_not_there_is_refused():
    line = ["teacher=routed", "teacher@teacher.teachers.prior=topk"]
    assert explain([*line, "teacher.teachers.prior.k=8"]) is None
    assert "teacher.teachers.prior.rate" in (explain([*line, "teacher.teachers.prior.rate=8"]) or "")
    assert "no option of teacher" in (explain([*line[:1], "teacher@teacher.teachers.prior=topp"]) or "")


@pytest.mark.slow
def test_a_run_of_routed_self_teachers_of_few_tokens(small):
    line = [*SELF, "teacher=routed", "teacher.default=new", "loss.vocab_support.k=8", "evaluation=none"]
    line += ["teacher@teacher.teachers.new=topk", "teacher@teacher.teachers.new.teacher=frozen"]
    row = read_csv(run(small(*line)) / "metrics.csv")[-1]
    assert row["train/loss"] > 0 and row["train/forward_kl_topk"] > 0 and "train/forward_kl" not in row


# One teacher, two contexts


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The paths of the models that are loaded."""
    found, load = [], Pretrained.model
    monkeypatch.setattr(Pretrained, "model", lambda self: found.append(self.path) or load(self))
    return found


QUOTE = PrivilegedContext("solution", "{prompt} [ {solution} ]")


def solved(renderer):  # noqa: F811
    """The samples, whose examples have solutions."""
    return [replace(s, example=replace(s.example, solution="7 8 9")) for s in samples(renderer)]


def test_a_teacher_is_read_twice_and_loaded_once(student, renderer, other, loads):  # noqa: F811
    some = solved(renderer)
    teachers = linked({"reference": SharedWeights("teacher"), "teacher": TopKTeacher(external(other, context=QUOTE), 4)})
    for teacher in teachers.values():
        teacher.setup(student, renderer)
    whole = teachers["reference"].score(some).chunk(slice(None)).logits.log_softmax(-1)
    quoted = teachers["teacher"].score(some).chunk(slice(None))
    assert loads == [other] and teachers["reference"].source is teachers["teacher"].parts[0].source
    lm = Pretrained(other).model().eval()
    with torch.no_grad():
        own = torch.cat([log_probs(lm, s) for s in some])
        chats = [renderer.render(QUOTE(s.example)).token_ids for s in some]
        ids = [torch.cat([torch.tensor(chat), s.token_ids[s.prompt_length :]]) for chat, s in zip(chats, some, strict=True)]
        shown = torch.cat(
            [lm(input_ids=i[None]).logits[0, len(c) - 1 : -1].log_softmax(-1) for c, i in zip(chats, ids, strict=True)]
        )
    assert torch.allclose(whole, own, atol=1e-5) and torch.allclose(quoted.logprobs, shown.topk(4, -1).values, atol=1e-5)
    assert (own - shown).abs().max() > 0.1


def test_the_owner_of_shared_weights_updates_and_saves_them(student, renderer):  # noqa: F811
    teacher = MixedTeacher({"plain": SharedWeights("quoted"), "quoted": average(0.5, context=QUOTE)})
    teacher.setup(student, renderer)
    teacher.after_update()
    assert teacher.teachers["quoted"].weights.updates == 1 and [part.shares_weights for part in teacher.parts] == [True, False]
    state = teacher.state_dict()
    assert state["plain"] == {} and state["quoted"]["updates"] == 1
    teacher.load_state_dict(state)
    assert teacher.footprint(type("Start", (), {"adapted": False, "trained": 5, "layers": 3})()) == 20


@pytest.mark.slow
def test_a_run_whose_reference_is_its_teacher(small, other, loads):
    folder = run(small("method=opd", "context=solution", "loss/reference=reverse_kl", "reference=teacher", "evaluation=none"))
    row = read_csv(folder / "metrics.csv")[-1]
    assert loads.count(other) == 1 and row["train/reference_kl"] > 0 and row["train/reference_kl"] != row["train/reverse_kl"]
    with pytest.raises(ValueError, match=r"reference\.of=teacher is no teacher with weights that is loaded"):
        run(small("method=sft_kl", "reference=teacher", "name=alone"))


def contrast(log_s, targets, tokens):
    """How much the context says of the written token."""
    written = [targets[name].log_p.gather(-1, tokens.ids[:, None]).squeeze(-1) for name in ("teacher", "reference")]
    return (written[0] - written[1]).abs()


contrast.reads_teachers = {"reference"}


def test_a_gate_compares_a_teacher_with_and_without_its_context(student, renderer, other):  # noqa: F811
    """Without a term of the reference's own."""
    objective = Objective(completion_mask, token_mean, divergence=reverse_kl, vocab_support=FullVocabulary(), gate=contrast)
    assert objective.teachers == {"teacher", "reference"} and objective.requires == dict.fromkeys(objective.teachers, "full")
    some = solved(renderer)
    teachers = linked({"reference": SharedWeights("teacher"), "teacher": external(other, context=QUOTE)})
    for teacher in teachers.values():
        teacher.setup(student, renderer)
    logits = torch.cat([log_probs(student.lm, s) for s in some])
    targets = {name: teacher.score(some).chunk(slice(None)) for name, teacher in teachers.items()}
    tokens = pack(some, torch.device("cpu"))
    loss, stats = objective(logits, targets, tokens)
    seen = {name: target.log_probs(1.0) for name, target in targets.items()}
    assert torch.allclose(stats["gate"], contrast(None, seen, tokens)) and stats["gate"].max() > 0.1
    exact = stats["gate"] * (logits.exp() * (logits - seen["teacher"].log_p)).sum(-1)
    assert torch.allclose(loss, exact, atol=1e-5)
