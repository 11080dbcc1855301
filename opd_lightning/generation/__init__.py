"""Generation: inference engines, each a `contracts.Generator`."""

from opd_lightning.generation.transformers import TransformersGenerator
from opd_lightning.generation.vllm import VLLMGenerator

__all__ = ["TransformersGenerator", "VLLMGenerator"]
