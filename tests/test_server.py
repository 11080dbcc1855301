"""vLLM servers: what a client does when one dies, is started anew, or was started wrongly. Stubs answer in place of vLLM."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig

from opd_lightning.config import build
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.generation import VLLMServerGenerator
from opd_lightning.generation.server import free_port
from opd_lightning.generation.server_process import StartedServer, arguments, visible
from opd_lightning.generation.weight_transfer import FilesTransfer
from opd_lightning.models import Pretrained, Student, adapters
from opd_lightning.models.weights import full_weights, weight_shapes
from opd_lightning.types import Rendered, SamplingParams
from opd_lightning.utils.addresses import on_loopback, url_of
from opd_lightning.utils.http import Lost, Server
from tests.vllm_stub import SETTINGS, Stub

PROMPTS = [Rendered([1, 2, 3]), Rendered([4, 5])]


@pytest.fixture(scope="module")
def student() -> Student:
    return Student(Pretrained("stand-in://qwen3").model())


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(Pretrained("stand-in://qwen3").tokenizer())


def generator(renderer, *stubs, **options) -> VLLMServerGenerator:
    return VLLMServerGenerator(renderer.tokenizer, renderer, urls=[stub.url for stub in stubs], patience=0.2, **options)


def test_every_server_gets_the_weights_and_each_completion_a_seed(student, renderer):
    one, two = Stub(), Stub()
    engine = generator(renderer, one, two)
    engine.update_weights(student, 3)
    done = engine.generate(PROMPTS, SamplingParams(4, n=3), 7)
    engine.close()
    assert len(done) == 6 and {completion.policy_version for completion in done} == {3}
    assert len({completion.token_ids[0] for completion in done}) > 4
    assert engine.metrics["generator/mismatch"] < 1e-5 and one.version == two.version != "default"
    alone = generator(renderer, Stub())
    alone.update_weights(student, 3)
    assert alone.generate(PROMPTS, SamplingParams(4, n=3), 7) == done  # whichever server answers
    reads = ("/health", "/server_info", "/collective_rpc", "/inference/v1/generate")
    order = [path for path in one.calls if path not in reads]
    steps = ["/pause", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert order == [*steps, "/resume"]


def test_a_server_that_fails_is_asked_again_with_the_weights(student, renderer):
    stub = Stub()
    engine = generator(renderer, stub)
    engine.update_weights(student, 3)
    before = engine.generate(PROMPTS, SamplingParams(4, n=2), 7)
    stub.fail = 2
    assert engine.generate(PROMPTS, SamplingParams(4, n=2), 7) == before
    stub.fail = 100
    with pytest.raises(ValueError, match=r"is lost \(500: the engine is dead\).*the same command goes on"):
        engine.generate(PROMPTS, SamplingParams(4), 7)


def test_a_server_that_is_lost_beside_training_ends_the_run(student, renderer):
    """The weights that it lost are being trained."""
    stub = Stub()
    engine = generator(renderer, stub)
    engine.update_weights(student, 3)
    stub.fail, pushes = 1, engine.pushes
    with ThreadPoolExecutor() as pool, pytest.raises(ValueError, match=r"is lost \(500.*the same command goes on"):
        pool.submit(engine.generate, PROMPTS, SamplingParams(4, n=2), 7).result()
    assert engine.pushes == pushes


def test_a_server_that_was_started_anew_gets_the_weights_again(student, renderer):
    stub = Stub()
    engine = generator(renderer, stub)
    engine.update_weights(student, 3)
    before = engine.generate(PROMPTS, SamplingParams(4), 7)
    stub.version, stub.weights, stub.open = "default", {}, True  # and a killed trainer had left an update open
    assert engine.generate(PROMPTS, SamplingParams(4), 7) == before and stub.version == engine.weights


def test_a_server_that_does_not_come_back_ends_the_run_with_a_sentence(student, renderer):
    stub = Stub()
    engine = generator(renderer, stub)
    engine.update_weights(student, 3)
    stub.shutdown()
    stub.server_close()
    for call in (lambda: engine.generate(PROMPTS, SamplingParams(4), 7), lambda: engine.update_weights(student, 4)):
        with pytest.raises(
            ValueError, match=rf"{stub.url} does not answer \(.*refused.*start it again\. Then the same command"
        ):
            call()


def test_a_refused_request_is_not_repeated(student, renderer):
    stub = Stub()
    engine = generator(renderer, stub)
    engine.update_weights(student, 3)
    count = len(stub.calls)
    with pytest.raises(ValueError, match=r"refuses /inference/v1/generate \(400: longer than the maximum model length\)"):
        engine.generate([Rendered([1] * 101)], SamplingParams(4), 7)
    assert len(stub.calls) == count + 1


def test_old_weights_are_noticed(student, renderer, monkeypatch):
    """The probe compares log-probabilities, whatever version the server reports."""
    stub = Stub()
    engine = generator(renderer, stub)
    engine.update_weights(student, 3)
    moved = Student(Pretrained("stand-in://qwen3").model())
    with torch.no_grad():
        moved.lm.model.embed_tokens.weight.mul_(1.5)
    monkeypatch.setattr(engine, "push", lambda lm: None)
    with pytest.raises(ValueError, match=r"differ by .*generator\.max_mismatch"):
        engine.update_weights(moved, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "VLLM_SERVER_DEV_MODE=1"),
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "--logprobs-mode processed_logprobs"),
        (SETTINGS | {"weight_transfer_config": {"backend": "nccl"}}, "--weight-transfer-config"),
        (SETTINGS | {"weight_transfer_config": None}, "--weight-transfer-config"),
    ],
)
def test_a_server_that_was_started_wrongly_is_refused(student, renderer, settings, message):
    stub = Stub(settings=settings)
    if settings is None:
        answer = stub.answer
        stub.answer = lambda path, body: (404, {}) if path.startswith("/server_info") else answer(path, body)
    with pytest.raises(ValueError, match=message):
        generator(renderer, stub).update_weights(student, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"either generator\.start=true or generator\.urls"),
        ({"urls": ["http://127.0.0.1:1"], "start": True}, "not both"),
        ({"urls": ["127.0.0.1:1"]}, "is no URL"),
        ({"urls": "http://127.0.0.1:1"}, r"generator\.urls is a text"),
        ({"start": True, "options": "{a: 1}"}, r"generator\.options is a text"),
        ({"start": True, "python": "/no/python"}, r"generator\.python=/no/python is no interpreter"),
        ({"urls": ["http://a:1"], "transfer": "rsync"}, r"generator\.transfer=rsync does not exist"),
        ({"urls": ["http://a:1"], "transfer": "ipc"}, r"generator\.allow_pickled_handles=true"),
        ({"urls": ["http://a:1"]}, r"generator\.transfer_folder must name a folder .* http://a:1"),
        ({"urls": ["http://a:1"], "concurrency": 0}, r"generator\.concurrency=0"),
        ({"start": True, "python": "python3", "servers": 0}, r"generator\.servers=0"),
        ({"urls": ["http://a:1", "http://a:1/"]}, r"generator\.urls names http://a:1 twice"),
        ({"urls": ["http://a:1"], "patience": -1}, r"generator\.patience=-1"),
        ({"urls": ["http://a:1"], "timeout": 0}, r"generator\.timeout=0"),
        ({"urls": ["http://[::1"]}, "is no URL"),
        ({"urls": ["http://127.0.0.1:1"], "transfer": "nccl"}, r"generator\.transfer=nccl needs vLLM"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(renderer, options, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerGenerator(renderer.tokenizer, renderer, **options)


def test_a_server_serves_one_run(student, renderer):
    stub = Stub()
    one, two = generator(renderer, stub), generator(renderer, stub)
    two.servers[0].url = stub.url.replace("127.0.0.1", "localhost")
    one.update_weights(student, 3)
    with pytest.raises(ValueError, match="serves another run of this machine"):
        two.update_weights(student, 3)
    assert stub.version == one.weights
    one.close()
    two.update_weights(student, 3)
    assert stub.version == two.weights
    two.close()


def test_weights_of_another_run_are_noticed(student, renderer):
    """It may be on another machine, where no lock is seen."""
    stub = Stub()
    engine = generator(renderer, stub)
    engine.update_weights(student, 3)
    stub.version = "0123abcd-7"
    with pytest.raises(ValueError, match=r"another run has given the server at .* its weights \(0123abcd-7\)"):
        engine.generate(PROMPTS, SamplingParams(4), 7)
    assert stub.version == "0123abcd-7"


def test_an_answer_without_a_weight_version_is_not_used(student, renderer):
    stub = Stub()
    stub.version = None
    answer = stub.answer
    stub.answer = lambda path, body: without_versions(*answer(path, body))
    with pytest.raises(ValueError, match="does not say which weights wrote a completion"):
        generator(renderer, stub).update_weights(student, 3)


def without_versions(code, answer):
    return code, {**answer, "choices": [{**c, "weight_versions": None} for c in answer.get("choices", [])]}


@pytest.mark.parametrize("place", ["text", "entries", "folder"])
def test_another_model_is_refused_before_weights_are_sent(student, renderer, tmp_path, place):
    config = student.lm.config.to_dict() | {"hidden_size": 999}
    served = {**SETTINGS["model_config"], "model": "Qwen/Other", "hf_config": config}
    if place == "folder":
        (tmp_path / "config.json").write_text(json.dumps(config, default=str))
        served |= {"model": str(tmp_path), "hf_config": None}
    if place == "text":
        served["hf_config"] = f"Qwen3Config {json.dumps(config, default=str)}"
    stub = Stub(settings=SETTINGS | {"model_config": served})
    with pytest.raises(ValueError, match=r"serves another model, .* \(hidden_size 999\), than the student"):
        generator(renderer, stub).update_weights(student, 0)
    assert "/pause" not in stub.calls


PRINTED = """Qwen3ForCausalLM()(
  (model): Qwen3Model()(
    (embed_tokens): VocabParallelEmbedding(num_embeddings={vocab}, num_embeddings_per_partition=576, embedding_dim={hidden}, \
org_vocab_size={vocab}, num_embeddings_padded=576, tp_size=1)
    (layers): ModuleList()(
      (0): PPMissingLayer()
      {layers}Qwen3DecoderLayer()(
        (mlp): Qwen3MLP()
      )
    )
  )
)"""
"""vLLM's print of a model whose first layer is on another device."""


