"""Accuracy by skill: what was learned, what was forgotten, and in whose style."""

from collections import defaultdict
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from opd_lightning.data import encode_chat
from opd_lightning.models import Student
from opd_lightning.rollout.generate import Sampling, decode
from opd_lightning.tasks.base import Task
from opd_lightning.teacher.scorer import Scorer


class GreedyAccuracy:
    """Greedy completions of held-out prompts, judged by the task: content and style apart.

    Args:
        task: gives the examples and the verdicts.
        tokenizer: the student's.
        split: "validation" or "test".
        max_new_tokens: a completion that has not ended by then is judged as it stands.
        batch_size: prompts decoded at a time.
        template_options: keyword arguments for the chat template.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        split: str = "test",
        batch_size: int = 256,
        template_options: dict | None = None,
    ):
        self.task, self.tokenizer, self.batch_size = task, tokenizer, batch_size
        self.examples = task.examples(split)
        self.sampling = Sampling(max_new_tokens, temperature=0.0)
        self.prompts = [encode_chat(tokenizer, e.messages, **(template_options or {})) for e in self.examples]

    @property
    def ids(self) -> list[str]:
        """Ids of the examples that are measured."""
        return [e.id for e in self.examples]

    def __call__(self, student: Student, scorers: Mapping[str, Scorer]) -> dict[str, float]:
        """`<skill>/accuracy` and `<skill>/style` for each skill and for each group of skills ("prior" of "prior/sort")."""
        content, style = defaultdict(list), defaultdict(list)
        for start in range(0, len(self.prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            texts = decode(student, self.prompts[rows], self.sampling, self.tokenizer)
            for example, text in zip(self.examples[rows], texts, strict=True):
                verdict = self.task.verify(example, text)
                for name in {example.skill, example.skill.split("/")[0]}:
                    content[name].append(verdict.content)
                    style[name].append(verdict.style)
        scores = {f"{name}/accuracy": sum(v) / len(v) for name, v in content.items()}
        return scores | {f"{name}/style": sum(v) / len(v) for name, v in style.items()}
