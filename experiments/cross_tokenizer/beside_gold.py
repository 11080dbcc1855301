"""One update by sorted probabilities beside TRL's GOLD on the same pair and texts: processor seconds and peak memory.

python -m experiments.cross_tokenizer.beside_gold --teacher <folder> --gold-python <python of an environment with trl 1.16>

The ways take turns, each block a process of its own that makes a few updates; the first of a block is not counted. GOLD runs
with `use_extended_uld=False`: its alignment refuses Gemma's tokenizer, which is no byte-level BPE. So it compares the i-th
token of one model with the i-th of the other. Writes gold.csv.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COLUMNS = ("way", "updates", "cpu_seconds", "peak_gib")


class Clock:
    """Prints what each update cost."""

    def begin(self) -> None:
        self.cpu = time.process_time()

    def end(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"cpu": time.process_time() - self.cpu, "peak": peak}), flush=True)


def ours(a: argparse.Namespace, texts: Path) -> None:
    """Updates of this package."""
    import lightning as L

    from opd_lightning import Distillation

    class Steps(L.Callback, Clock):
        def on_train_batch_start(self, *_: Any) -> None:
            self.begin()

        def on_train_batch_end(self, *_: Any) -> None:
            self.end()

    overrides = [
        *("teacher.alignment=uld", "loss/divergence=total_variation", "optim=adamw_smollm2", "optim.lr=1.0e-5"),
        *(f"model.chat_template={texts / 'student.jinja'}", f"teacher.chat_template={texts / 'teacher.jinja'}"),
        *(f"data.batch_size={a.prompts}", f"rollout.sampling.max_new_tokens={a.tokens}", "evaluation=none"),
        "logits_chunk_size=64",
    ]
    opd = Distillation("opd", a.student, str(texts / "train.jsonl"), teacher=a.teacher, overrides=overrides)
    opd.trainer([Steps()], max_steps=a.updates, accelerator="cpu").fit(opd.module, opd.data)


def gold(a: argparse.Namespace, texts: Path) -> None:
    """Updates of TRL's GOLD."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    class Steps(TrainerCallback, Clock):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.end()

    tokenizer = AutoTokenizer.from_pretrained(a.student)
    tokenizer.chat_template = (texts / "student.jinja").read_text()
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (a.student, a.teacher)]
    config = GOLDConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=a.prompts,
        max_steps=a.updates,
        max_completion_length=a.tokens,
        max_length=256,
        learning_rate=1e-5,
        lmbda=1.0,  # the student writes everything
        temperature=1.0,
        top_p=1.0,
        use_uld_loss=True,
        use_extended_uld=False,
        teacher_tokenizer_name_or_path=a.teacher,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in (texts / "train.jsonl").read_text().splitlines()]
    parts = [(("user", row["prompt"]), ("assistant", row["completion"])) for row in rows]
    data = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in part]} for part in parts])
    GOLDTrainer(*models, config, train_dataset=data, processing_class=tokenizer, callbacks=[Steps()]).train()


def block(way: str, arguments: list[str], a: argparse.Namespace) -> list[dict[str, float]]:
    """The updates of a process of its own, without the first."""
    python = a.gold_python if way == "gold" else sys.executable
    command = [python, str(Path(__file__).resolve()), *arguments, "--way", way]
    paths = os.environ | {"PYTHONPATH": "" if way == "gold" else str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=paths).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"cpu"')][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="models/smollm2-135m-instruct")
    parser.add_argument("--teacher", default="models/gemma3-270m")
    parser.add_argument("--texts", type=Path, default=Path("outputs/cross_tokenizer/texts"), help="written by run.py")
    parser.add_argument("--gold-python", help="interpreter of an environment with trl")
    parser.add_argument("--way", choices=("ours", "gold"), help="of a block")
    for name, default in (("updates", 3), ("blocks", 2), ("prompts", 4), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    if a.way:
        {"ours": ours, "gold": gold}[a.way](a, a.texts.resolve())
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "gold": []}
    for _ in range(a.blocks):
        for way in found:
            found[way] += block(way, sys.argv[1:], a)
    with (HERE / "gold.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for way, rows in found.items():
            cpu, peak = statistics.median(row["cpu"] for row in rows), max(row["peak"] for row in rows)
            writer.writerow([way, len(rows), f"{cpu:.4g}", f"{peak:.4g}"])


if __name__ == "__main__":
    main()
