"""The client of servers: what counts as an error, several servers of which one stays away, and secrets in what servers say."""

import json
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from served import Served
from transformers import AutoTokenizer

from opd_lightning.teachers import RemoteTeacher
from opd_lightning.training.run import run
from opd_lightning.utils.http import Lost, Server, ServerError, Servers

GONE = "http://127.0.0.1:9"


class Queueing(ThreadingHTTPServer):
    request_queue_size = 64


@pytest.fixture
def saying():
    """Starts servers that answer with (status, body), as a function of the number of the request."""
    started = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.paths.append(self.path)
                status, body = answer(len(server.paths))
                self.send_response(status)
                if server.location:
                    self.send_header("Location", server.location)
                self.send_header("Content-Length", str(len(body) + server.missing))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST

            def log_message(self, *_):
                pass

        server = Queueing(("127.0.0.1", 0), Handler)
        server.location, server.paths, server.missing, server.url = "", [], 0, f"http://127.0.0.1:{server.server_address[1]}"
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def servers(*urls, retries=3):
    made = Servers(urls, retries=retries)
    made.first_wait_s = 0.01
    return made


@pytest.mark.parametrize(
    ("status", "body", "kind", "sentence"),
    [
        (503, '{"error": {"message": "busy"}}', Lost, "^503: busy$"),
        (429, "slow down", Lost, "^429: slow down$"),
        (404, '{"detail": "Not Found"}', ServerError, r"refuses /x \(404: .*Not Found"),
        (200, "<html>", ServerError, "refuses /x: its answer is no JSON"),
        (200, '{"a": [1,', Lost, "breaks off"),
    ],
)
def test_errors_are_refusals_or_can_pass(saying, status, body, kind, sentence):
    with pytest.raises(ServerError, match=sentence) as told:
        Server(saying(lambda n: (status, body)).url).post("/x?y=1")
    assert type(told.value) is kind


def test_a_server_that_dies_in_its_answer_is_lost_and_asked_again(saying):
    server = saying(lambda n: (200, "[1]"))
    server.missing = 5
    with pytest.raises(Lost):
        Server(server.url, timeout=1).get("/x")
    breaking = saying(lambda n: (200, "[1" if n == 1 else "[1]"))
    assert servers(breaking.url).get("/x") == [1] and breaking.paths == ["/x"] * 2


def test_a_key_is_not_repeated(saying, monkeypatch):
    monkeypatch.setenv("TEACHERS", "the-key-of-the-server")
    server = saying(lambda n: (401, json.dumps({"error": "Incorrect API key: the-key-of-the-server"})))
    with pytest.raises(ServerError, match=r"401: Incorrect API key: \(secret\)"):
        Servers(server.url, key_env="TEACHERS").get("/x")


def test_a_redirect_is_not_followed_for_the_key_would_go_there(saying, monkeypatch):
    monkeypatch.setenv("TEACHERS", "the-key-of-the-server")
    other = saying(lambda n: (200, "[1]"))
    server = saying(lambda n: (307, ""))
    server.location = f"{other.url}/y?token=abc"
    with pytest.raises(ServerError, match=rf"redirects /x to {other.url}, which is not followed"):
        Server(server.url, key_env="TEACHERS").post("/x")
    assert not other.paths


@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_key_names_its_variable(saying, monkeypatch, status):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ServerError, match="key in the environment variable VLLM_API_KEY is missing"):
        Server(saying(lambda n: (status, "")).url).get("/x")
    monkeypatch.setenv("VLLM_API_KEY", "a-wrong-key")
    with pytest.raises(ServerError, match="key in the environment variable VLLM_API_KEY is not the server's"):
        Server(saying(lambda n: (status, "")).url).get("/x")


@pytest.mark.parametrize(
    "options",
    [
        {"urls": "http://me:hidden1@a:1"},
        {"urls": "http://hidden1@a:1"},
        {"urls": "http://a:1/v1?api_key=hidden1"},
        {"urls": "me:hidden1@a:1"},
        {"urls": "http://a:1", "key_env": "sk-hidden1"},
        {"urls": "http://a:1", "key_env": "hidden1"},
        {"urls": "http://a:1", "key_env": "HIDDEN1"},
    ],
)
def test_secrets_in_the_place_of_names_and_addresses_are_refused_and_not_repeated(options):
    with pytest.raises(ValueError) as told:
        Servers(**options)
    assert "hidden1" not in str(told.value).lower() and "teacher.servers" in str(told.value)


def test_what_answers_but_is_no_such_server_is_not_waited_for(saying):
    with pytest.raises(ServerError, match=r"refuses /health \(404"):
        Server(saying(lambda n: (404, "")).url).wait(60)


def test_a_server_that_stays_away_is_left_out_and_the_others_go_on(saying, caplog):
    server = saying(lambda n: (200, "[1]"))
    several = servers(GONE, server.url)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            assert several.post_all("/x", [{}] * 4) == [[1]] * 4
            if several.urls == [server.url]:
                break
    (record,) = caplog.records
    assert f"{GONE} stays away" in record.getMessage() and f"goes on with {server.url}" in record.getMessage()


def test_requests_at_the_same_time_are_one_failure(saying):
    """A short absence leaves no server out, however many requests meet it."""
    server, back = saying(lambda n: (503, "") if n <= 16 else (200, "[2]")), saying(lambda n: (200, "[1]"))
    several = servers(server.url, back.url)
    several.first_wait_s = 5
    assert several.post_all("/x", [{}] * 32) and len(several.urls) == 2


def test_the_run_ends_with_a_sentence_if_none_answers(saying):
    other = saying(lambda n: (503, "busy"))
    with pytest.raises(Lost, match=rf"teacher\.servers\.urls={other.url} gives no answer .*503: busy.*same command goes on"):
        servers(GONE, other.url, retries=0).post_all("/x", [{}] * 4)


def test_a_server_with_another_model_is_refused(tiny, other):
    one, two = Served(tiny), Served(other)
    try:
        with pytest.raises(ValueError, match="several servers with different models"):
            RemoteTeacher(servers(one.url, two.url)).check_tokenizer(AutoTokenizer.from_pretrained(tiny))
    finally:
        one.close()
        two.close()


@pytest.mark.parametrize(("status", "body", "sentence"), [(503, "", "gives no answer"), (200, "<html>", "does not tell its")])
def test_a_server_without_tokenizer_is_not_taken_for_one_with_another(saying, tiny, status, body, sentence):
    server = saying(lambda n: (200, '{"data": [{"id": "teacher"}]}') if n == 1 else (status, body))
    with pytest.raises(ValueError, match=sentence):
        RemoteTeacher(servers(server.url, retries=1)).check_tokenizer(AutoTokenizer.from_pretrained(tiny))


@pytest.mark.slow
def test_a_run_goes_on_without_a_server_that_dies_and_learns_the_same(small, other, caplog):
    one, two = Served(other), Served(other)
    given = ["method=opd_topk", "loss.vocab_support.k=8", "teacher=remote", "trainer.max_steps=4", "teacher.servers.retries=0"]

    def weights(urls, name):
        folder = run(small(*given, f"teacher.servers.urls=[{urls}]", f"study.name={name}"))
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]

    try:
        expected = weights(one.url, "whole")
        two.fail = lambda n: None if n < 12 else 503
        found = weights(f"{two.url},{one.url}", "dying")
        assert f"{two.url} stays away" in caplog.text and all(torch.equal(found[name], expected[name]) for name in expected)
    finally:
        one.close()
        two.close()
