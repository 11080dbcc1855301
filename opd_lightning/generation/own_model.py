"""OwnModel: a language model beside the student that replies to chats, such as a user in an environment."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from opd_lightning.generation.transformers import TransformersGenerator
from opd_lightning.models import Pretrained
from opd_lightning.models.flops import Sizes
from opd_lightning.types import Cost, Messages, SamplingParams


class OwnModel:
    """A model with its own tokenizer and chat template, which is not trained; loaded when it is first asked.

    Args:
        path: folder, hub id or run.
        sampling: of its replies.
        dtype, attention, template_options: see `Pretrained`.
        generator: makes the engine from its tokenizer and renderer; None takes `TransformersGenerator`.
        field: the configuration key of the path, for errors.

    Raises:
        ValueError: there is no such model, or it has no chat template.
    """

    def __init__(
        self,
        path: str,
        sampling: SamplingParams,
        dtype: str = "float32",
        attention: str = "sdpa",
        template_options: dict | None = None,
        generator: Callable[..., Any] | None = None,
        field: str = "environment.user.path",
    ):
        self.source = Pretrained(path, dtype, attention, template_options=template_options or {}, field=field)
        self.renderer, self.sampling, self.window = self.source.renderer(), sampling, self.source.window()
        self.renderer.render([{"role": "user", "content": "x"}])
        make = TransformersGenerator if generator is None else generator
        self.generator = make(self.renderer.tokenizer, self.renderer)
        self.lm: Any = None

    def __call__(self, chats: Sequence[Messages], seed: int) -> list[str | None]:
        """A reply to each chat, all drawn at once from the seed; None to a chat that leaves no room in the model's window."""
        return [text for text, _ in self.write(chats, seed)]

    def write(self, chats: Sequence[Messages], seed: int) -> list[tuple[str | None, Cost]]:
        """The replies with the cost of each, the tokens that it read and wrote among it."""
        if self.lm is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")
            lm: Any = self.source.model()
            self.lm = lm.to(device).eval()
        prompts = [self.renderer.render(chat) for chat in chats]
        fits = [i for i, p in enumerate(prompts) if len(p.token_ids) + self.sampling.max_new_tokens <= self.window]
        sizes = Sizes.of(self.lm)
        found: list[tuple[str | None, Cost]] = [(None, Cost())] * len(prompts)
        if fits:
            done = self.generator.generate([prompts[i] for i in fits], self.sampling, seed, model=lambda: nullcontext(self.lm))
            for i, completion in zip(fits, done, strict=True):
                pair = len(prompts[i].token_ids), len(completion.token_ids)
                text = self.renderer.decode(completion.token_ids).strip()
                found[i] = text, Cost(sum(pair), sizes.write([pair]))
        return found
