"""A teacher behind a server equals the same teacher in this process, and is tested before training."""

from types import SimpleNamespace

import pytest
import torch
from served import Served
from transformers import AutoTokenizer

from opd_lightning.config import compose
from opd_lightning.runs.identity import run_hash
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.teachers import RemoteTeacher
from opd_lightning.teachers.wire import VLLM, SGLang
from opd_lightning.training.run import run
from opd_lightning.utils.http import ServerError, Servers


@pytest.fixture
def served(other):
    server = Served(other)
    yield server
    server.close()


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def servers(*urls: str, retries: int = 0, **options) -> Servers:
    made = Servers(list(urls), retries=retries, **options)
    made.first_wait_s = 0.01
    return made


def weights(folder):
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)
    return torch.cat([value.flatten() for value in checkpoint["state_dict"].values()])


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("opd_topk", "remote"),
        pytest.param("opd_sampled", "remote", marks=pytest.mark.slow),
        pytest.param("opd_topk", "remote_sglang", marks=pytest.mark.slow),
    ],
)
def test_a_served_teacher_teaches_what_the_local_one_teaches(small, served, other, method, option):
    common = [f"method={method}", "trainer.max_steps=5", *["loss.vocab_support.k=8"] * (method == "opd_topk")]
    tokenizer = [f"teacher.tokenizer={other}"] * (option == "remote_sglang")
    remote = run(small(*common, f"teacher={option}", f"teacher.servers.urls={served.url}", "teacher.k=12", *tokenizer))
    local = run(small(*common, "teacher=topk", "teacher.k=12"))
    ours, theirs = (read_csv(folder / "metrics.csv") for folder in (remote, local))
    ours, theirs = ([row for row in rows if "train/loss" in row] for rows in (ours, theirs))
    assert len(ours) == 5
    for a, b in zip(ours, theirs, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)
    assert torch.allclose(weights(remote), weights(local), atol=1e-5)


def test_hidden_states_give_the_whole_vocabulary(small, served, other, tmp_path):
    served.states = tmp_path / "states"
    served.states.mkdir()
    remote = run(small("method=opd", "teacher=remote_hidden", f"teacher.path={other}", f"teacher.servers.urls={served.url}"))
    local = run(small("method=opd"))
    assert torch.allclose(weights(remote), weights(local), atol=1e-6)
    assert [row for row in read_csv(remote / "metrics.csv") if "train/loss" in row][-1]["train/reverse_kl"] > 0
    assert not list(served.states.iterdir())


@pytest.mark.slow
def test_hidden_states_of_another_model_are_refused(small, served, narrow, tmp_path):
    served.states, path = tmp_path, narrow[0]
    refused = ["method=opd", "teacher=remote_hidden", f"teacher.path={path}", f"teacher.servers.urls={served.url}"]
    with pytest.raises(ValueError, match="give other log-probabilities than the server"):
        run(small(*refused))
    served.states = None
    with pytest.raises(ValueError, match="writes no hidden states"):
        run(small(*refused))


@pytest.mark.slow
def test_a_served_teacher_reads_its_own_context(small, served, tiny):
    """The student as it was, behind a server and shown the demonstration, is the frozen self-teacher."""
    own = Served(tiny)
    try:
        common = ["method=sdft", "rollout=student", "loss/vocab_support=topk", "loss.vocab_support.k=8"]
        row = read_csv(run(small(*common, "teacher=remote", f"teacher.servers.urls={own.url}")) / "metrics.csv")[-1]
        full = read_csv(run(small(*common, "teacher=frozen")) / "metrics.csv")[-1]
        assert row["train/loss"] == pytest.approx(full["train/loss"], abs=1e-5) and row["train/loss"] > 0
    finally:
        own.close()


def test_another_tokenizer_is_refused(served, tokenizer, tiny, tmp_path):
    other = AutoTokenizer.from_pretrained(tiny)
    state = other.backend_tokenizer.to_str()
    names = sorted(other.get_vocab(), key=other.get_vocab().get)
    a, b = names[-1], names[-2]
    swapped = state.replace(f'"{a}":{len(names) - 1}', f'"{a}":{len(names) - 2}').replace(
        f'"{b}":{len(names) - 2},"{a}"', f'"{b}":{len(names) - 1},"{a}"'
    )
    assert swapped != state
    served.tokenizer = type(other)(tokenizer_object=type(other.backend_tokenizer).from_str(swapped))
    with pytest.raises(ValueError, match=r"another tokenizer: the token \d+ is"):
        RemoteTeacher(servers(served.url)).check_tokenizer(tokenizer)


