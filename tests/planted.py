"""Tiny folders and tables with one planted fault each, and what `check` says of them; test_planted_faults.py has the table."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opd_lightning.check import examine
from opd_lightning.config import CONF_DIR, compose
from opd_lightning.config.grammar import quote_override
from opd_lightning.environments import SingleTurn
from opd_lightning.models import stand_in
from opd_lightning.toy.world import world_tokenizer
from tests.architectures import SIZES, save
from tests.conftest import save_tiny
from tests.test_replies import tokenizer

FILE = "model.safetensors"
ROWS = [{"prompt": f"copy {i}", "completion": f"answer {i}"} for i in range(12)]
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
ALTERNATE = "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
ALTERNATE += "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


class Folders:
    """Tiny models that all rows share; each is made once, and copied before it is damaged."""

    def __init__(self, root: Path):
        self.root = root
        self.tiny, self.other = save_tiny(root / "tiny", seed=0), save_tiny(root / "other", seed=1)
        self.bytes = str(shutil.copytree(stand_in.model_folder("qwen3"), root / "bytes"))

    def copy(self, of: str, change: Callable[[Path], Any]) -> str:
        """A damaged copy of a folder."""
        folder = self.root / f"copy-{len(list(self.root.iterdir()))}"
        shutil.copytree(of, folder)
        change(folder)
        return str(folder)

    def made(self, architecture: str, **options: Any) -> str:
        """A random model of an architecture."""
        return save(architecture, self.root / f"{architecture}-{len(list(self.root.iterdir()))}", **options)

    def text(self, content: str) -> str:
        """A file with this text."""
        path = self.root / f"text-{len(list(self.root.iterdir()))}.jinja"
        path.write_text(content)
        return str(path)

    def rows(self, *rows: dict) -> str:
        path = self.root / f"rows-{len(list(self.root.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)


@cache
def options(*groups: str) -> DictConfig:
    """The configuration of these options, composed once."""
    return compose(list(groups))


def composed(overrides: list[str]) -> DictConfig:
    """The configuration of overrides; those of plain keys are set on a copy, which is faster than to compose each."""
    parsed = OverridesParser.create().parse_overrides([quote_override(o) for o in overrides])
    keys = [o.type == OverrideType.CHANGE and not (Path(CONF_DIR) / o.key_or_group).is_dir() for o in parsed]
    cfg = options(*(o for o, key in zip(overrides, keys, strict=True) if not key)).copy()
    for override, key in zip(parsed, keys, strict=True):
        if key:
            OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    return cfg


def expect(said: str, sentence: str) -> None:
    """Assert that a line of the check matches; the failures are shown where none does."""
    lines = said.splitlines()
    assert any(re.search(sentence, line) for line in lines), [line for line in lines if not line.startswith("pass")]


def found(folders: Folders, *overrides: str, fast: bool = True) -> str:
    """What the check says, a line each: the state, the thing looked at and the sentence."""
    given = {o.split("=")[0].lstrip("+~") for o in overrides}
    defaults = {
        "model.path": folders.tiny,
        "model.teacher": folders.other,
        "output_dir": str(folders.root / "out"),
        "logger": "none",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "data.batch_size": 2,
        "task.n_train": 8,
        "task.n_eval": 4,
        "evaluation": "none",
    }
    try:
        cfg = composed([*(f"{k}={v}" for k, v in defaults.items() if k not in given), *overrides])
        return "\n".join(f"{f.state} {f.name}: {' '.join(f.text.split())}" for f in examine(cfg, fast))
    except ValueError as error:
        return f"fail: {error}"


def table(folders: Folders, *rows: dict, completion: bool = True) -> list[str]:
    """A table of these rows, with enough others."""
    kept = ROWS if completion else [{"messages": turns(f"n {i}", "ok")} for i in range(12)]
    columns = "{prompt: prompt, completion: completion}" if completion else "{prompt: messages}"
    return ["task=table", f"task.path={folders.rows(*kept, *rows)}", f"task.columns={columns}", "task.n_train=null"]


def turns(*contents: str, **last: Any) -> list[dict]:
    made = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [*made[:-1], made[-1] | last]


def chats(folders: Folders, *chat: list[dict]) -> list[str]:
    return ["method=sft", f"model.path={folders.bytes}", *table(folders, *({"messages": c} for c in chat), completion=False)]


def template(folders: Folders, text: str, of: str | None = None, **tokens: str) -> str:
    """A folder with another chat template, and other special tokens."""

    def change(folder: Path) -> None:
        words = AutoTokenizer.from_pretrained(folder)
        words.chat_template = text
        for name, token in tokens.items():
            setattr(words, name, token)
        words.save_pretrained(folder)

    return folders.copy(of or folders.bytes, change)


def sft(folders: Folders, text: str, *rows: dict, **tokens: str) -> list[str]:
    return ["method=sft", f"model.path={template(folders, text, **tokens)}", *table(folders, *rows)]


def weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})

    return plant


def config(**options: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))

    return plant


def model(folders: Folders, change: Callable[[Path], Any], method: str = "sft", field: str = "model.path") -> list[str]:
    return [f"method={method}", f"{field}={folders.copy(folders.tiny, change)}"]


def written(file: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(text)


def own_head(w: dict) -> dict:
    return w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1}


def adapter(folders: Folders, kind: str) -> str:
    """A folder that PEFT saved, with its kind written over."""
    folder = folders.root / f"adapter-{kind}"
    lm = AutoModelForCausalLM.from_pretrained(folders.tiny)
    get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    if kind != "LORA":
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": kind}))
    return str(folder)


def masked(folders: Folders, ids: list[int], seed: int = 0) -> str:
    """A model whose output layer rules words out."""
    folder = folders.root / f"masked-{len(list(folders.root.iterdir()))}"
    torch.manual_seed(seed)
    sizes = SIZES | {"num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **sizes)).save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)

    def rule_out(w: dict) -> dict:
        bias = torch.zeros_like(w["lm_head.bias"])
        bias[ids] = -float("inf")
        return w | {"lm_head.bias": bias}

    weights(rule_out)(folder)
    return str(folder)


def two_tokenizers(folders: Folders, kind: str, reference: str) -> list[str]:
    """References under a tokenizer of a kind, with a model that has a row for each of its words."""
    folder = padded(folders, 400)
    tokenizer(kind, "chatml").save_pretrained(folder)
    return ["method=sft", f"model.path={folder}", *table(folders, {"prompt": "x", "completion": reference})]


def padded(folders: Folders, rows: int, *extra: str) -> str:
    folder = folders.root / f"padded-{rows}-{len(extra)}"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, pad_token_id=0, eos_token_id=1, **sizes)).save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folders.tiny)
    words.add_tokens(list(extra))
    words.save_pretrained(folder)
    return str(folder)


class Asks(SingleTurn):
    """An environment whose first message the template may refuse."""

    def reset(self, example):
        if example.messages[0]["content"] == "copy 3":
            return [*example.messages, {"role": "user", "content": "again"}]
        return super().reset(example)


class Breaks(SingleTurn):
    def reset(self, example):
        return {}[example.id]


def asks(task):
    return lambda: Asks(task)


def breaks(task):
    return lambda: Breaks(task)


def environment(folders: Folders, name: str) -> list[str]:
    words = sft(folders, ALTERNATE)[1:]
    return ["method=opd", *words, "model.teacher=stand-in://qwen3/1", f"+environment._target_=tests.planted.{name}"]


def settings(option: str) -> list[str]:
    return ["method=sft", "adapter=lora", f"adapter.{option}"]
