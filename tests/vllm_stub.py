"""A server that speaks vLLM's routes, for tests without vLLM."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from opd_lightning.models import Pretrained

SETTINGS = {"model_config": {"logprobs_mode": "processed_logprobs"}, "weight_transfer_config": {"backend": "files"}}


class Stub(ThreadingHTTPServer):
    """Speaks vLLM's routes: completions repeat the seed, log-probabilities are those of the weights that were loaded.

    Attributes:
        fail: the number of next completions that end in an internal error.
        version: of the weights; a new server has "default".
        calls: the paths that were asked for.
        printed: the model, as a worker prints it.
    """

    daemon_threads = True

    def __init__(self, settings=SETTINGS):
        super().__init__(("127.0.0.1", 0), Handler)
        self.settings, self.fail, self.version, self.calls = settings, 0, "default", []
        self.lm = Pretrained("stand-in://qwen3").model().eval()
        self.weights: dict[str, torch.Tensor] = {}
        self.folder, self.lock, self.open, self.printed = "", threading.Lock(), False, ""
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body) -> tuple[int, object]:
        self.calls.append(path.partition("?")[0])
        match path.partition("?")[0]:
            case "/server_info":
                return 200, {"vllm_config": self.settings}
            case "/collective_rpc":
                return 200, {"results": [self.printed]}
            case "/init_weight_transfer_engine":
                self.folder = body["init_info"]["folder"]
            case "/start_weight_update":
                if self.open:
                    return 500, {"error": {"message": "a weight update is already active"}}
                self.open = True
            case "/update_weights":
                self.weights |= load_file(str(Path(self.folder) / body["update_info"]["file"]))
            case "/finish_weight_update":
                self.open, self.version = False, body.get("weight_version", self.version)
            case "/inference/v1/generate":
                return self.generate(body)
        return 200, {}

    def generate(self, body) -> tuple[int, object]:
        with self.lock:
            self.fail -= 1
            if self.fail >= 0:
                return 500, {"error": {"message": "the engine is dead"}}
        if len(body["token_ids"]) > 100:
            return 400, {"error": {"message": "longer than the maximum model length"}}
        spans = [{"version": self.version, "start": 0, "end": 1}]
        token = body["sampling_params"].get("seed", 0) % 200
        choice = {"finish_reason": "length", "stop_reason": None, "token_ids": [token], "weight_versions": spans}
        choice["logprobs"] = {"content": [{"token_id": token, "logprob": -1.0}]}
        wanted = "prompt_logprobs" in body["sampling_params"]
        return 200, {"choices": [choice]} | ({"prompt_logprobs": self.logprobs(body["token_ids"])} if wanted else {})

    def logprobs(self, ids: list[int]) -> list:
        with torch.no_grad(), self.lock:
            self.lm.load_state_dict(self.weights)
            logprobs = self.lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return [None, *({str(token): {"logprob": float(logprobs[i, token])}} for i, token in enumerate(ids[1:]))]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        code, answer = self.server.answer(self.path, body)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        """Nothing on the terminal."""
