"""GreedyAnswers: answers to the same held-out prompts before and after training, to read side by side."""

from opd_lightning.contracts import Generator, Renderer, Task
from opd_lightning.types import SamplingParams


class GreedyAnswers:
    """Greedy completions of the first n held-out prompts.

    Args:
        task, split, n: which prompts.
        renderer: the student's.
        max_new_tokens: answers are cut there.
    """

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        max_new_tokens: int,
        split: str = "test",
        n: int = 6,
    ):
        examples = list(task.examples(split))[:n]
        self.prompts = [e.messages[-1]["content"] for e in examples]
        self.renderer = renderer
        self.rendered = [self.renderer.render(example.messages, example.tools) for example in examples]
        self.sampling = SamplingParams(max_new_tokens, temperature=0.0)

    def __call__(self, generator: Generator) -> list[str]:
        """One answer per prompt."""
        done = generator.generate(self.rendered, self.sampling, seed=0)
        return self.renderer.decode_all([completion.token_ids for completion in done])
