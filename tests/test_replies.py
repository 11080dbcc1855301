"""What is trained is what the chat template says: ends of replies, thinking, tokens at the border, special tokens in texts."""

import json
import shutil
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd_lightning.check import examine
from opd_lightning.config import compose
from opd_lightning.config.overrides import explain
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.rollout import DatasetRollout
from opd_lightning.toy.world import world_tokenizer
from opd_lightning.training.run import run
from opd_lightning.types import Example, Prompts, SamplingParams

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),  # Qwen2.5, SmolLM2
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        "<eos>",
    ),
    "qwen3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "{% set parts = m.content.split('</think>') %}"
        "<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n"
        "{{ parts[-1].lstrip('\n') }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<|im_end|>",
    ),
    "thinks": (  # Qwen3-Thinking: the prompt itself opens the thought
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' not in m.content %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "<|im_end|>",
    ),
    "open": (  # nothing closes a reply
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "<eos>",
    ),
}
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"]
SPECIAL += ["<|user|>", "<|assistant|>"]
KINDS = ("bytes", "metaspace_first", "metaspace_always", "prepend")
WORDS = ["a", "b", " ", "\n", "x y", "é", "Seven.", "<think>", "</think>", "<|im_end|>", "<eos>", "<bos>", "  ", "[INST]"]


