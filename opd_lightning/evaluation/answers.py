"""Answers to the same held-out prompts before and after training, for a person to read side by side."""

from transformers import PreTrainedTokenizerBase

from opd_lightning.data.renderer import encode_chat
from opd_lightning.generation.transformers import Sampling, complete
from opd_lightning.models import Student
from opd_lightning.types import Task


class GreedyAnswers:
    """Greedy completions of the first n held-out prompts.

    Args:
        task, split, n: which prompts.
        tokenizer: the student's.
        max_new_tokens: answers are cut there.
        template_options: keyword arguments for the chat template.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        split: str = "test",
        n: int = 6,
        template_options: dict | None = None,
    ):
        examples = list(task.examples(split))[:n]
        self.prompts = [e.messages[-1]["content"] for e in examples]
        self.ids = [encode_chat(tokenizer, e.messages, **(template_options or {})) for e in examples]
        self.tokenizer, self.sampling = tokenizer, Sampling(max_new_tokens, temperature=0.0)

    def __call__(self, student: Student) -> list[str]:
        """One answer per prompt."""
        with student.evaluating() as lm:
            return complete(lm, self.ids, self.sampling, self.tokenizer).texts(self.tokenizer)
