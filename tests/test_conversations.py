"""Chats of several replies: their tokens are those of the rendered chat, and only replies with their ends are learned."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.preflight.rendering import rendering_errors
from opd_lightning.preflight.replies import conversations
from opd_lightning.rollout import DatasetRollout
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.tasks import TableTask
from opd_lightning.tasks.chats import learning
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.toy.world import world_tokenizer
from opd_lightning.training.run import run
from opd_lightning.types import Example, Messages, Prompts, SamplingParams
from tests.templates import TEMPLATES, tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
USER = {"role": "user", "content": "Add 2 and 3."}


def call(arguments: object = None) -> dict:
    """A reply that calls a tool."""
    function = {"name": "add", "arguments": {"a": 2, "b": 3} if arguments is None else arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}


RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "add", "content": "5"}
WITH_TOOLS = ["chatml", "llama3", "mistral", "tagged"]
PLAIN = ["chatml", "llama3", "gemma3", "mistral", "smollm2", "tagged"]


def says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def whole(template: str, chat: Messages, **options: object) -> list[int]:
    """The ids of the rendered chat, by transformers alone."""
    made = tokenizer(template).apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    return list(made["input_ids"])


def replies_in(template: str, token_ids: list[int], mask: list[bool]) -> list[str]:
    """The texts of the runs of learned tokens."""
    runs: list[list[int]] = []
    for i, (token, own) in enumerate(zip(token_ids, mask, strict=True)):
        if own and (i == 0 or not mask[i - 1]):
            runs.append([])
        if own:
            runs[-1].append(token)
    return [tokenizer(template).decode(run) for run in runs]


@settings(max_examples=40, deadline=None)
@given(
    template=st.sampled_from(PLAIN),
    texts=st.lists(
        st.lists(st.sampled_from(["a", "n", " b", "\n", "é", "Seven.", "<|im_end|>", "</s>"]), min_size=1).map("x".join),
        min_size=2,
        max_size=4,
    ),
    prior=st.integers(0, 1),
)
def test_ids_are_the_rendered_chat_and_masks_are_the_replies(template, texts, prior):
    """Special tokens in a text stay text; replies before the first learned one belong to the prompt."""
    renderer, end = ChatRenderer(tokenizer(template)), TEMPLATES[template][1]
    chat = [turn for text in texts for turn in (USER, says("assistant", f"x{text}y"))]
    first = 1 + 2 * min(prior, len(texts) - 1)
    found = renderer.conversation(chat[:first], chat[first:])
    rendered = renderer.template.ids(chat, reply_follows=False)
    assert found.exact and found.token_ids == rendered[: len(found.token_ids)]
    if "<|im_end|>" not in "".join(texts) and "</s>" not in "".join(texts):
        assert rendered == whole(template, chat)
    written = [text.removeprefix("<think>\n\n</think>\n\n") for text in replies_in(template, found.token_ids, found.loss_mask)]
    assert written == [f"x{t}y{end}" for t in texts[(first - 1) // 2 :]]
    assert found.token_ids[: found.prompt_length] == renderer.render(chat[:first]).token_ids
    assert found.loss_mask[-1] and not any(found.loss_mask[: found.prompt_length])


@pytest.mark.parametrize("template", WITH_TOOLS)
def test_calls_are_learned_as_the_template_writes_them(template):
    """Results of tools and descriptions are read, not learned."""
    renderer, turns = ChatRenderer(tokenizer(template)), [call(), RESULT, says("assistant", "It is 5.")]
    found = renderer.conversation([USER], turns, TOOLS)
    expected = whole(template, [USER, *turns], tools=TOOLS)
    assert found.exact and found.token_ids == expected[: len(found.token_ids)]
    calling, saying = replies_in(template, found.token_ids, found.loss_mask)
    assert "add" in calling and '"a": 2' in calling and calling.endswith(TEMPLATES[template][1])
    assert saying.endswith(f"It is 5.{TEMPLATES[template][1]}")
    assert renderer.render([USER], TOOLS).token_ids == whole(template, [USER], tools=TOOLS, add_generation_prompt=True)


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_replies():
    """Qwen3 drops earlier thoughts, and writes an empty one in the last reply alone."""
    renderer = ChatRenderer(tokenizer("qwen3"))
    chat = [USER, says("assistant", "a"), USER, says("assistant", "b")]
    with pytest.raises(ValueError, match=r"rewrites earlier turns .*task\.train_on=last.*generation"):
        renderer.conversation(chat[:1], chat[1:])
    assert renderer.conversation(chat[:3], chat[3:]).exact
    (result,) = conversations([Example("7", chat[:1], turns=chat[1:])], renderer)
    assert result.state == "fail" and "example 7" in result.text
    thinking = [call() | {"reasoning_content": "Sum."}, RESULT, says("assistant", "5") | {"reasoning_content": "Done."}]
    found = renderer.conversation([USER], thinking, TOOLS)
    first, last = replies_in("qwen3", found.token_ids, found.loss_mask)
    assert first.startswith("<think>\nSum.\n</think>\n\n<tool_call>") and last == "<think>\nDone.\n</think>\n\n5<|im_end|>"


def test_tags_that_do_not_cover_every_reply_are_refused():
    words = tokenizer("chatml")
    renderer = ChatRenderer(words)
    renderer.tokenizer = renderer.template.tokenizer = changed = tokenizer.__wrapped__("chatml")
    changed.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ValueError, match="marks 1 of 2 replies"):
        renderer.conversation([USER], [says("assistant", "a"), USER, says("assistant", "b")])
    found = renderer.conversation([USER], [says("assistant", "b")])  # the end stands behind the tags
    assert replies_in("chatml", found.token_ids, found.loss_mask) == ["b<|im_end|>"]


def test_a_token_across_the_begin_of_a_reply_is_split_there():
    """The model writes behind the prompt's own tokens."""
    renderer = ChatRenderer(tokenizer("llama3", regex=True))
    chat = [USER, says("assistant", "a"), USER, says("assistant", "b")]
    found = renderer.conversation(chat[:1], chat[1:])
    assert not found.exact and renderer.tokenizer.decode(found.token_ids) == renderer.template.text(chat, reply_follows=False)
    assert found.token_ids[: found.prompt_length] == renderer.render(chat[:1]).token_ids
    assert replies_in("llama3", found.token_ids, found.loss_mask) == ["a<|eot_id|>", "b<|eot_id|>"]