@pytest.mark.parametrize("layers", [2, 5])
def test_another_model_by_a_hubs_name_is_refused_by_its_layers(student, renderer, layers):
    config = student.lm.config
    assert config.num_hidden_layers == 2
    stub = Stub(settings=SETTINGS | {"model_config": SETTINGS["model_config"] | {"model": "Qwen/Other"}})
    line = "(1): " if layers == 2 else "(1-3, 4): 4 x "
    stub.printed = PRINTED.format(vocab=config.vocab_size, hidden=config.hidden_size, layers=line)
    engine = generator(renderer, stub)
    if layers == 2:
        engine.update_weights(student, 0)
        return
    with pytest.raises(ValueError, match=r"another model, Qwen/Other \(num_hidden_layers 5\), than the student .*rs 2\)"):
        engine.update_weights(student, 0)
    assert "/pause" not in stub.calls


@pytest.mark.parametrize("host", ["no-such-host.invalid", "256.1.1.1", "203.0.113.7"])
def test_a_host_that_is_not_this_machines_is_refused(student, renderer, host):
    engine = VLLMServerGenerator(renderer.tokenizer, renderer, start=True, python="python3", host=host)
    with pytest.raises(ValueError, match=rf"generator\.host={host} is no address of this machine"):
        engine.update_weights(student, 0)
    engine.close()