@cache
def tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE as of Qwen and Llama 3, and three ways in which SentencePiece's dummy prefix is written."""
    if kind == "bytes":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        vocabulary = {c: i for i, c in enumerate(sorted(alphabet))} | {"ĊĊ": 256}  # a blank line is one token, as in Qwen
        core = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        letters = sorted({*"▁abxyzSevn.é\n[]INT/<>|thikmd_eorsug:pl"})
        pieces = {f"<0x{i:02X}>": i for i in range(256)} | {c: 256 + i for i, c in enumerate(letters)}
        pieces |= {"▁a": len(pieces), "<unk>": len(pieces) + 1}
        core = Tokenizer(models.BPE(pieces, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "prepend":
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.removeprefix("metaspace_"), split=False)
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    made.chat_template = TEMPLATES[template][0]
    return made


def chat(prompt: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def whole(words: PreTrainedTokenizerFast, messages: list[dict], **options) -> list[int]:
    return list(words.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_reply_is_the_templates(kind, template):
    renderer, words = ChatRenderer(tokenizer(kind, template)), tokenizer(kind, template)
    end = words.convert_tokens_to_ids(TEMPLATES[template][1])
    assert renderer.end_id == end and set(renderer.end_ids) == {end, words.eos_token_id}
    assert renderer.reply("Seven.", chat("a", "")[:1])[-1] == end


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    template=st.sampled_from([t for t in TEMPLATES if t != "thinks"]),
    prompt=st.lists(st.sampled_from([w for w in WORDS if "eos" not in w and "|" not in w and "bos" not in w]), min_size=1),
    reply=st.lists(st.sampled_from(["a", "b", "x y", "é", "Seven.", "\n", " "]), min_size=1),
    thinking=st.sampled_from([None, True, False]),
)
def test_prompt_and_reference_are_the_rendered_chat(kind, template, prompt, reply, thinking):
    """Token for token up to the end of the reply, for every template whose prompt is how its chat begins."""
    words, options = tokenizer(kind, template), {} if thinking is None else {"enable_thinking": thinking}
    renderer, said = ChatRenderer(words, options), chat("".join(prompt), "".join(reply))
    assert renderer.render(said[:1]).token_ids == whole(words, said[:1], add_generation_prompt=True, **options)
    ids = [*renderer.render(said[:1]).token_ids, *renderer.reply(said[1]["content"], said[:1])]
    expected = whole(words, said, **options)
    if not renderer.continuation(said)[1]:  # a blank at the border and what follows are one token in the whole
        assert renderer.template.text(said[:1], reply_follows=True)[-1].isspace()
        assert (words.decode(expected) + "<eos>").startswith(words.decode(ids))
    elif template == "open":
        assert ids == [*expected, words.eos_token_id]
    else:
        assert ids == expected[: len(ids)] and renderer.end_id not in expected[len(ids) :]


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(["chatml", "gemma", "llama2", "qwen3"]),
    prompt=st.lists(st.sampled_from(WORDS), min_size=1),
    reply=st.lists(st.sampled_from(WORDS), min_size=1),
)
def test_text_stays_text(kind, template, prompt, reply):
    """Special tokens of prompt and reference are those of the template alone, and the text is all there."""
    words = tokenizer(kind, template)
    renderer, said = ChatRenderer(words), chat("".join(prompt), "".join(reply))
    ids = [*renderer.render(said[:1]).token_ids, *renderer.reply(said[1]["content"], said[:1])]
    special = set(words.convert_tokens_to_ids(SPECIAL))
    bare = [*renderer.render(chat("a", "")[:1]).token_ids, *renderer.reply("b", chat("a", "")[:1])]
    assert [i for i in ids if i in special] == [i for i in bare if i in special]
    for word in ("<|im_end|>", "<bos>"):
        assert words.decode(ids, skip_special_tokens=True).count(word) >= "".join(prompt).count(word)
    loose = ChatRenderer(words, split_special_tokens=False)
    assert loose.render(said[:1]).token_ids == whole(words, said[:1], add_generation_prompt=True)


def test_an_end_token_in_the_reference_is_trained_once():
    words = tokenizer("bytes", "chatml")
    renderer, prompt = ChatRenderer(words), chat("a", "")[:1]
    plain = renderer.reply("Seven.", prompt)
    assert renderer.reply("Seven.<|im_end|>\n", prompt) == renderer.reply("Seven.<eos>", prompt) == plain
    assert plain.count(renderer.end_id) == 1 and renderer.reply("Seven.<|im_end|>") == renderer.reply("Seven.")


def test_a_prompt_that_opens_the_thought_is_not_opened_twice():
    words = tokenizer("bytes", "thinks")
    renderer, prompt = ChatRenderer(words), chat("a", "")[:1]
    for reference, written in (("b", "\n</think>\n\nb"), ("<think>\nx\n</think>\n\nb", "x\n</think>\n\nb")):
        text = words.decode([*renderer.render(prompt).token_ids, *renderer.reply(reference, prompt)])
        assert text == f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n{written}<|im_end|>"


def test_a_template_that_drops_the_thought_is_refused_by_row():
    words = tokenizer("bytes", "chatml")
    dropping = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    dropping.chat_template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")  # as of R1's distillates
    renderer = ChatRenderer(dropping)
    example = Example("row 7", chat("a", "")[:1], completion="b")
    with pytest.raises(ValueError, match=r"example row 7: the chat template .* writes '<think>.*model\.chat_template"):
        DatasetRollout(renderer, SamplingParams(9))(Prompts([example], [renderer.render(example.messages)]))


@pytest.mark.parametrize("part", ["content", "tool_calls", "name"])
def test_special_tokens_are_found_wherever_a_turn_has_text(part):
    words = tokenizer("bytes", "chatml")
    special = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    special.chat_template = "{% for m in messages %}{{ m.content }}|{{ m.tool_calls }}|{{ m.name }}<eos>{% endfor %}"
    turn = {"role": "user", "content": "a", "tool_calls": [], "name": "n"}
    turn[part] = [{"function": {"name": "x<eos>y"}}] if part == "tool_calls" else "x<eos>y"
    assert ChatRenderer(special).render([turn]).token_ids.count(special.eos_token_id) == 1


DATED = (
    "{% set today = strftime_now('%d %b %Y') if strftime_now is defined else '?' %}"
    "{{ today }} {% for m in messages %}{{ '= ' if m.role == 'assistant' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def test_a_date_in_the_template_is_that_of_the_start(small, tmp_path, monkeypatch):
    words = tokenizer("bytes", "open")
    dated = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    dated.chat_template = DATED
    old = ChatRenderer(dated, today=datetime(2024, 7, 26))
    assert dated.decode(old.render(chat("a", "")[:1]).token_ids).startswith("26 Jul 2024 a")
    assert old.with_options({"x": 1}).template.today == datetime(2024, 7, 26)
    (tmp_path / "dated.jinja").write_text(DATED)
    cfg = small("method=sft", "trainer.max_steps=1", "evaluation=none", f"model.chat_template={tmp_path}/dated.jinja")
    folder = run(cfg)
    status = json.loads((folder / "status.json").read_text())
    status["started"] = "2024-07-26 00:00:00"
    (folder / "status.json").write_text(json.dumps(status))
    from opd_lightning.preflight.components import assemble

    assert assemble(cfg, folder).renderer.template.today == datetime(2024, 7, 26)


def other_end(folder: Path) -> Path:
    """The shipped teacher with a template that closes replies with another token."""
    source = Path(__file__).resolve().parents[1] / "opd_lightning" / "toy" / "assets" / "world" / "teacher"
    shutil.copytree(source, folder)
    changed = AutoTokenizer.from_pretrained(folder)
    changed.chat_template = changed.chat_template.replace("<eos>", "<pad>")
    changed.eos_token = "<pad>"
    changed.save_pretrained(folder)
    return folder


def states(*overrides: str) -> dict[str, str]:
    return {f.name: f"{f.state}: {f.text}" for f in examine(compose(list(overrides)), fast=True)}


def test_a_pair_that_ends_differently_is_refused_unless_allowed(small, tmp_path):
    teacher = f"teacher.path={other_end(tmp_path / 'teacher')}"
    found = states("method=opd", teacher)["teacher's replies"]
    assert found.startswith("fail") and "model.end_token='<pad>'" in found
    with pytest.raises(ValueError, match=r"Set model\.end_token='<eos>'"):
        run(small("method=opd", teacher))
    assert states("method=opd", teacher, "model.end_token='<eos>'")["teacher's replies"].startswith("warn")
    assert "teacher's replies" not in states("method=opd", teacher, "model.end_token='<pad>'")
    assert "is no token of the model" in states("method=opd", "model.end_token=nope")["parts"]


def test_the_end_can_be_chosen_on_the_command_line_and_is_recorded(small):
    assert explain(["model.end_token=<pad>"]) is None
    folder = run(small("method=sft", "model.end_token=<pad>", "evaluation=none", "trainer.max_steps=1"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["end_token"] == "<pad>"


def test_a_chosen_end_is_trained_and_ends_rollouts():
    words = world_tokenizer()
    renderer = ChatRenderer(words, end_token="<pad>")
    assert renderer.reply("1 2", chat("copy 1 2", "")[:1])[-1] == words.pad_token_id
    assert renderer.end_ids == [words.pad_token_id]  # no other, as the option says
    assert set(renderer.known_ends) == {words.pad_token_id, words.eos_token_id}


def test_a_base_model_whose_config_ends_elsewhere_is_told(tmp_path):
    source = Path(__file__).resolve().parents[1] / "opd_lightning" / "toy" / "assets" / "world" / "start"
    shutil.copytree(source, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    found = examine(compose(["method=sft", f"model.path={tmp_path / 'base'}"]), fast=True)
    assert any(f.state == "warn" and "may never write" in f.text for f in found if f.name == "replies")


def test_planted_texts_are_found_before_training(tmp_path):
    rows = [{"prompt": f"copy {i}", "completion": f"answer {i}{' <eos>' if i == 3 else ''}"} for i in range(12)]
    rows[5]["prompt"] += " <eos>"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = ["method=sft", "task=table", f"task.path={tmp_path}/rows.jsonl", "task.columns.completion=completion"]
    found = [f"{f.name}: {f.text}" for f in examine(compose(cfg), fast=True) if f.state == "warn"]
    assert any("end with an end token; it is trained once" in text for text in found)
    assert any("spell special tokens" in text and "'<eos>'" in text for text in found)
