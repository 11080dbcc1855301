"""A stand-in for a server of a language model, in a thread: the parts of vLLM's and SGLang's interfaces that are read."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class Served:
    """A served model.

    Attributes:
        url: its address.
        fail: called with the number of the request; an HTTP status to answer instead, or None.
        headers: of the last request.
        max_logprobs: most tokens per position; more are refused.
        states: a folder for the hidden states before the final norm, which vLLM's connector writes; None writes none.
        name: the model's.
        noise: nats added to the log-probabilities, times the number of the request.
    """

    def __init__(self, path: str, tokenizer: Any = None, max_logprobs: int = 20):
        self.lm = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(path)
        self.max_logprobs, self.noise, self.requests, self.lock = max_logprobs, 0.0, 0, Lock()
        self.fail: Callable[[int], int | None] = lambda n: None
        self.headers: dict[str, str] = {}
        self.states: Path | None = None
        self.name = "teacher"
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": served.name, "max_model_len": 128}]})

            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with served.lock:
                    served.requests += 1
                    served.headers = dict(self.headers)
                    status = served.fail(served.requests)
                    if status is None:
                        status, answer = served.answer(self.path, payload)
                    else:
                        answer = {"error": {"message": "busy"}}
                self.reply(status, answer)

            def reply(self, status: int, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        """The status and the answer to a request."""
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(payload["tokens"])}
        k = payload["prompt_logprobs"] if path == "/v1/completions" else payload["top_logprobs_num"]
        if k > self.max_logprobs:
            return 400, {"error": {"message": f"Requested prompt logprobs of {k}, more than {self.max_logprobs}"}}
        ids = payload["prompt"] if path == "/v1/completions" else payload["input_ids"]
        with torch.no_grad():
            log_p = self.lm(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        log_p = log_p + self.noise * self.requests
        own = log_p.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1).tolist()
        top = log_p.topk(k, -1)
        rows = [list(zip(i, v, strict=True)) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        if path == "/generate":
            meta = {
                "input_token_logprobs": [[None, ids[0], None], *([v, i, None] for v, i in zip(own, ids[1:], strict=True))],
                "input_top_logprobs": [None, *([[v, i, None] for i, v in row] for row in rows)],
            }
            return 200, {"meta_info": meta}
        entries = [{str(i): {"logprob": v} for i, v in [(t, o), *row]} for t, o, row in zip(ids[1:], own, rows, strict=True)]
        answer = {"choices": [{"prompt_logprobs": [None, *entries]}]}
        return 200, answer | ({} if self.states is None else {"kv_transfer_params": {"hidden_states_path": self.write(ids)}})

    def write(self, ids: list[int]) -> str:
        """Write the hidden states of a row of token ids."""
        states: list[torch.Tensor] = []
        handle = self.lm.model.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        with torch.no_grad():
            self.lm(input_ids=torch.tensor([ids]))
        handle.remove()
        path = f"{self.states}/{self.requests}.safetensors"
        save_file({"hidden_states": states[0].transpose(0, 1).contiguous(), "token_ids": torch.tensor(ids)}, path)
        Path(f"{path}.lock").touch()
        return path

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
