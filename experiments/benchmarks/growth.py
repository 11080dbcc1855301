"""How time and memory of a whole OPD step grow with tokens, samples and vocabulary: each doubled twice, the rest as it is.

    python experiments/benchmarks/growth.py

A random Llama of 4 layers of width 256 (student and teacher) with a folder's tokenizer; a larger vocabulary is rows without a
token. Every completion is of full length. Prints medians of the steps: seconds that the processors worked, in all and by part,
peak memory of the process above that of the smallest vocabulary's model, and the quotient to the row before. Writes growth.csv.
"""

import argparse
import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

from step import HERE, Process
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BASE = {"prompts": 4, "samples": 1, "new": 64, "vocabulary": 49_152}
AXES = {"new": (64, 128, 256), "samples": (1, 2, 4), "prompts": (4, 8, 16), "vocabulary": (49_152, 98_304, 196_608)}
COLUMNS = ("axis", "value", "cpu", "rollout", "score", "update", "peak_mib", "times_cpu", "times_peak")


def folder_of(tokenizer: Any, vocabulary: int, folder: Path) -> str:
    """The folder of a random model with this vocabulary."""
    path = folder / str(vocabulary)
    if not path.is_dir():
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes))
        lm.generation_config.eos_token_id = tokenizer.eos_token_id
        lm.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return str(path)


def row_of(axis: str, value: int, a: argparse.Namespace, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The medians of one work."""
    work = BASE | {axis: value}
    model, teacher = (folder_of(tokenizer, work["vocabulary"], folder / side) for side in ("student", "teacher"))
    given = argparse.Namespace(**(vars(a) | work | {"model": model, "teacher": teacher, "method": "opd", "ends": 0.0}))
    way = Process(a.way, given)
    try:
        rows = [way.step() for _ in range(a.warmup + a.steps)][a.warmup :]
    finally:
        way.close()
    middle = {name: statistics.median(row[name] for row in rows) for name in ("cpu", "rollout", "score", "update")}
    peak = max(row["peak_mib"] for row in rows)
    return {"axis": axis, "value": value, "peak_mib": round(peak), **{name: round(s, 3) for name, s in middle.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="models/smollm2-135m-instruct")
    parser.add_argument("--way", default="ours 32-true", help="ours and the precision")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, default in (("steps", 3), ("warmup", 1), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "growth.csv")
    a = parser.parse_args()
    a.trl_python, tokenizer, rows = None, AutoTokenizer.from_pretrained(a.tokenizer), []
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in AXES.items():
            before: dict[str, Any] = {}
            for value in values:
                row = row_of(axis, value, a, tokenizer, Path(folder))
                if before:
                    row |= {f"times_{short}": round(row[name] / before[name], 2) for short, name in QUOTIENTS}
                before = row
                rows.append(row)
                print("|" + "|".join(str(row.get(name, "")) for name in COLUMNS) + "|", flush=True)
    with a.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


QUOTIENTS = (("cpu", "cpu"), ("peak", "peak_mib"))


if __name__ == "__main__":
    main()
