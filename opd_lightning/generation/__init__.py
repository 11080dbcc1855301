"""Generation: inference engines, each a `contracts.Generator`."""

from opd_lightning.generation.own_model import OwnModel
from opd_lightning.generation.transformers import TransformersGenerator
from opd_lightning.generation.vllm import VLLMGenerator
from opd_lightning.generation.vllm_server import VLLMServerGenerator

__all__ = ["OwnModel", "TransformersGenerator", "VLLMGenerator", "VLLMServerGenerator"]
