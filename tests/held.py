"""A callback that tells how much of the teacher each device holds, and how many passes it read with."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from torch.distributed.tensor import DTensor


def held(tensors: Any) -> dict[str, Any]:
    """Bytes of tensors, those on this device, and its kind."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
    return {"whole": sum(v.numel() * v.itemsize for v in tensors), "here": sum(v.numel() * v.itemsize for v in local)}


class Held(L.Callback):
    """Writes held-<rank>.json at the end of training."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.passes: list[list[int]] = []
        model = getattr(module.teachers["teacher"].weights, "model", None)
        if model is None:
            return
        evened = model.evened

        def noted(batches: Any) -> Any:
            self.passes.append([len(batches), len(found := evened(batches))])
            return found

        model.evened = noted

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        weights = module.teachers["teacher"].weights
        tensors = list(weights.model.parameters()) if hasattr(weights, "model") else list(weights.average.values())
        found = {"student": held(list(module.student.parameters())), "teacher": held(tensors), "passes": self.passes}
        path = Path(trainer.default_root_dir) / f"held-{trainer.global_rank}.json"
        path.write_text(json.dumps(found))
