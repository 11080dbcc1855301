"""Answers to the same held-out prompts before and after training, for a person to read side by side."""

from transformers import PreTrainedTokenizerBase

from opd_lightning.contracts import Generator, Task
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.types import SamplingParams


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
        self.renderer = ChatRenderer(tokenizer, template_options)
        self.rendered = [self.renderer.render(example.messages) for example in examples]
        self.sampling = SamplingParams(max_new_tokens, temperature=0.0)

    def __call__(self, generator: Generator) -> list[str]:
        """One answer per prompt."""
        done = generator.generate(self.rendered, self.sampling, seed=0)
        return self.renderer.decode_all([completion.token_ids for completion in done])
