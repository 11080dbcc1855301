"""Which ids of an output layer are tokens, and which of them two models share."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opd_lightning.check import examine
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.generation.transformers import TransformersGenerator
from opd_lightning.losses import Head, head_loss
from opd_lightning.losses.divergences import forward_kl, jsd, reverse_kl
from opd_lightning.losses.objective import Objective
from opd_lightning.losses.policy_gradient import CrossEntropy
from opd_lightning.losses.shared import view
from opd_lightning.losses.targets import FullLogits, FullLogProbs, HiddenScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.models import Pretrained, Student
from opd_lightning.teachers import MixedTeacher, TopKTeacher, external
from opd_lightning.training.run import run
from opd_lightning.types import Example, Rendered, Sample, SamplingParams, Tokens
from opd_lightning.utils.vocabulary import ValidIds, differences, overlap, valid_ids_of

N, H = 6, 4
WORLD = 32
"""Tokens of the world's tokenizer."""


def saved(folder: Path, like: str, rows: int, extra: tuple[str, ...] = (), seed: int = 5, hole: str | None = None) -> str:
    """A random model with so many rows and a few tokens more than the world's, whose padded rows are the most probable."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **dict(vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        **dict(max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.3),
    )
    lm = LlamaForCausalLM(config)
    with torch.no_grad():  # on average over hidden states of either sign, padding wins
        lm.lm_head.weight[WORLD + len(extra) :] *= 10
    lm.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(like)
    tokenizer.add_tokens(list(extra))
    tokenizer.save_pretrained(folder)
    if hole is not None:
        path = folder / "tokenizer.json"
        core = json.loads(path.read_text())
        core["model"]["vocab"].pop(hole)
        path.write_text(json.dumps(core))
    return str(folder)


def student_of(path: str) -> tuple[Student, ChatRenderer]:
    model = Pretrained(path)
    renderer = ChatRenderer(model.tokenizer())
    return Student(model.model(), valid_ids=renderer.valid_ids), renderer


def sample(ids: list[int], prompt: int = 2) -> Sample:
    mask = torch.arange(len(ids)) >= prompt
    chat = [{"role": "user", "content": "rotate 1"}]
    return Sample(Example("e", chat), 0, torch.tensor(ids), mask, prompt, "student", "stop")


def test_words_are_ids_up_to_the_last_one_without_holes():
    assert ValidIds.of({"a": 0, "b": 1, "c": 4}) == ValidIds(5, (2, 3)) and ValidIds.of({"a": 0, "b": 1, "c": 4}).count == 3
    assert ValidIds(5, (2,)).intersection([ValidIds(4, (1,)), ValidIds(9, (6,))]) == ValidIds(4, (1, 2))
    assert ValidIds(5, (2,)).contains(torch.tensor([1, 2, 4, 5])).tolist() == [True, False, True, False]
    assert (
        ValidIds(5).covers(ValidIds(4, (2,)))
        and not ValidIds(5, (2,)).covers(ValidIds(4))
        and not ValidIds(3).covers(ValidIds(4))
    )


def test_an_overlap_names_what_is_left_out_and_what_is_unlike():
    same = overlap({"a": 0, "b": 1}, {"a": 0, "b": 1})
    assert same.same and same.describe() == ""
    more = overlap({"a": 0, "b": 1, "x": 2}, {"a": 0, "b": 1, "y": 3})
    assert more.shared == ValidIds(2) and more.student_only == ("x",) and more.teacher_only == ("y",)
    assert more.describe() == "1 token that only the student has ('x') and 1 token that only the teacher has ('y')"
    inside = overlap({"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 2})
    assert inside.shared == ValidIds(3, (1,)) and inside.student_only == ("b",)
    unlike = overlap({"a": 0, "b": 1}, {"a": 1, "b": 0})
    assert differences(unlike).startswith(
        "2 ids mean different tokens, such as 0 is 'a' for the student and 'b' for the teacher"
    )


@pytest.mark.parametrize("hole", [None, "red"])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_only_words_are_sampled(tmp_path, tiny, temperature, hole):
    """From a model whose padding is the most probable; log-probabilities are those among the tokens."""
    path = saved(tmp_path / "padded", tiny, WORLD + 16, hole=hole)
    student, renderer = student_of(path)
    holes = () if hole is None else (AutoTokenizer.from_pretrained(tiny).get_vocab()[hole],)
    assert renderer.valid_ids == ValidIds(WORLD, holes)
    generator = TransformersGenerator(renderer.tokenizer)
    generator.update_weights(student, 0)
    prompts = [Rendered([3 + i, 7]) for i in range(8)]
    done = generator.generate(prompts, SamplingParams(8, temperature), seed=1)
    ids = [i for completion in done for i in completion.token_ids]
    assert max(ids) < WORLD and not set(ids) & set(holes)
    if temperature:
        prompt, completion = prompts[0].token_ids, done[0]
        with student.eval_mode() as lm:
            rows = lm(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1, :WORLD]
        log_p = rows.index_fill(1, torch.tensor(holes, dtype=torch.long), -torch.inf).log_softmax(-1)
        expected = log_p.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", [(), (2,)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jsd])
def test_losses_are_over_words(divergence, softcap, absent):
    """As if the output layer had no other rows; these have no gradient, and the mass on them is logged."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias, other = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((N, H), (11, H), (11,), (11, H)))
    for x in (hidden, weight, bias):
        x.requires_grad_()
    valid_ids, kept = ValidIds(8, absent), [i for i in range(8) if i not in absent]
    tokens = Tokens(torch.arange(N) % 2, torch.arange(N), torch.ones(N))
    scores = HiddenScores(hidden.detach(), Head(other, softcap=softcap, valid_ids=valid_ids).project, 8, absent=absent)
    loss = Objective(completion_mask, token_mean, divergence, FullVocabulary())
    value, stats = head_loss(
        hidden, Head(weight, bias, softcap=softcap, valid_ids=valid_ids), tokens, {"teacher": scores}, loss, 4
    )
    cap = (lambda x: x) if softcap is None else (lambda x: softcap * torch.tanh(x / softcap))
    s, t = (cap(x)[:, kept] for x in (hidden @ weight.T + bias, hidden.detach() @ other.T))
    expected = loss(s, {"teacher": FullLogits(t)}, tokens)[0].sum()
    found, right = (torch.autograd.grad(x, (hidden, weight, bias)) for x in (value, expected))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert (found[1][8:] == 0).all() and (found[2][8:] == 0).all()
    whole = cap(hidden @ weight.T + bias).detach()
    words_and_padding = whole[:, [*kept, 8, 9, 10]].softmax(-1)
    torch.testing.assert_close(stats["padding_mass"][0], words_and_padding[0, -3:].sum())
    assert stats["padding_mass"][1:4].isnan().all()


