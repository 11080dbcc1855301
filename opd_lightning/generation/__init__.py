"""Generation: inference engines, each a `contracts.Generator`."""

from opd_lightning.generation.transformers import TransformersGenerator

__all__ = ["TransformersGenerator"]
