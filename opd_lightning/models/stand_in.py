"""Stand-ins: random models and synthetic rows of the right shape, to test a recipe end to end without the hub.

`stand-in://qwen3` as a model is a random one of that architecture, with a byte-level tokenizer and a chat template with a
thinking switch; as data, `stand-in://openthoughts` has that data set's columns. They verify that a recipe composes,
binds, renders its prompts and trains, but not its memory, speed, quality, or the real template and data.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from opd_lightning.models.architecture import class_of

SCHEME = "stand-in://"

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' and enable_thinking is defined %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

NOT_VERIFIED = (
    "stand-ins: the weights are random, the tokenizer reads bytes, the template and the rows are made up and lengths are cut. "
    "Not verified: memory, speed, quality, the model's own chat template, the data's real columns and contents."
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the template's special tokens."""
    special = ["<|pad|>", "<|end|>", "<|start|>"]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], chat_template=TEMPLATE
    )


def model_folder(name: str, field: str = "model.path") -> str:
    """The folder of a random model, created if it does not exist.

    Args:
        name: an architecture of transformers, with an optional seed: "qwen3/1" is another model than "qwen3".
        field: the configuration's field, for errors.

    Raises:
        ValueError: transformers has no such architecture, or no causal language model of it.
    """
    architecture, _, seed = name.partition("/")
    folder = Path(tempfile.gettempdir()) / "opd_lightning_stand_ins" / f"{architecture}-{seed or 0}"
    if (folder / "tokenizer_config.json").is_file():
        return str(folder)
    byte_tokenizer = tokenizer()
    sizes = dict(
        vocab_size=len(byte_tokenizer) + 5,  # padded, as real ones are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        pad_token_id=byte_tokenizer.pad_token_id,
        eos_token_id=byte_tokenizer.eos_token_id,
        bos_token_id=None,
    )
    try:
        config = AutoConfig.for_model(architecture, **sizes)
    except ValueError as error:
        near = get_close_matches(architecture, CONFIG_MAPPING, n=1) or ["qwen3"]
        raise ValueError(
            f"{SCHEME}{architecture} is no architecture of transformers; did you mean {SCHEME}{near[0]}?"
        ) from error
    class_of(config, f"{field}={SCHEME}{architecture}")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")  # other processes may create it too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        AutoModelForCausalLM.from_config(config).save_pretrained(partial)
    byte_tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return str(folder)


def _sum(i: int) -> tuple[int, int, int]:
    return 3 * i + 1, 7 * i + 2, 10 * i + 3


def _boxed(i: int) -> str:
    a, b, c = _sum(i)
    return f"Adding {a} and {b} gives {c}. The answer is \\boxed{{{c}}}."


def _question(i: int) -> str:
    return "What is {} + {}?".format(*_sum(i)[:2])


def _tool_use(i: int) -> dict[str, Any]:
    arguments = f'{{"town": "{i}"}}'
    return {
        "prompt": f"Find the weather of town {i}. Tools: weather(town).",
        "golden_response": [f"Action: weather\nAction Input: {arguments}"],
        "golden_answer": [{"Action": "weather", "Action_Input": arguments}],
    }


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "openthoughts": lambda i: {"problem": _question(i), "solution": _boxed(i), "Answer": str(_sum(i)[2])},
    "math500": lambda i: {"problem": _question(i + 1000), "solution": _boxed(i + 1000), "answer": str(_sum(i + 1000)[2])},
    "deepmath": lambda i: {"question": _question(i), "final_answer": str(_sum(i)[2]), "r1_solution_1": _boxed(i)},
    "tooluse": _tool_use,
    "tooluse_eval": lambda i: _tool_use(i + 1000),
    "sciknoweval": lambda i: {
        "question": f"Which of these is element number {i + 1}?",
        "choices": {"text": [f"element {i + k}" for k in (1, 2, 3, 4)], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
        "type": "mcq-4-choices",
        "domain": "Chemistry",
        "details": {"level": "L3"},
    },
    "articles": lambda i: {
        "article": f"On day {i} of the year a storm reached town {i}.",
        "question": f"Which town did the storm of day {i} reach?",
        "answer": f"The storm of day {i} reached town {i}.",
    },
}
"""Synthetic rows by data set: a function of the row's number."""


def rows(name: str, n: int = 60) -> list[dict[str, Any]]:
    """Synthetic rows with the columns of a data set."""
    if name not in ROWS:
        raise ValueError(f"{SCHEME}{name} is no stand-in; choose one of {', '.join(ROWS)}.")
    return [ROWS[name](i) for i in range(n)]