@pytest.mark.parametrize("support", [FullVocabulary(), TopK(3), TopK(3, "student"), TopK(3, tail_bucket=False), SampledToken()])
@pytest.mark.parametrize("known", [ValidIds(7), ValidIds(9, (2, 5)), ValidIds(7, (1,))])
def test_tokens_of_the_student_alone_are_not_compared(support, known):
    """Both sides are restricted to the shared ids and renormalised, whatever the student's mass outside; that is logged."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((N, H), (9, H), (9, H)))
    weight.requires_grad_()
    kept = [i for i in range(known.size) if i not in known.absent]
    ids = torch.tensor([0, 3, 4, 6, 0, 8])
    tokens = Tokens(ids, torch.arange(N), torch.ones(N))
    scores = HiddenScores(hidden, Head(other, valid_ids=known).project, known.size, absent=known.absent)
    assert valid_ids_of(scores) == known
    loss = Objective(completion_mask, token_mean, reverse_kl, support)
    value, stats = head_loss(hidden, Head(weight), tokens, {"teacher": scores}, loss, 4)
    told = known.contains(ids)
    short = Tokens(torch.tensor([kept.index(i) if i in kept else 0 for i in ids.tolist()]), torch.arange(N), torch.ones(N))
    target = {"teacher": FullLogits((hidden @ other.T)[:, kept], told)}
    expected = loss((hidden @ weight.T)[:, kept], target, short)[0].sum()
    for a, b in zip(torch.autograd.grad(value, weight), torch.autograd.grad(expected, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert (a[[i for i in range(9) if i not in kept]] == 0).all()
    mass = 1 - (hidden @ weight.T).softmax(-1)[:, kept].sum(-1)
    torch.testing.assert_close(stats["unshared_mass"][told], mass[told].detach())


def test_other_terms_see_the_student_s_whole_distribution():
    """Cross-entropy learns a token that the teacher lacks, beside a divergence that knows nothing of it."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(torch.tensor([4, 1, 4]), torch.arange(3), torch.ones(3))
    loss = Objective(completion_mask, token_mean, reverse_kl, FullVocabulary(), cross_entropy=CrossEntropy())
    target = FullLogits(torch.zeros(3, 4), shared=ValidIds(4))
    _, stats = loss(logits, {"teacher": target}, tokens)
    torch.testing.assert_close(stats["cross_entropy_loss"], -logits.log_softmax(-1)[torch.arange(3), tokens.ids])
    assert stats["divergence_loss"].tolist()[0] == 0 and stats["divergence_loss"][1] > 0


