"""vLLM behind HTTP: one or more servers, which receive the student's weights after every update."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any
from uuid import uuid4

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.contracts import Renderer
from opd_lightning.generation.copying import CopyingGenerator, configuration
from opd_lightning.generation.lease import Leases
from opd_lightning.generation.server import check_host, check_settings
from opd_lightning.generation.server_answers import completion, stale
from opd_lightning.generation.server_options import check_numbers, check_once, check_servers, check_transfer
from opd_lightning.generation.server_process import StartedServer, interpreter, visible
from opd_lightning.generation.weight_transfer import FilesTransfer, NativeTransfer, WeightTransfer
from opd_lightning.types import Completion, Rendered, SamplingParams
from opd_lightning.utils.addresses import on_loopback
from opd_lightning.utils.errors import RESUME
from opd_lightning.utils.http import Lost, Server
from opd_lightning.utils.ranks import on_first_rank, world_size
from opd_lightning.utils.scratch import ScratchFolder
from opd_lightning.utils.threads import results, submit_all

log = logging.getLogger(__name__)

MOST_LOSSES = 3
"""Times in a row that servers are brought back for one call."""


class VLLMServerGenerator(CopyingGenerator):
    """vLLM servers by URL, or started by the run (vllm 0.32).

    Requests are token ids with a seed each, so that it does not matter which server answers. Every answer says which weights
    wrote it; one by other weights than the last that were sent, as after a server's restart, is not used: the server gets the
    weights and is asked again.

    Args:
        tokenizer, renderer, max_mismatch: see `CopyingGenerator`.
        folder: the run's, for the output of started servers.
        urls: of running servers.
        start: start servers on this machine, and restart one that dies.
        servers: the number to start.
        devices: the CUDA devices of each of them, such as ["1", "2,3"]; None leaves them those of this process.
        python: the interpreter that has vLLM; None takes this one.
        host: the address that started servers listen on. Whoever reaches it can replace their weights.
        options: arguments of `vllm serve`, for servers that are started.
        transfer: "files", "nccl" or "ipc".
        transfer_folder: the folder for files; None takes a temporary one, which servers on other machines do not see.
        address: of this machine, for NCCL.
        allow_pickled_handles: let started servers unpickle what they are sent, which ipc needs.
        concurrency: requests at a time to each server.
        timeout: seconds that one request may take.
        patience: seconds that a server may take to start, or to come back.

    Raises:
        ValueError: the arguments do not fit together, or vLLM is not where they say.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        renderer: Renderer | None = None,
        folder: Path | None = None,
        urls: Sequence[str] = (),
        start: bool = False,
        servers: int = 1,
        devices: Sequence[str] | None = None,
        python: str | None = None,
        host: str = "127.0.0.1",
        options: Mapping[str, Any] | None = None,
        transfer: str = "files",
        transfer_folder: str | None = None,
        address: str | None = None,
        allow_pickled_handles: bool = False,
        concurrency: int = 64,
        timeout: float = 600.0,
        patience: float = 300.0,
        max_mismatch: float | None = None,
    ):
        super().__init__(tokenizer, renderer, max_mismatch)
        urls = urls or ()
        check_servers(urls, start, options)
        count = len(devices) if devices else servers
        check_numbers(count, concurrency, timeout, patience)
        check_transfer(transfer, allow_pickled_handles)
        self.python = interpreter(python) if start else ""
        self.servers: list[Server] = [Server(url, timeout) for url in urls]
        check_once([server.url for server in self.servers])
        if transfer == "files" and transfer_folder is None and (far := [url for url in urls if not on_loopback(url)]):
            raise ValueError(f"generator.transfer_folder must name a folder that this machine and {far[0]} have in common.")
        self.count, self.devices, self.host, self.options = count, devices, host, dict(options or {})
        self.pickled = allow_pickled_handles
        self.transfer: WeightTransfer = FilesTransfer(transfer_folder)
        if transfer != "files":
            self.transfer = NativeTransfer(transfer, address)
        self.run_folder, self.concurrency, self.timeout, self.patience = folder, concurrency, timeout, patience
        self.folder: ScratchFolder | None = None
        self.name, self.pushes, self.losses = uuid4().hex[:8], 0, 0  # weight versions of two runs differ
        self.pushed: Any = None
        self.leases = Leases()

    @property
    def weights(self) -> str:
        """The weight version of the last push."""
        return f"{self.name}-{self.pushes}"

    def start(self, lm: PreTrainedModel) -> None:
        """Connect to the servers, or start them, with the student's configuration and random weights."""
        self.name = on_first_rank(lambda: self.name)
        if not self.servers:
            urls = on_first_rank(lambda: self.launch(lm))
            self.servers = self.servers or [Server(url, self.timeout) for url in urls]  # started by rank 0
        on_first_rank(lambda: self.connect(lm))

    def launch(self, lm: PreTrainedModel) -> list[str]:
        """Start the servers; returns their URLs."""
        check_host(self.host)
        self.folder = ScratchFolder("opd-lightning-vllm-")
        model = self.folder.path / "model"
        model.mkdir()
        (model / "config.json").write_text(configuration(lm))
        defaults = {
            "dtype": str(lm.dtype).removeprefix("torch."),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",
            "enable_scale_out": True,
            "weight_transfer_config": {"backend": self.transfer.backend},
            "seed": 0,
        }
        environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if self.pickled else {}
        for i in range(self.count):
            device = {"CUDA_VISIBLE_DEVICES": visible(self.devices[i])} if self.devices else {}
            output = (self.run_folder or self.folder.path) / f"vllm-{i}.log"
            server = StartedServer(
                model, output, defaults | self.options, environment | device, self.python, self.host, self.timeout
            )
            server.start()
            self.servers.append(server)
        return [server.url for server in self.servers]

    def connect(self, lm: PreTrainedModel) -> None:
        """Wait for the servers, take them for this run, and check how they were started.

        Raises:
            ValueError: one does not come up, serves another run, or was started with another model or without what a run needs.
        """
        self.leases.take([server.url for server in self.servers if not isinstance(server, StartedServer)])
        for server in self.servers:
            self.wait(server, "no answer")
            check_settings(server, self.transfer.backend, lm.config)

    def wait(self, server: Server, why: str) -> None:
        """Wait for a server; ValueError if it does not come up."""
        if isinstance(server, StartedServer):
            if not server.wait(self.patience, server.gone):
                raise ValueError(
                    f"the vLLM server that the run started does not come up: {server.last_words()}. "
                    f"Its output is in {server.log}."
                )
        elif not server.wait(self.patience):
            raise ValueError(f"the server at {server.url} does not answer ({why}); start it again. {RESUME}.")

    def push(self, lm: PreTrainedModel) -> None:
        """Load a model's weights into all servers; one that dies meanwhile is brought back first."""
        self.pushed = lm
        while True:
            self.pushes += 1
            try:
                self.transfer.push(lm, self.servers, self.weights)
            except Lost as error:
                self.bring_back({server: str(error) for server in self.servers})
            else:
                return

    def bring_back(self, lost: Mapping[Server, str]) -> None:
        """Wait for servers that answered with an error or not at all; those of the run are started again if they died.

        Args:
            lost: what happened, by server.

        Raises:
            ValueError: they do not come back, or are lost again and again.
        """
        self.losses += 1
        for server, why in lost.items():
            # Beside training, the weights that it should get again are not there any more.
            beside_training = current_thread() is not main_thread()
            if self.losses > MOST_LOSSES or world_size() > 1 or beside_training:
                where = f", its output in {server.log}" if isinstance(server, StartedServer) else ""
                raise ValueError(f"the server at {server.url} is lost ({why}{where}). {RESUME}.")
            if isinstance(server, StartedServer) and not server.healthy():
                log.warning(f"warning: the vLLM server at {server.url} is lost ({why}) and started again.")
                server.start()
            self.wait(server, why)

    def write(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, version: int | None) -> list[Completion]:
        """Completions from the weights that the servers hold."""
        ids = [prompt.token_ids for prompt in prompts for _ in range(sampling.n)]
        requests = [
            {"token_ids": list(row), "sampling_params": self.parameters(sampling, seed, i)} for i, row in enumerate(ids)
        ]
        ends, greedy = self.ends(), sampling.temperature == 0
        return [completion(answer["choices"][0], ends, greedy, version) for answer in self.ask(requests, self.servers)]

    def prompt_logprobs(self, rows: Sequence[Sequence[int]], server: Server | None = None) -> list[list[float]]:
        """A server's log-probability of each token of the rows, except the first."""
        parameters = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        requests = [{"token_ids": list(row), "sampling_params": parameters} for row in rows]
        answers = self.ask(requests, [server or self.servers[0]])
        return [
            [
                float(candidates[str(token)]["logprob"])
                for candidates, token in zip(answer["prompt_logprobs"][1:], row[1:], strict=True)
            ]
            for answer, row in zip(answers, rows, strict=True)
        ]

    def mismatch(self, student: Any, bound: float) -> float:
        """The largest of the servers' differences."""
        logprobs = [partial(self.prompt_logprobs, server=server) for server in self.servers]
        return max(self.probe.compare(student, of_server, bound) for of_server in logprobs)

    def ask(self, requests: Sequence[Mapping[str, Any]], servers: Sequence[Server]) -> list[Any]:
        """The answers to requests, in their order, all by the weights of the last push.

        What a lost server had not answered is asked again when it is back.
        """
        answers: list[Any] = [None] * len(requests)
        lost: dict[Server, str] = {}

        def one(i: int) -> None:
            server = servers[i % len(servers)]
            if server in lost:
                return
            try:
                answer = server.post("/inference/v1/generate", requests[i])
            except Lost as error:
                lost[server] = str(error)
                return
            if fault := stale(answer, self.weights, server.url):
                lost[server] = fault
            else:
                answers[i] = answer

        while missing := [i for i, answer in enumerate(answers) if answer is None]:
            results(submit_all(one, missing, self.concurrency * len(servers)))
            if lost:
                self.bring_back(lost)
                lost.clear()
                self.push(self.pushed)
        self.losses = 0
        return answers

    def close(self) -> None:
        """End the servers that the run started, and remove its files; new weights start them again."""
        for server in self.servers:
            if isinstance(server, StartedServer):
                server.stop()
        self.transfer.close()
        self.leases.release()
        self.started = False
        if self.folder is not None:
            self.folder.close()
            self.servers, self.folder = [], None