def test_ipv6_addresses_stand_in_brackets():
    assert [url_of(host, 1) for host in ("::1", "::", "0.0.0.0", "a")] == [
        *["http://[::1]:1"] * 2,
        "http://127.0.0.1:1",
        "http://a:1",
    ]
    assert on_loopback(url_of("::1", 1)) and not on_loopback(url_of("fe80::1", 1))


def test_a_choice_of_a_group_is_named_once(renderer):
    node = OmegaConf.create({"generator": {"_target_": "opd_lightning.generation.VLLMServerGenerator"}}).generator
    with pytest.raises(ValueError, match=r"^generator=vllm_server needs either"):
        build(node, tokenizer=renderer.tokenizer, renderer=renderer)


def test_weights_are_described_as_they_are_sent(student):
    """NCCL's receivers make their buffers by the description."""
    lm = Pretrained("stand-in://qwen3").model()
    adapters.add(lm, LoraConfig(r=2, target_modules="all-linear"))
    for model in (student.lm, lm):
        sent = [(name, value.dtype, tuple(value.shape)) for name, value in full_weights(model)]
        assert list(weight_shapes(model)) == sent


def test_files_are_split_and_removed(student, monkeypatch, tmp_path):
    monkeypatch.setattr("opd_lightning.generation.weight_transfer.FILE_BYTES", 20_000)
    stub, transfer = Stub(), FilesTransfer(str(tmp_path / "shared"))
    transfer.push(student.lm, [Server(stub.url)], "v1")
    assert stub.calls.count("/update_weights") > 1 and not list((tmp_path / "shared").rglob("*.safetensors"))
    sent = dict(full_weights(student.lm))
    assert set(stub.weights) == set(sent) and "lm_head.weight" in sent  # tied, under both names
    assert all(torch.equal(stub.weights[name], value) for name, value in sent.items())
    with pytest.raises(Lost):
        transfer.push(student.lm, [Server("http://127.0.0.1:1")], "v2")
    assert not list((tmp_path / "shared").rglob("*.safetensors"))
    transfer.close()
    assert not list((tmp_path / "shared").iterdir())