def test_ratios_stay_those_of_the_whole_distribution():
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    log_s = logits.log_softmax(-1)
    old = log_s[:, 1] - 0.3
    tokens = Tokens(torch.tensor([1, 1]), torch.arange(2), torch.ones(2), old_logprob=old, sampler_logprob=old)
    seen = view(logits, log_s, FullLogProbs(torch.zeros(2, 4), shared=ValidIds(4)), tokens)
    torch.testing.assert_close((seen.log_s[:, 1] - seen.tokens.old_logprob).exp(), torch.full((2,), math.exp(0.3)))


def test_a_teacher_reads_up_to_the_first_word_that_it_lacks(tmp_path, tiny, other):
    """What stands before is scored as ever; the token itself and what follows is not valid, in a completion or a prompt."""
    path = saved(tmp_path / "more", tiny, WORLD + 8, ("<a>", "<b>"))
    student, renderer = student_of(path)
    teacher = external(other)
    teacher.setup(student, renderer)
    rows = [sample([3, 4, 5, 6, WORLD, 7]), sample([3, 4, 5, 6, 7])]
    scores = teacher.score(rows)
    assert scores.valid.tolist() == [True, True, False, False, True, True, True]
    assert scores.metrics["unreadable"].tolist() == [1.0, 0.0] and valid_ids_of(scores) == ValidIds(WORLD)
    torch.testing.assert_close(scores.chunk(slice(0, 2)).logits, scores.chunk(slice(4, 6)).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"a prompt holds '<a>', a token of the student's tokenizer that the teacher lacks"):
        teacher.write([Rendered([3, WORLD])], SamplingParams(2), 0, TransformersGenerator(renderer.tokenizer))
    top = TopKTeacher(external(other), 3)
    top.setup(student, renderer)
    assert top.score(rows).chunk(slice(None)).ids.max() < WORLD


def test_mixed_teachers_are_renormalised_to_what_all_have(tmp_path, tiny, other):
    path = saved(tmp_path / "more", tiny, WORLD + 8, ("<a>", "<b>"))
    student, renderer = student_of(path)
    wide, narrow = external(path), external(other)
    mixed = MixedTeacher({"wide": wide, "narrow": narrow})
    mixed.setup(student, renderer)
    rows = [sample([3, 4, 5, 6, 7])]
    scores = mixed.score(rows)
    assert valid_ids_of(scores) == ValidIds(WORLD)
    one, two = (x.score(rows).chunk(slice(None)).logits[:, :WORLD].softmax(-1) for x in (wide, narrow))
    torch.testing.assert_close(scores.chunk(slice(None)).logits.exp(), (one + two) / 2, rtol=1e-4, atol=1e-6)


