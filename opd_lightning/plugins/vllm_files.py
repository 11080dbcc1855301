"""A weight transfer backend of vLLM that reads safetensors files, where trainer and server share a folder but no GPU link."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class FilesInitInfo(WeightTransferInitInfo):
    """The folder that files are read from."""

    folder: str


@dataclass
class FilesUpdateInfo(WeightTransferUpdateInfo):
    """The name of a file in the folder."""

    file: str


class FilesWeightTransferEngine(WeightTransferEngine[FilesInitInfo, FilesUpdateInfo]):
    """Weights from one or more safetensors files, under the names of the checkpoint."""

    init_info_cls = FilesInitInfo
    update_info_cls = FilesUpdateInfo
    folder: Path | None = None

    def init_transfer_engine(self, init_info: FilesInitInfo) -> None:
        self.folder = Path(init_info.folder)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        if self.folder is None or Path(update_info.file).name != update_info.file:
            raise ValueError(f"{update_info.file!r} is no file of the folder that the trainer named ({self.folder}).")
        with safe_open(str(self.folder / update_info.file), framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to release."""
