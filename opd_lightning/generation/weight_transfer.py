"""Weights from the trainer to vLLM servers, by vLLM's weight transfer routes: pause, update, finish with a version, resume."""

import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.generation.server import free_port
from opd_lightning.models.weights import full_weights, weight_shapes
from opd_lightning.utils.addresses import on_loopback
from opd_lightning.utils.http import Lost, Server
from opd_lightning.utils.interrupts import interruptible
from opd_lightning.utils.ranks import on_first_rank, rank
from opd_lightning.utils.scratch import ScratchFolder
from opd_lightning.utils.threads import results, submit_all

FILE_BYTES = 2**31
"""The size at which another file begins."""


class WeightTransfer(Protocol):
    """A way of weights to servers. Every rank calls `push`, and rank 0 speaks to the servers.

    Attributes:
        backend: vLLM's name of it.
    """

    backend: str

    def push(self, lm: PreTrainedModel, servers: Sequence[Server], version: str) -> None:
        """Load a model's weights into all servers, which then have this weight version."""
        ...

    def close(self) -> None:
        """Release connections and files."""
        ...


class FilesTransfer:
    """Weights as safetensors files in a folder that trainer and servers reach, removed once they are read.

    The servers need this package's plugin (`plugins.vllm_files`).

    Args:
        folder: where their own folder is made; None takes this machine's place for temporary files.
    """

    backend = "files"

    def __init__(self, folder: str | None = None):
        self.parent = None if folder is None else Path(folder)
        self.scratch: ScratchFolder | None = None

    @property
    def folder(self) -> Path:
        """The folder of the files, made when it is first needed."""
        if self.scratch is None:
            self.scratch = ScratchFolder("opd-lightning-weights-", self.parent)
        return self.scratch.path

    def push(self, lm: PreTrainedModel, servers: Sequence[Server], version: str) -> None:
        files: list[str] = []
        try:
            with torch.no_grad():
                self.save(full_weights(lm), version, files)
            on_first_rank(lambda: each(servers, lambda server: self.load(server, files, version)))
        finally:
            for name in files:
                (self.folder / name).unlink(missing_ok=True)

    def save(self, weights: Iterable[tuple[str, Tensor]], version: str, files: list[str]) -> None:
        """Write the weights, and add the files' names to `files`; ranks other than 0 only take part in gathering."""
        part: dict[str, Tensor] = {}
        for name, tensor in weights:
            if rank() != 0:
                continue
            part[name] = tensor.detach().to("cpu", copy=True).contiguous()
            if sum(value.nbytes for value in part.values()) >= FILE_BYTES:
                self.save_part(part, version, files)
                part = {}
        if part:
            self.save_part(part, version, files)

    def save_part(self, part: dict[str, Tensor], version: str, files: list[str]) -> None:
        files.append(f"{version}-{len(files)}.safetensors")
        try:
            save_file(part, str(self.folder / files[-1]))
        except Exception as error:
            raise ValueError(
                f"weights for the servers cannot be written to {self.parent or 'temporary files'} ({error}); make room there, "
                "or give another generator.transfer_folder."
            ) from error

    def load(self, server: Server, files: Sequence[str], version: str) -> None:
        """Have one server read the files."""
        server.post("/pause?mode=abort")
        server.post("/init_weight_transfer_engine", {"init_info": {"folder": str(self.folder)}})
        begin(server)
        for name in files:
            server.post("/update_weights", {"update_info": {"file": name}})
        server.post("/finish_weight_update", {"weight_version": version})
        server.post("/resume")

    def close(self) -> None:
        if self.scratch is not None:
            self.scratch.close()
            self.scratch = None


class NativeTransfer:
    """vLLM's own transfer by NCCL to other GPUs, or by CUDA IPC on shared ones. The trainer needs vLLM installed too.

    Written after vllm 0.32's `distributed.weight_transfer`; not run yet, for it needs GPUs.

    Args:
        backend: "nccl" or "ipc".
        address: of this machine, by which servers reach it (NCCL); None takes loopback where all servers are there.
    """

    def __init__(self, backend: str, address: str | None = None):
        self.backend, self.address = backend, address
        self.engine: Any = None
        self.servers: tuple[str, ...] = ()

    def push(self, lm: PreTrainedModel, servers: Sequence[Server], version: str) -> None:
        try:
            on_first_rank(lambda: each(servers, lambda server: server.post("/pause?mode=abort")))
            source, client = source_of(lm), Servers(servers, version)
            if self.engine is None or self.servers != tuple(server.url for server in servers):
                self.connect(servers, client, source)
            self.engine.source, self.engine.client = source, client
            self.engine.send_weights()
            on_first_rank(lambda: each(servers, lambda server: server.post("/resume")))
        except Exception:
            self.close()  # a broken group is of no use
            raise

    def connect(self, servers: Sequence[Server], client: "Servers", source: Any) -> None:
        """Open the trainer's end: with NCCL, a group of rank 0 and all workers of all servers."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.close()
        if self.backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            host = self.address or own_address(servers)
            workers, port = on_first_rank(lambda: (sum(client.workers()), free_port()))
            info: Any = NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=1 + workers, rank=rank())
        else:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info = IPCTrainerInitInfo(rank=rank(), packed=True)
        self.engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
        self.servers = tuple(server.url for server in servers)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


class Servers:
    """vLLM's `VLLMWeightSyncClient` for several servers at once."""

    def __init__(self, servers: Sequence[Server], version: str):
        self.servers, self.version = servers, version

    def workers(self) -> list[int]:
        """The number of each server's workers."""
        return [int(server.get("/get_world_size")["world_size"]) for server in self.servers]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos, offset = {}, init_info.get("rank_offset")
        for server, workers in zip(self.servers, self.workers(), strict=True):
            infos[server.url] = init_info if offset is None else init_info | {"rank_offset": offset}
            offset = None if offset is None else offset + workers
        each(self.servers, lambda server: server.post("/init_weight_transfer_engine", {"init_info": infos[server.url]}))

    def start_weight_update(self) -> None:
        each(self.servers, begin)

    def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        # vLLM's client makes JSON of CUDA handles: it pickles them, and the server unpickles them.
        each(self.servers, lambda server: HTTPVLLMWeightSyncClient(server.url, server.timeout).update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {"weight_version": weight_version or self.version}
        each(self.servers, lambda server: server.post("/finish_weight_update", body))


def source_of(lm: PreTrainedModel) -> Any:
    """vLLM's `WeightSource` of a model: full tensors, tied ones under each name, adapters merged."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Weights(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(*described) for described in weight_shapes(lm)]

        def __iter__(self) -> Any:
            return full_weights(lm)

    return Weights()


def begin(server: Server) -> None:
    """Begin an update; one that a killed trainer left open is ended first."""
    try:
        server.post("/start_weight_update")
    except Lost as error:
        if "already active" not in str(error):
            raise
        server.post("/finish_weight_update")
        server.post("/start_weight_update")


def each(servers: Sequence[Server], action: Callable[[Server], Any]) -> None:
    """Do something with all servers at once; the first error is raised when all are done."""
    futures = submit_all(action, servers, len(servers))
    with interruptible():
        wait(futures)
    results(futures)


def own_address(servers: Sequence[Server]) -> str:
    """An address of this machine that the servers reach."""
    local = all(on_loopback(server.url) for server in servers)
    return "127.0.0.1" if local else socket.gethostbyname(socket.gethostname())