def test_a_started_server_that_ends_at_once_is_explained(student, renderer, tmp_path):
    """This interpreter stands in for one whose vLLM does not start."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ValueError: no such device' >&2\nexit 1\n")
    python.chmod(0o755)
    engine = VLLMServerGenerator(renderer.tokenizer, renderer, tmp_path, start=True, python=str(python), patience=20)
    with pytest.raises(ValueError, match=r"does not come up: ValueError: no such device\. Its output is in .*vllm-0\.log"):
        engine.update_weights(student, 0)
    engine.close()


def test_a_started_server_ends_with_the_program(tmp_path):
    """However it ends: standard input of the server closes."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncat > /dev/null\n")
    python.chmod(0o755)
    (tmp_path / "model").mkdir()
    server = StartedServer(tmp_path / "model", tmp_path / "log", {}, {}, str(python), "127.0.0.1", 1.0)
    server.start()
    assert not server.gone()
    server.process.stdin.close()
    assert server.process.wait(5) == 0
    server.stop()


def test_options_are_the_servers_command_line():
    options = {
        "max_model_len": 64,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": None,
        "x": {"backend": "files"},
    }
    line = ["--max-model-len", "64", "--enforce-eager", "--no-enable-prefix-caching", "--x", '{"backend": "files"}']
    assert arguments(options) == line


@pytest.mark.parametrize(
    ("own", "given", "expected"), [("", "1,2", "1,2"), ("4,5,6", "1, 2", "5,6"), ("0", "3", "3"), ("GPU-a,GPU-b", "1", "GPU-b")]
)
def test_devices_are_counted_among_those_of_the_run(own, given, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    assert visible(given) == expected


RANK = """
import sys
from torch import distributed
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.generation import VLLMServerGenerator
from opd_lightning.models import Pretrained, Student
from opd_lightning.types import Rendered, SamplingParams
distributed.init_process_group("gloo")
start = Pretrained("stand-in://qwen3")
renderer, student = ChatRenderer(start.tokenizer()), Student(start.model())
engine = VLLMServerGenerator(renderer.tokenizer, renderer, urls=sys.argv[1:2], patience=0.2)
engine.update_weights(student, 1)
print(len(engine.generate([Rendered([1, 2])], SamplingParams(4, n=3), distributed.get_rank())), engine.weights)
engine.servers[0].url = "http://127.0.0.1:1"
try:
    engine.update_weights(student, 2)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_one_of_several_ranks_sends_the_weights_and_all_hear_of_errors():
    stub = Stub()
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    command = [sys.executable, "-c", RANK, stub.url]
    ranks = [subprocess.Popen(command, env=shared | {"RANK": str(i)}, stdout=subprocess.PIPE, text=True) for i in range(2)]
    (first, second) = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert first == second and first.startswith("3 ") and "127.0.0.1:1 is lost" in first
    assert stub.calls.count("/update_weights") == 1
