"""Planted faults: `check` finds each before training, and says it. Rows are named by the lines of a bug report, A1 to C20."""

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from opd_lightning.config.overrides import key_error
from opd_lightning.models import Pretrained
from opd_lightning.training.run import run
from tests.planted import (
    ALTERNATE,
    CHATML,
    DATED,
    ROWS,
    THINKS,
    adapter,
    chats,
    config,
    environment,
    expect,
    found,
    masked,
    model,
    own_head,
    padded,
    settings,
    sft,
    table,
    template,
    turns,
    two_tokenizers,
    weights,
    written,
)
from tests.test_loading import POINTER, cut, without

pytestmark = pytest.mark.usefixtures("no_logs")
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
ENDS_WITH_PAD = CHATML.replace("<|end|>", "<|pad|>")
CACHED = ("A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "B11", "B12", "B13", "B15", "B17", "B18", "C19", "C20")
"""Rows of the fast suite; their siblings, named behind a comma, and what loads weights are slow."""

FAULTS = {
    "A1": (lambda f: sft(f, ENDS_WITH_PAD), "warn replies: replies end with '<|pad|>'; .* may never write"),
    "A1, teacher": (
        lambda f: [
            "method=opd",
            f"model.path={f.bytes}",
            f"teacher.path={template(f, ENDS_WITH_PAD, eos_token='<|pad|>')}",
        ],
        "fail teacher's replies: .* would unlearn to end",
    ),
    "A2": (lambda f: sft(f, THINKS), "fail replies: example .*: the chat template of the model writes '<think>"),
    "A2, block": (
        lambda f: [*sft(f, THINKS), "model.chat_template=" + f.text(CHATML)],
        "pass replies: prompt and reference have the tokens",
    ),
    "A3": (lambda f: two_tokenizers(f, "bytes", "\n\nx"), "warn replies: 1 of .* are tokenized separately"),
    "A3, prefix": (
        lambda f: two_tokenizers(f, "metaspace_first", "a"),
        "pass replies: prompt and reference have the tokens of the rendered chat",
    ),
    "A4": (lambda f: [*sft(f, CHATML), "task.max_new_tokens=8"], "warn references: .*none teaches how a reply ends"),
    "A4, some": (
        lambda f: [*sft(f, CHATML, {"prompt": "x", "completion": "y" * 90}), "task.max_new_tokens=40"],
        r"warn references: 1 of \d+ references .*task.max_new_tokens=91 fits all",
    ),
    "A5": (
        lambda f: chats(f, turns("a", "", tool_calls=CALL)),
        r"fail data: .*jsonl:13 lacks its tool calls \(f\): the chat template leaves",
    ),
    "A5, weight": (
        lambda f: chats(f, turns("a", "b", weight=0)),
        "fail parts: .*jsonl:13: the reply to learn has weight=0, so it is not to be trained; leave such rows out",
    ),
    "A5, train": (lambda f: chats(f, turns("a", "b", train=False)), "the reply to learn has train=False, so it is not"),
    "A5, half": (lambda f: chats(f, turns("a", "b", weight=0.5)), "has weight=0.5, and replies here count alike"),
    "A5, mask": (lambda f: chats(f, turns("a", "b", mask=1)), "has mask=1, which programs read in different ways"),
    "A5, detail": (lambda f: chats(f, turns("a", "b", training_detail=[{"train": False}])), "has training_detail="),
    "A5, skipped": (
        lambda f: [*chats(f, turns("a", "b", weight=0)), "task.bad_rows=skip"],
        "warn data: 1 malformed rows are left out, the first: .*weight=0",
    ),
    "A5, earlier": (
        lambda f: chats(f, [*turns("a", "b", weight=1), *turns("c", "d", weight=1)]),
        "warn data: 1 rows mark turns before the last reply for training",
    ),
    "A5, column": (
        lambda f: ["method=sft", *table(f, {"prompt": "x", "completion": "y", "completion_mask": [0, 1]})],
        "warn data: the column 'completion_mask' has something in 1 rows .*all of a reply is trained",
    ),
    "A6": (
        lambda f: sft(f, CHATML, {"prompt": "x", "completion": "Seven.<|end|>\n"}),
        "warn replies: 1 of .* end with an end token; it is trained once",
    ),
    "A6, user": (
        lambda f: sft(f, CHATML, {"prompt": "say <|start|>", "completion": "y"}),
        "warn special tokens: 1 of .*'<|start|>'",
    ),
    "A6, alone": (
        lambda f: sft(f, CHATML, {"prompt": "x", "completion": "<|end|>"}),
        "fail replies: the reference of example .*jsonl:13 is an end token alone, which teaches to say nothing",
    ),
    "A7": (
        lambda f: [*chats(f, turns("a", "b", "c", "d")[::2] + turns("", "e")[1:]), "model.chat_template=" + f.text(ALTERNATE)],
        "fail data: .*jsonl:13: .*roles must alternate.*task.bad_rows=skip",
    ),
    "A7, environment": (lambda f: environment(f, "asks"), "fail data: .*jsonl:4: .*roles must alternate.*task.bad_rows=skip"),
    "A7, reset": (
        lambda f: environment(f, "breaks"),
        "fail data: the environment cannot begin an episode of example .*KeyError.*mend its reset",
    ),
    "A7, skipped": (
        lambda f: [*environment(f, "asks"), "task.bad_rows=skip"],
        "warn data: 1 malformed rows are left out, .*jsonl:4",
    ),
    "A8": (
        lambda f: ["method=sft", *table(f, {"messages": str(turns("a", "b"))}, completion=False)],
        "fail parts: .*looks like a chat and is no JSON",
    ),
    "A8, parts": (
        lambda f: chats(f, [{"role": "user", "content": [{"type": "image"}]}]),
        "fail parts: .*a part that is no text \\(image\\)",
    ),
    "A9": (
        lambda f: ["method=opd", f"model.path={template(f, ENDS_WITH_PAD, eos_token='<|pad|>')}", f"teacher.path={f.bytes}"],
        r"fail teacher's replies: .*Set model\.end_token='<|end|>'",
    ),
    "A9, allowed": (
        lambda f: [
            "method=opd",
            f"model.path={template(f, ENDS_WITH_PAD, eos_token='<|pad|>')}",
            f"teacher.path={f.bytes}",
            "model.end_token=<|pad|>",
        ],
        r"warn teacher's replies: .*is counted for '<\|pad\|>', as model\.end_token says",
    ),
    "A10, date": (lambda f: sft(f, DATED), "pass date: the chat template writes a date; this run keeps"),
    "B11": (lambda f: model(f, config(num_hidden_layers=3)), "fail student's weights: .*missing and to be drawn at random"),
    "B11, teacher": (
        lambda f: model(f, without("up_proj"), "opd", "teacher.path"),
        "fail teacher's weights: teacher.path=.*missing and to be drawn",
    ),
    "B11, prefix": (
        lambda f: model(f, weights(lambda w: {f"_orig_mod.{k}": v for k, v in w.items()})),
        "warn student's weights: .*_orig_mod.*left out",
    ),
    "B11, tied": (
        lambda f: model(f, weights(own_head)),
        "warn student's weights: .*says tie_word_embeddings=true, and its output layer differs from its embedding",
    ),
    "B11, tied teacher": (
        lambda f: model(f, weights(own_head), "opd", "teacher.path"),
        "warn teacher's weights: teacher.path=.*differs from its embedding",
    ),
    "B11, no head": (
        lambda f: model(f, config(tie_word_embeddings=False)),
        "fail student's weights: .*lm_head.weight; save the model with its output layer",
    ),
    "B12": (lambda f: model(f, written("model.safetensors", POINTER)), "fail .*is a pointer of Git LFS"),
    "B12, cut": (lambda f: model(f, cut("model.safetensors")), "fail student's weights: .*is cut off"),
    "B12, quantised": (
        lambda f: model(f, weights(lambda w: {k: v.to(torch.int8) if "q_proj" in k else v for k, v in w.items()})),
        "fail student's weights: .*q_proj.weight is stored as I8, quantised, and config.json has no quantization_config",
    ),
    "B12, width": (lambda f: model(f, config(hidden_size=24)), "fail student's weights: .*of another shape"),
    "B12, no tokenizer": (
        lambda f: model(f, lambda folder: [file.unlink() for file in folder.glob("tokenizer*")]),
        "fail parts: .*has no tokenizer",
    ),
    "B13": (lambda f: ["method=sft", f"model.path={adapter(f, 'PROMPT_TUNING')}"], "the kind PROMPT_TUNING, .*not supported"),
    "B13, prefix": (lambda f: ["method=sft", f"model.path={adapter(f, 'PREFIX_TUNING')}"], "the kind PREFIX_TUNING"),
    "B13, LoRA": (lambda f: ["method=sft", f"model.path={adapter(f, 'LORA')}"], "pass student's weights: .*adapter-LORA"),
    "B15": (lambda f: ["method=sft", "model.path=stand-in://qwen2_5_vl"], "fail parts: model.path=.*no causal language model"),
    "B15, teacher": (
        lambda f: ["method=opd", "teacher.path=stand-in://qwen2_vl"],
        "fail parts: teacher.path=stand-in://qwen2_vl is of the architecture",
    ),
    "B15, unknown": (
        lambda f: ["method=sft", "model.path=stand-in://qwen33"],
        r"fail parts: .*did you mean stand-in://qwen3\?",
    ),
    "B17": (lambda f: ["method=sft", f"model.path={padded(f, 48)}"], "pass tokenizer: .*padded to 48: rows from 32 on"),
    "B17, few": (lambda f: ["method=sft", f"model.path={padded(f, 24)}"], "fail tokenizer: .*the model has 24; give"),
    "B18": (
        lambda f: ["method=opd", f"model.path={f.tiny}", f"teacher.path={padded(f, 40, '<a>')}"],
        "warn teacher's tokenizer: .*left out: 1 token that only the teacher has",
    ),
    "C19": (
        lambda f: ["method=sft", "model.dtype=bfloat16"],
        "fail configuration: model.dtype=bfloat16 with trainer.precision=auto",
    ),
    "C19, bf16": (lambda f: ["method=sft", "trainer.precision=bf16-true"], "warn precision: weights are trained in bfloat16"),
    "C20": (lambda f: ["method=sft", "+trainer.accumulate_grad_batches=4"], "fail configuration: .*data.batch_size"),
    "C20, inf": (lambda f: ["method=sft", "optim.lr=inf"], "fail configuration: optim.lr=inf is no finite number"),
    "C20, warm-up": (
        lambda f: ["method=sft", "optim.warmup_steps=500"],
        "warn warm-up: optim.warmup_steps=500 outlasts the run of 2 updates",
    ),
    "C20, rank": (lambda f: settings("r=0"), "fail parts: adapter.r=0 must be a whole number of at least 1"),
    "C20, alpha": (lambda f: settings("lora_alpha=-4"), "fail parts: adapter.lora_alpha=-4 must be positive"),
    "C20, dropout": (lambda f: settings("lora_dropout=1.5"), r"fail parts: adapter.lora_dropout=1.5 must lie in \[0, 1\)"),
    "C20, module": (lambda f: settings("target_modules=[q_proj,v_prj]"), "'v_prj' is no module .*; did you mean v_proj"),
    "C20, pattern": (lambda f: settings("target_modules=qv"), "adapter.target_modules='qv' matches no module"),
    "C20, layer": (
        lambda f: [*settings("target_modules=[q_proj]"), "+adapter.layers_to_transform=[7]"],
        "adapter.layers_to_transform=7 is no layer of .*0 to 1",
    ),
    "C20, fused": (
        lambda f: ["optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas", "trainer=fsdp2"],
        "fail parts: optim.optimizer=SGD has no fused=true on weights that trainer=fsdp2 shards; set .*fused=false",
    ),
    "C20, closure": (
        lambda f: [
            "optim.optimizer._target_=torch.optim.LBFGS",
            *(f"~optim.optimizer.{key}" for key in ("betas", "fused", "weight_decay")),
        ],
        "fail parts: optim.optimizer=torch.optim.LBFGS cannot take a step here",
    ),
}
LOADED = {
    "B14": (
        lambda f: ["method=sdft", "model.path=stand-in://mixtral", "adapter=lora", "teacher=ema"],
        "pass architecture: Mixtral",
    ),
    "B14, GPT-2": (
        lambda f: ["method=sdft", "model.path=stand-in://gpt2", "adapter=lora", "teacher=ema"],
        "pass architecture: GPT2LMHeadModel",
    ),
    "B15, bidirectional": (
        lambda f: ["method=sft", f"model.path={f.made('gemma3_text', use_bidirectional_attention=True)}"],
        "fail architecture: .*reads the tokens behind a position too",
    ),
    "B15, sdpa": (lambda f: ["method=sft", "model.path=stand-in://gpt_oss"], "pass architecture: GptOss"),
    "B16": (
        lambda f: ["method=opd", f"model.path={masked(f, [])}", f"teacher.path={masked(f, [7, 9])}"],
        r"fail logits: teacher rules out 2 tokens \(logits of -inf\); .*loss/divergence=jsd",
    ),
    "B16, remedy": (
        lambda f: ["loss/divergence=jsd", f"model.path={masked(f, [])}", f"teacher.path={masked(f, [7, 9])}"],
        "warn logits: teacher rules out 2 tokens .*take such a token's probability as 0, and stay finite",
    ),
    "B16, student": (
        lambda f: ["method=opd", f"model.path={masked(f, [7])}", f"teacher.path={masked(f, [])}"],
        "warn logits: the student rules out 1 token ",
    ),
    "B16, references": (
        lambda f: ["method=sft", f"model.path={masked(f, list(range(4, 24)))}"],
        "fail logits: the student rules out 20 tokens .*references have one, .*whose loss is infinite",
    ),
    "B16, none": (lambda f: ["method=opd"], "pass logits: no token is ruled out"),
}


@pytest.mark.parametrize("name", [n if n in CACHED else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_check_finds_a_planted_fault_without_loading_weights(folders, name):
    plant, sentence = FAULTS[name]
    expect(found(folders, *plant(folders)), sentence)


@pytest.mark.parametrize("name", [n if n == "B16" else pytest.param(n, marks=pytest.mark.slow) for n in LOADED])
def test_check_finds_what_a_forward_pass_shows(folders, name):
    plant, sentence = LOADED[name]
    expect(found(folders, *plant(folders), fast=False), sentence)


def test_columns_that_no_example_has_a_part_for_are_named_with_the_reason():
    base = {"task": {"columns": {"prompt": None, "completion": None}}}
    for word, sentence in {
        "functions=x": "called tools; write task.columns.tools=<column>",
        "images=x": "models here read text alone",
        "compltion=x": "is no key; did you mean task.columns.completion",
    }.items():
        (override,) = OverridesParser.create().parse_overrides([f"task.columns.{word}"])
        told = str(key_error(override, base, "", []))
        assert told.startswith(f"task.columns.{word}") and sentence in told


def test_two_matrices_that_a_configuration_ties_are_used_and_saved_as_two(folders, tmp_path):
    path = folders.copy(folders.tiny, weights(own_head))
    lm = Pretrained(path).model()
    assert not torch.equal(lm.get_output_embeddings().weight, lm.get_input_embeddings().weight)
    assert lm.config.tie_word_embeddings is False
    lm.save_pretrained(tmp_path / "saved")
    assert Pretrained(str(tmp_path / "saved")).preview() == []
    twice = folders.copy(folders.tiny, weights(lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert Pretrained(twice).preview() == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["opd", "grpo", "sft"])
def test_a_student_that_rules_words_out_trains_and_keeps_to_it(folders, small, method):
    """As check says: the words' probability is 0 before and behind the updates."""
    path = masked(folders, [30, 31] if method == "sft" else [7], seed=3)
    folder = run(small(f"method={method}", f"model.path={path}", f"model.teacher={masked(folders, [])}", "evaluation=none"))
    bias = Pretrained(str(folder)).model().get_output_embeddings().bias
    assert torch.isneginf(bias).sum() == (2 if method == "sft" else 1) and not torch.isnan(bias).any()


def test_rows_without_a_fault_pass(folders):
    said = found(folders, "method=sft", f"model.path={folders.bytes}", *table(folders, *ROWS[:0]))
    assert "fail" not in {line.split()[0] for line in said.splitlines()}
