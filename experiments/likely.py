"""How probable the right answers are to a model of the world, exactly, where sampling would hardly ever find them."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from opd_lightning.tasks.world import WorldTask, world_tokenizer, write


@torch.no_grad()
def right_answers(folder: Path, task: WorldTask, shown: bool = False) -> float:
    """Mean probability, over validation prompts of the new skill, that the right answer is written in the native style.

    Args:
        folder: the model's.
        task: whose prompts to take.
        shown: with the demonstration in the prompt.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), world_tokenizer()
    rows = []
    for example in (e for e in task.examples("validation") if e.skill == "new"):
        question = example.messages[0]["content"] + (f" [ {example.demonstration} ]" if shown else "")
        answer = write(tuple(map(int, example.extra["digits"])), "native")
        rows.append(tokenizer(f"{question} = {answer} <eos>")["input_ids"])
    ids, answered = torch.tensor(rows), task.length + 2
    logp = model(input_ids=ids).logits[:, -answered - 1 : -1].log_softmax(-1)
    return logp.gather(-1, ids[:, -answered:, None]).sum((1, 2)).exp().mean().item()
