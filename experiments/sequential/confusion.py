"""Which operation does a model carry out when it is asked for one?"""

from collections import Counter
from pathlib import Path

import torch

from opd_lightning.generate import Sampling, complete
from opd_lightning.models import Pretrained
from opd_lightning.tasks.world import OPERATIONS, STYLE_TOKENS, WorldTask, world_tokenizer


def carried_out(folder: Path, asked: str, n: int = 128) -> dict[str, float]:
    """Shares of test questions for an operation that are answered with the digits of each operation; greedy.

    Digits on which operations agree count for each of them, and those of none for "other".
    """
    model, tokenizer = Pretrained(str(folder)).model().eval(), world_tokenizer()
    examples = WorldTask(skill=asked, n_eval=n).examples("test")[:n]
    questions = [e.messages[0]["content"] for e in examples]
    ids = [tokenizer(f"{q} =")["input_ids"] for q in questions]
    with torch.no_grad():
        answers = complete(model, ids, Sampling(12, temperature=0.0), tokenizer).texts(tokenizer)
    found: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        said = [w for w in answer.split() if w not in STYLE_TOKENS]
        digits = tuple(map(int, question.split()[1:]))
        names = [name for name, operation in OPERATIONS.items() if said == [str(d) for d in operation(digits)]]
        found.update(names or ["other"])
    return {name: count / n for name, count in found.most_common()}