def test_another_meaning_of_a_shared_id_is_refused_with_the_ids(tmp_path, tiny, other):
    path = Path(saved(tmp_path / "renamed", tiny, WORLD))
    core = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(core.replace('"red"', '"scarlet"'))
    with pytest.raises(ValueError, match=r"another tokenizer.*1 id means.*'red' for the student and 'scarlet' for the teacher"):
        external(str(path)).check_tokenizer(AutoTokenizer.from_pretrained(tiny))


def test_a_teacher_with_too_few_rows_is_refused_before_it_is_loaded(tmp_path, tiny, monkeypatch):
    path = saved(tmp_path / "short", tiny, WORLD - 4)
    student, renderer = student_of(tiny)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=r"teacher.path=.*short has 28 rows of logits.*32 of the student's tokens"):
        external(path).setup(student, renderer)


PAIRS = {
    "padded": ((WORLD + 16, ()), (WORLD, ()), None, "padded to 48: rows from 32 on are neither sampled nor compared"),
    "teacher_has_more": (
        (WORLD + 16, ()),
        (WORLD + 8, ("<a>", "<b>")),
        None,
        "2 tokens that only the teacher has ('<a>', '<b>')",
    ),
    "student_has_more": ((WORLD + 16, ("<a>", "<b>")), (WORLD, ()), "unshared_mass", "2 tokens that only the student has"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_trains_and_check_says_what_is_left_out(small, tiny, tmp_path, name, caplog):
    """A padded student samples tokens alone, so a narrower teacher can read all of it."""
    (rows, extra), (others, more), metric, told = PAIRS[name]
    mine = saved(tmp_path / "mine", tiny, rows, extra, seed=5)
    theirs = saved(tmp_path / "theirs", tiny, others, more, seed=6)
    cfg = small("method=opd", f"model.path={mine}", f"teacher.path={theirs}", "evaluation=none", "trainer.max_steps=1")
    found = examine(cfg, fast=True)
    assert told in " ".join(f.text for f in found) and "fail" not in {f.state for f in found if "token" in f.name}
    folder = run(cfg)
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "train/padding_mass" in columns and ("train/unshared_mass" in columns) == (metric is not None)
    assert ("rollout/teacher_unreadable" in columns) == (metric is not None)
    assert name == "padded" or told in caplog.text, "a warning at the start of the run"


def test_check_finds_what_a_teacher_cannot_read(small, tiny, other, tmp_path):
    """A template that writes a token which the teacher lacks, an end token that it lacks, and ids without a token."""
    holed = saved(tmp_path / "holed", tiny, WORLD + 8, hole="red")
    found = examine(small("method=opd", f"model.path={holed}", f"teacher.path={other}"), fast=True)
    assert "1 ids in between have no token" in told(found, "tokenizer", "warn")
    mine = Path(saved(tmp_path / "mine", tiny, WORLD + 8, ("<a>",)))
    cfg = small("method=opd", f"model.path={mine}", f"teacher.path={other}")
    tokenizer = AutoTokenizer.from_pretrained(mine)
    template = tokenizer.chat_template
    tokenizer.chat_template = template + "<a>"
    tokenizer.save_pretrained(mine)
    assert "they hold '<a>', which teacher lacks" in told(examine(cfg, fast=True), "teacher's tokens", "fail")
    tokenizer.chat_template, tokenizer.eos_token = template, "<a>"
    tokenizer.save_pretrained(mine)
    assert "lacks the end token '<a>'" in told(examine(cfg, fast=True), "teacher's tokens", "warn")


def told(found, name: str, state: str) -> str:
    return " ".join(f.text for f in found if (f.name, f.state) == (name, state))


def test_a_generator_that_draws_padding_is_refused(small, tiny, tmp_path, monkeypatch):
    """One that does not know of tokens, as a server may be; before its ids reach an embedding."""
    monkeypatch.setattr("opd_lightning.generation.transformers.OnlyValidIds.__call__", lambda self, ids, scores: scores)
    path = saved(tmp_path / "padded", tiny, WORLD + 16)
    with pytest.raises(ValueError, match=r"a completion holds the id \d+, which is no token of the student's tokenizer \(32"):
        run(small("method=opd", f"model.path={path}", "evaluation=none", "trainer.max_steps=1"))
