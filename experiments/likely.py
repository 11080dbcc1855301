"""How well a model of the world answers: the exact probability of right answers, and the share of its greedy ones."""

from pathlib import Path

import torch

from opd_lightning.generate import Sampling, complete
from opd_lightning.models import Pretrained
from opd_lightning.tasks import Example
from opd_lightning.tasks.world import WorldTask, world_tokenizer, write


@torch.no_grad()
def right_answers(folder: Path | str, task: WorldTask, shown: bool = False) -> float:
    """Mean probability, over validation prompts of the new skill, that the right answer is written in the native style.

    Args:
        folder: the model's, or a run's.
        task: whose prompts to take.
        shown: with the demonstration in the prompt.
    """
    model, tokenizer = Pretrained(str(folder)).model().eval(), world_tokenizer()
    rows = []
    for example, question in questions(task, shown):
        answer = write(tuple(map(int, example.extra["digits"])), "native")
        rows.append(tokenizer(f"{question} {answer} <eos>")["input_ids"])
    ids, answered = torch.tensor(rows), task.length + 2
    logp = model(input_ids=ids).logits[:, -answered - 1 : -1].log_softmax(-1)
    return logp.gather(-1, ids[:, -answered:, None]).sum((1, 2)).exp().mean().item()


@torch.no_grad()
def right_greedy(folder: Path | str, task: WorldTask, shown: bool = False) -> float:
    """Share of greedy answers to the same prompts with the right contents, in any style."""
    model, tokenizer = Pretrained(str(folder)).model().eval(), world_tokenizer()
    asked = questions(task, shown)
    ids = [tokenizer(question)["input_ids"] for _, question in asked]
    answers = complete(model, ids, Sampling(task.length + 7, temperature=0.0), tokenizer).texts(tokenizer)
    return sum(task.verify(e, text).content for (e, _), text in zip(asked, answers, strict=True)) / len(asked)


def questions(task: WorldTask, shown: bool) -> list[tuple[Example, str]]:
    """Validation prompts of the new skill as the model reads them, with or without the demonstration."""
    new = [e for e in task.examples("validation") if e.skill == "new"]
    return [(e, e.messages[0]["content"] + (f" [ {e.demonstration} ] =" if shown else " =")) for e in new]
