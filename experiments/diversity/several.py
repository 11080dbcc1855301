"""A task with several right answers, any rotation of the digits, and a count of how many of them a model finds."""

from collections.abc import Mapping

from opd_lightning.data import encode_chat
from opd_lightning.evaluation import Estimate
from opd_lightning.evaluation.estimate import average
from opd_lightning.generate import Sampling, complete
from opd_lightning.models import Student
from opd_lightning.seeds import derive_seed, seeded
from opd_lightning.tasks.base import Example, Verdict
from opd_lightning.tasks.world import Digits, WorldTask, input_at, write
from opd_lightning.teacher.scorer import Scorer


def rotations(digits: Digits) -> set[Digits]:
    """All rotations of the digits but themselves; four, or fewer where digits repeat."""
    return {digits[k:] + digits[:k] for k in range(1, len(digits))} - {digits}


class AnyRotation(WorldTask):
    """`rotate` as a question with several answers. References show one of them per question, each as often."""

    def verify(self, example: Example, completion: str) -> Verdict:
        """Content: any of the rotations."""
        if example.skill != "new":
            return super().verify(example, completion)
        wanted = ["".join(map(str, r)) for r in sorted(rotations(tuple(map(int, example.id.split("-")[1]))))]
        verdicts = [
            super(AnyRotation, self).verify(Example(example.id, example.messages, extra={"digits": w}), completion)
            for w in wanted
        ]
        return max(verdicts, key=lambda v: v.content, default=Verdict(0.0, 0.0))

    def _example(self, operation: str, position: int, skill: str) -> Example:
        plain = super()._example(operation, position, skill)
        if skill != "new":
            return plain
        digits = input_at(position, self.length)
        some = sorted(rotations(digits)) or [digits]
        shown = write(some[position * 7919 % 101 % len(some)], self.style)
        return Example(plain.id, plain.messages, shown, shown, shown, skill, plain.extra)


class Found:
    """How many of the right answers turn up among the samples of a question: `found/share` of all, `found/pass_at_1`.

    Args:
        task, tokenizer, max_new_tokens, split, n, template_options: as for `GreedyAccuracy`.
        samples: per question, at temperature 1.
    """

    ends_only = True

    def __init__(self, task, tokenizer, max_new_tokens, samples=16, split="test", n=64, template_options=None):
        self.examples = [e for e in task.examples(split) if e.skill == "new"][:n]
        self.task, self.tokenizer, self.samples = task, tokenizer, samples
        self.sampling = Sampling(max_new_tokens)
        self.prompts = [encode_chat(tokenizer, e.messages, **(template_options or {})) for e in self.examples]

    def __call__(self, student: Student, scorers: Mapping[str, Scorer]) -> dict[str, Estimate]:
        """Means over questions."""
        prompts = [p for p in self.prompts for _ in range(self.samples)]
        with student.evaluating() as lm, seeded(derive_seed(0, "found"), lm.device):
            texts = complete(lm, prompts, self.sampling, self.tokenizer).texts(self.tokenizer)
        share, right = [], []
        for i, example in enumerate(self.examples):
            some = texts[i * self.samples : (i + 1) * self.samples]
            good = ["".join(c for c in t if c.isdigit()) for t in some if self.task.verify(example, t).content >= 1]
            share.append(len(set(good)) / max(1, len(rotations(tuple(map(int, example.id.split("-")[1]))))))
            right.append(len(good) / self.samples)
        return {"found/share": average(share), "found/pass_at_1": average(right)}
