"""The module and the data of a method for a Lightning Trainer of the user's own."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from opd_lightning.data.prompts import PromptData
from opd_lightning.module import DistillationModule
from opd_lightning.utils.in_memory import naming_arguments


class TrainerModule(DistillationModule):
    """A `DistillationModule` that brings its callbacks along and can be tested: `trainer.fit`, `trainer.test`.

    Args:
        prepare: called with the Trainer before training; checks its arguments and returns the update that ends it, or -1.
        more_callbacks: called with the Trainer before Lightning's own checks; returns the callbacks to add.
        begun: called when training begins.
        suite: evaluations by name, which `trainer.test` runs.
        arguments: of `DistillationModule`.
    """

    def __init__(
        self,
        prepare: Callable[[L.Trainer], int],
        more_callbacks: Callable[[L.Trainer], list[L.Callback]],
        begun: Callable[[], None],
        suite: Mapping[str, Any],
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self.prepare, self.more_callbacks, self.begun, self.suite = prepare, more_callbacks, begun, suite

    def configure_callbacks(self) -> list[L.Callback]:
        """Evaluation, budget and health checks, in training alone."""
        training = self.trainer.state.fn == TrainerFn.FITTING
        return self.more_callbacks(self.trainer) if training else []

    def setup(self, stage: str) -> None:
        """Check the Trainer; prompts come in one endless stream, so epochs end by a number of updates."""
        if stage == "fit":
            self.trainer.fit_loop.epoch_loop.max_steps = self.prepare(self.trainer)

    def configure_model(self) -> None:
        """Load the models; errors name the arguments that gave them."""
        with naming_arguments():
            super().configure_model()

    def on_fit_start(self) -> None:
        """Refuse a Trainer that has no update left, which Lightning would end in silence; a checkpoint sets its own step."""
        step, last = self.trainer.global_step, self.trainer.max_steps
        if not self.trainer.ckpt_path and 0 < last <= step:
            raise ValueError(
                f"this trainer is at update {step} and has reached max_steps={last}: fit would train nothing; make a new one."
            )
        self.student.train()  # a training before this one left it in eval mode

    def on_train_start(self) -> None:
        self.begun()
        super().on_train_start()

    def on_fit_end(self) -> None:
        """The trained model is left in eval mode."""
        self.student.eval()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the evaluations of the model as it is."""
        # Tensors of inference mode could not be used in a training after it.
        with torch.inference_mode(False), torch.no_grad():
            self.generator.update_weights(self.student, None)
            estimates = {
                name: value
                for e in self.suite.values()
                for name, value in e(self.student, self.teachers, self.generator).items()
            }
        self.log_dict({name: estimate.value for name, estimate in estimates.items()}, batch_size=1)


class Closes(L.Callback):
    """Ends the engine and its threads when training ends with an error."""

    def __init__(self, module: TrainerModule):
        self.module = module

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.module.generator.close()


class TrainerData(PromptData):
    """`PromptData` with a single batch for `trainer.test`, whose evaluations have prompts of their own."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(range(1), collate_fn=list)  # type: ignore[arg-type]
