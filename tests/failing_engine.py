"""An engine that counts how often it is made and closed, and may write nothing; for tests of what closes it."""

from opd_lightning.generation import TransformersGenerator


class FailingEngine(TransformersGenerator):
    """Generates by transformers, or raises where `fails`."""

    made, closed, fails = 0, 0, True

    def __init__(self, tokenizer, renderer=None, **_):
        super().__init__(tokenizer, renderer)
        FailingEngine.made += 1

    def generate(self, *arguments, **options):
        if FailingEngine.fails:
            raise RuntimeError("the engine is gone")
        return super().generate(*arguments, **options)

    def close(self):
        FailingEngine.closed += 1
