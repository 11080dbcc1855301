"""Accuracy digit by digit, after the model's own prefix, the correct one and one with a wrong last digit."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch

from opd_lightning.contracts import Generator
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.evaluation import Estimate
from opd_lightning.evaluation.estimate import proportion
from opd_lightning.models import Student
from opd_lightning.types import SamplingParams
from opd_lightning.utils.seeds import derive_seed, seeded

KINDS = ("own", "right", "wrong")


class Positions:
    """For each digit of a native answer ("answer 3 1 ..."), the share that is right.

    `position/<i>/own`: in the model's own greedy answer. `position/<i>/right`: after a correct prefix.
    `position/<i>/wrong`: after a prefix whose last digit alone is wrong. `position/own` and so on: means over the
    digits from the second on.

    Args:
        task, tokenizer, max_new_tokens, split, n, template_options: as for `GreedyAccuracy`.
    """

    def __init__(self, task, tokenizer, max_new_tokens, split="test", n=256, template_options=None):
        self.examples = [e for e in task.examples(split) if e.skill == "new"][:n]
        self.tokenizer, self.length = tokenizer, task.length
        self.sampling = SamplingParams(max_new_tokens, temperature=0.0)
        renderer = ChatRenderer(tokenizer, template_options)
        self.prompts = [renderer.render(e.messages) for e in self.examples]
        answers = [f"answer {' '.join(e.extra['digits'])}" for e in self.examples]
        self.answers = torch.tensor([tokenizer.encode(a, add_special_tokens=False) for a in answers])
        assert self.answers.shape[1] == self.length + 1

    @torch.no_grad()
    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """Estimates by name; digits are counted from 1."""
        own = torch.full_like(self.answers, -1)
        for row, completion in enumerate(generator.generate(self.prompts, self.sampling, seed=0)):
            ids = completion.token_ids[: own.shape[1]]
            own[row, : len(ids)] = torch.tensor(ids)
        with seeded(derive_seed(0, "positions"), torch.device("cpu")):
            shift = torch.randint(1, 10, self.answers.shape)
        zero = self.tokenizer.convert_tokens_to_ids("0")
        false = (self.answers - zero + shift) % 10 + zero
        found = {}
        for i in range(1, self.length + 1):
            wrong = self.answers.clone()
            wrong[:, i - 1] = false[:, i - 1]
            kinds = {"own": own[:, i], "right": self.next(student, self.answers[:, :i])}
            if i > 1:
                kinds["wrong"] = self.next(student, wrong[:, :i])
            for kind, said in kinds.items():
                found[f"position/{i}/{kind}"] = proportion((said.cpu() == self.answers[:, i]).double().tolist())
        for kind in KINDS:
            by = [found[f"position/{i}/{kind}"].value for i in range(2, self.length + 1)]
            found[f"position/{kind}"] = Estimate(mean(by))
        return found

    def next(self, student: Student, prefix: torch.Tensor) -> torch.Tensor:
        """The most probable token after each prompt and prefix; prompts of one task are equally long."""
        prompts = torch.tensor([prompt.token_ids for prompt in self.prompts])
        ids = torch.cat([prompts, prefix], 1).to(student.lm.device)
        with student.eval_mode() as lm:
            return lm(input_ids=ids).logits[:, -1].argmax(-1)
