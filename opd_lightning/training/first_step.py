"""The first step's check of bfloat16, where trainer.precision=auto has chosen it."""

from typing import Any

import lightning as L

from opd_lightning.preflight.narrow import PROMPTS, agree, differences, sentence
from opd_lightning.utils.ranks import of_all_ranks


class BFloat16Differs(Exception):
    """Products in bfloat16 are too far from those in float32; the message has the numbers. Nothing was trained yet."""


class FirstStep(L.Callback):
    """Compares bfloat16 with float32 on the first batch's prompts, before anything is evaluated or trained.

    It stands before the other callbacks, so that they have written nothing where the run begins anew in float32.
    """

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Raises BFloat16Differs on every device if loss or next token differ too much on one."""
        if trainer.global_step > 0:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        texts = [list(prompt.token_ids) for prompt in data.prompts(0).rendered[:PROMPTS]]
        worst = max(of_all_ranks(differences(module.student, texts)), key=lambda pair: (not agree(*pair), max(pair)))
        if not agree(*worst):
            raise BFloat16Differs(sentence(*worst))