def test_arguments_that_are_given_as_text_are_not_quoted_twice():
    """APIs give the arguments of calls as JSON text, templates print objects."""
    renderer = ChatRenderer(tokenizer("chatml"))
    as_text, as_object = ([USER, call(a), RESULT] for a in ('{"a": 2, "b": 3}', {"a": 2, "b": 3}))
    assert renderer.render(as_text).token_ids == renderer.render(as_object).token_ids


CHAT = [USER, call(), RESULT, says("assistant", "5"), USER, says("assistant", "6")]
LEARNED = {
    "last": (CHAT, [], "last", 5, 1),
    "all": (CHAT, [], "all", 1, 5),
    "marked": ([*CHAT[:3], CHAT[3] | {"weight": 0}, *CHAT[4:]], [], "all", 1, 5),
    "first marked": ([USER, says("assistant", "a") | {"train": False}, *CHAT[4:]], [], "all", 3, 1),
    "completion": (CHAT[:1], CHAT[1:4], "all", 1, 3),
    "completion, last": (CHAT[:1], CHAT[1:4], "last", 3, 1),
    "replies of the prompt": (CHAT[:5], CHAT[5:], "all", 5, 1),
    "greeting": ([says("assistant", "Hi"), *CHAT[4:]], [], "all", 2, 1),
    "call": (CHAT[:2], [], "last", 1, 1),
    "unanswered": (CHAT[:5], [], "all", 5, 0),
}


@pytest.mark.parametrize(("chat", "answers", "train_on", "prompt", "turns"), LEARNED.values(), ids=LEARNED.keys())
def test_which_replies_are_learned(chat, answers, train_on, prompt, turns):
    messages, reference = learning(chat, answers, train_on, "r:1")
    assert (len(messages), len(reference)) == (prompt, turns) and messages + reference == (chat + answers)[: prompt + turns]


def test_marked_replies_are_read_and_not_learned():
    renderer = ChatRenderer(tokenizer("chatml"))
    turns = [says("assistant", "a"), USER, says("assistant", "b") | {"weight": 0}, USER, says("assistant", "c")]
    found = renderer.conversation([USER], turns)
    assert replies_in("chatml", found.token_ids, found.loss_mask) == ["a<|im_end|>", "c<|im_end|>"]
    with pytest.raises(ValueError, match="every reply is marked"):
        learning([USER, *[t | {"weight": 0} for t in turns[:3]]], [], "all", "r:1")


