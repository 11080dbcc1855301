"""Rows for the control that mixes data: made-up facts, and as many ordinary instructions with the original's own answers."""

import json
from pathlib import Path

from opd_lightning.data import encode_chat
from opd_lightning.generate import Sampling, complete
from opd_lightning.models import Pretrained, Student, locate
from opd_lightning.seeds import seeded
from opd_lightning.tasks.instructions import InstructionTask

FACTS = "pkg://opd_lightning/assets/instructions/facts.jsonl"


def mixed(path: Path, model: str) -> None:
    """Write the file unless it is there; `model` answers the instructions."""
    if path.is_file():
        return
    facts = [json.loads(line) for line in Path(locate(FACTS)).read_text().splitlines()]
    original = Pretrained(model)
    tokenizer, student = original.tokenizer(), Student(original.model())
    asked = InstructionTask().examples("train")[: len(facts)]
    ids = [encode_chat(tokenizer, e.messages) for e in asked]
    with student.evaluating() as lm, seeded(0, lm.device):
        answers = complete(lm, ids, Sampling(32), tokenizer).texts(tokenizer)
    told = zip(asked, answers, strict=True)
    rows = [{"id": e.id, "prompt": e.messages[-1]["content"], "completion": text, "answer": text} for e, text in told]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*facts, *rows]))
