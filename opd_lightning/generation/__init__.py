"""Generation: engines that write completions; `contracts.Generator` is what they offer."""

from opd_lightning.generation.transformers import TransformersGenerator

__all__ = ["TransformersGenerator"]