ROWS = {
    "messages": {"messages": [USER, call(), RESULT, says("assistant", "It is 5.")], "tools": TOOLS},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Add 2 and 3."},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
            {"from": "observation", "value": "5"},
            {"from": "gpt", "value": "It is 5."},
        ],
        "tools": json.dumps([TOOLS[0]["function"]]),
    },
    "prompt and completion": {
        "prompt": [USER],
        "completion": [call(), RESULT, says("assistant", "It is 5.")],
        "tools": json.dumps(TOOLS),
    },
    "parts": {"messages": [USER, call(), RESULT, says("assistant", [{"type": "text", "text": "It is 5."}])], "tools": TOOLS},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_rows_in_the_fields_shapes_are_one_conversation(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    key = next(k for k in ("messages", "conversations", "prompt") if k in row)
    text = {"role": "system", "content": ""} if key != "conversations" else {"from": "system", "value": ""}
    rows = [row | {key: [text | {"content" if "role" in text else "value": f"Row {i}."}, *row[key]]} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"completion": "completion"} if "completion" in row else {}
    found = TableTask(str(path), columns, train_on="all").examples("train")[0]
    assert found.tools == TOOLS and found.completion is None and found.reference[-1]["content"] == "It is 5."
    renderer = ChatRenderer(tokenizer("chatml"))
    (sample,) = DatasetRollout(renderer, SamplingParams(999))(Prompts([found], [renderer.render(found.messages)])).samples
    expected = whole("chatml", [*found.messages[:1], USER, *ROWS["messages"]["messages"][1:]], tools=TOOLS)
    assert sample.token_ids.tolist() == expected[: len(sample.token_ids)] and sample.finish_reason == "stop"
    last = TableTask(str(path), columns).examples("train")[0]
    assert last.completion == "It is 5." and len(last.messages) == 4 and last.tools == TOOLS


def test_what_the_template_leaves_out_of_a_reference_is_said():
    errors = [
        (Example("a", [USER], tools=TOOLS), "gemma3", "the descriptions of its 1 tools"),
        (Example("b", [USER], turns=[call()]), "smollm2", "its tool calls"),
        (
            Example("c", [USER], turns=[says("assistant", "5") | {"reasoning_content": "Sum."}]),
            "chatml",
            "its reasoning_content",
        ),
        (Example("d", [USER], turns=[call(), RESULT, says("assistant", "5")]), "gemma3", "no tools"),
    ]
    for example, template, sentence in errors:
        found = rendering_errors([example], ChatRenderer(tokenizer(template)), {"student": NoContext()})
        assert sentence in found[example.id]


def two_replies(folder: Path) -> Path:
    """A file of chats with two replies each."""
    asked = [[says("user", f"rotate {i} 4"), says("assistant", "3")] for i in range(9)]
    rows = [{"messages": [*turns, says("user", "sort 2"), says("assistant", "answer 7")]} for turns in asked]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_sft_on_all_replies_is_the_plain_loss(small, tiny, tmp_path):
    """The first step's loss is the mean over the replies' tokens alone, by a plain forward pass."""
    path = two_replies(tmp_path)
    cfg = [
        "task=table",
        f"task.path={path}",
        "task.train_on=all",
        "trainer.max_steps=1",
        "task.n_train=null",
        "evaluation=none",
    ]
    folder = run(small("method=sft", *cfg, "data.batch_size=7", "task.n_eval=1", "evaluation=none"))
    loss = read_csv(folder / "metrics.csv")[-1]["train/loss"]
    words, lm = world_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny)
    task, total, n = TableTask(str(path), {}, train_on="all", n_eval=1), 0.0, 0
    for example in task.examples("train"):
        digit = example.messages[0]["content"].split()[1]
        text = f"rotate {digit} 4 = 3 <eos> sort 2 = answer 7 <eos>".split()
        ids = torch.tensor([words.convert_tokens_to_ids(text)])
        log_p = lm(input_ids=ids).logits.log_softmax(-1)[0]
        for at in (4, 5, 9, 10, 11):
            total, n = total - log_p[at - 1, ids[0, at]].item(), n + 1
    assert loss == pytest.approx(total / n, rel=1e-4)


@pytest.mark.slow
def test_a_knowledge_distillation_run_on_all_replies(small, tmp_path):
    cfg = ["task=table", f"task.path={two_replies(tmp_path)}", "task.train_on=all", "task.n_train=null", "task.n_eval=1"]
    folder = run(small("method=kd", *cfg, "evaluation=text", "trainer.max_steps=1"))
    assert read_csv(folder / "metrics.csv")[-1]["rollout/length"] == 5
    assert json.loads((folder / "evaluation.json").read_text())["end"]
