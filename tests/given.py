"""An engine whose completions are given by the prompt alone, so that all devices together write what one would."""

import random

from opd_lightning.rollout.dataset import reply_ids
from opd_lightning.types import Completion


class GivenEngine:
    """Of a prompt's completions every second is its reference, so that rewards differ; the others are drawn from its ids."""

    def __init__(self, task, renderer, **_):
        self.references = {}
        for example in task.examples("train"):
            prompt = tuple(renderer.render(example.messages).token_ids)
            self.references[prompt] = list(reply_ids(renderer, example))
        self.ids, self.version = range(3, 20), 0

    def update_weights(self, student, version):
        self.version = version

    def generate(self, prompts, sampling, seed, model=None):
        return [self.given(tuple(p.token_ids), i, sampling.n) for p in prompts for i in range(sampling.n)]

    def given(self, prompt: tuple[int, ...], i: int, n: int) -> Completion:
        draw = random.Random(f"{prompt} {i}")
        ids = self.references[prompt] if n > 1 and i % 2 == 0 else draw.choices(self.ids, k=draw.randint(2, 9))
        return Completion(ids, "stop", [-1.0] * len(ids), self.version)

    def close(self):
        pass
