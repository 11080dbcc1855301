"""Plugins: parts that run in another program, which import nothing else of this package."""

from contextlib import suppress


def register_vllm() -> None:
    """Tell vLLM of the weight transfer backend "files"; vLLM calls it in each of its processes (see pyproject.toml)."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with suppress(ValueError):  # it is registered
        WeightTransferEngineFactory.register_engine("files", f"{__name__}.vllm_files", "FilesWeightTransferEngine")