def test_answers_that_change_and_other_weights_are_refused(served, tokenizer, tiny, other):
    RemoteTeacher(servers(served.url), local=other, tolerance=1e-4).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="serves other weights than teacher"):
        RemoteTeacher(servers(served.url), local=tiny).check_tokenizer(tokenizer)
    served.noise = 0.5
    with pytest.raises(ValueError, match="answers the same question"):
        RemoteTeacher(servers(served.url)).check_tokenizer(tokenizer)


def test_requests_are_sent_again_and_to_the_next_server(served, tokenizer, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "a-secret-of-the-server")
    served.fail = lambda n: 503 if n % 2 else None
    teacher = RemoteTeacher(servers("http://127.0.0.1:9", served.url, retries=6, key_env="TEACHER_KEY"), model="teacher")
    teacher.check_tokenizer(tokenizer)
    assert served.headers["Authorization"] == "Bearer a-secret-of-the-server"


def test_every_server_is_tested(served, tokenizer, other):
    """The second serves another tokenizer, or a model by another name; the first is right."""
    second, names = Served(other), ["teacher", "student"]
    try:
        right = tokenizer.decode
        second.tokenizer = SimpleNamespace(decode=lambda ids: right(ids) + "x" * (5 in ids))
        with pytest.raises(ValueError, match=rf"urls={second.url} serves a model with another tokenizer: the token 5 is"):
            RemoteTeacher(servers(served.url, second.url)).check_tokenizer(tokenizer)
        second.name = names[1]
        with pytest.raises(ValueError, match=r"serve student and teacher; serve one model by one name"):
            RemoteTeacher(servers(served.url, second.url)).check_tokenizer(tokenizer)
        with pytest.raises(ValueError, match=rf"urls={second.url} has no model 'teacher'"):
            RemoteTeacher(servers(served.url, second.url), model=names[0]).check_tokenizer(tokenizer)
    finally:
        second.close()


def test_a_server_that_is_gone_is_a_sentence(small):
    refused = ["method=opd_topk", "teacher=remote", "teacher.servers.urls=http://127.0.0.1:9", "teacher.servers.retries=0"]
    with pytest.raises(ValueError, match=r"teacher.servers.urls=http://127.0.0.1:9 gives no answer after one try \(.*refused"):
        run(small(*refused))


@pytest.mark.slow
def test_a_server_that_dies_in_training_loses_nothing(small, served, other):
    """The run ends with a sentence; the same command, with another server, makes the same updates."""
    whole = [
        "method=opd_topk",
        "loss.vocab_support.k=8",
        "teacher=remote",
        "trainer.max_steps=4",
        "callbacks.checkpoint.every=1",
    ]
    reference = run(small(*whole, f"teacher.servers.urls={served.url}", "study.name=unbroken"))
    before, served.requests = served.requests, 0
    served.fail = lambda n: 503 if n > before - 6 else None
    broken = [*whole, "teacher.servers.retries=0", "study.name=broken"]
    with pytest.raises(ServerError, match="the same command goes on from the last checkpoint"):
        run(small(*broken, f"teacher.servers.urls={served.url}"))
    again = Served(other)
    try:
        assert torch.equal(weights(run(small(*broken, f"teacher.servers.urls={again.url}"))), weights(reference))
    finally:
        again.close()


def test_the_servers_own_refusal_is_shown(served, tokenizer):
    with pytest.raises(ValueError, match=r"teacher\.k=30: .*of 30, more than 20.*--max-logprobs 30"):
        RemoteTeacher(servers(served.url), k=30).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="has no model 'mine'"):
        RemoteTeacher(servers(served.url), model="mine").check_tokenizer(tokenizer)


@pytest.mark.parametrize("api", [VLLM(), SGLang()])
def test_an_answer_without_log_probabilities_is_refused(api):
    with pytest.raises(ValueError, match="the answer has no"):
        api.parse({"choices": [{"text": "."}], "meta_info": {}}, [1, 2, 3], 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"urls": "localhost:8000"}, r"urls='localhost:8000' is no URL"),
        ({"urls": []}, "is no URL"),
        ({"urls": "http://a", "retries": -1}, "retries=-1 must be at least 0"),
        ({"urls": "http://a", "concurrency": 0}, "concurrency=0 must be at least 1"),
    ],
)
def test_what_is_no_server_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Servers(**options)


def test_where_a_model_is_served_does_not_change_a_run():
    one, two = (
        compose(["method=opd_topk", "teacher=remote", f"teacher.servers.urls={url}"]) for url in ("http://a:1", "http://b:2")
    )
    assert run_hash(one) == run_hash(two)
    assert run_hash(one) != run_hash(
        compose(["method=opd_topk", "teacher=remote", "teacher.servers.urls=http://a", "teacher.k=9"])
    )
