"""Time and memory of one whole step of OPD, SFT or GRPO: rollout, scores and update, ours and TRL's on the same work.

    python experiments/benchmarks/step.py --trl-python <python of an environment with trl 1.16>
    python experiments/benchmarks/step.py --device cuda --model <folder> --prompts 32 --new 512 --dtypes bfloat16
    python experiments/benchmarks/step.py --ends 0.03 --samples 4      # random lengths, several completions of a prompt

Each way is a process of its own that keeps its models; the ways of one dtype take turns, a step each. Every completion has
`--new` tokens, or ends at each token with the probability `--ends`. Without --trl-python only ours are measured. Writes
step.csv beside itself and prints it as a table: seconds as medians of the steps, also by part; `cpu`, the seconds that
processors worked, which is what to compare on a machine with other programs; ratios of tokens per second, and per processor
second, to TRL's; `unavoidable`, the seconds over those that step_floor.py finds for the work of OPD at full length; peak
memory of the process, or what was allocated on the GPU; the machine's load.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WAYS = {"float32": ("ours 32-true", "trl float32"), "bfloat16": ("ours bf16-mixed", "ours bf16-true", "trl bfloat16")}
PARTS = ("rollout", "score", "update")
COLUMNS = ("dtype", "way", "steps", "seconds", "least", "greatest", "cpu", *PARTS)
COLUMNS += ("tokens", "padded", "tokens_per_second", "ratio", "cpu_ratio", "unavoidable", "peak_mib", "load")
COLUMNS += ("device", "processor", "threads", "torch", "commit", "work")


class Process:
    """A way in a process of its own, which makes a step when it is told to."""

    def __init__(self, way: str, a: argparse.Namespace):
        self.way, self.rows = way, []
        whose, kind = way.split()
        script, python = ("step_trl.py", a.trl_python) if whose == "trl" else ("step_ours.py", sys.executable)
        work = work_of(a)
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(work | {"kind": kind, "steps": a.steps + a.warmup})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if a.verbose else subprocess.DEVNULL,
            text=True,
            env=variables(a),
        )

    def step(self) -> dict[str, Any]:
        """Make one step; returns what it cost."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ValueError(f"{self.way} ended with status {self.process.wait()}; --verbose shows what it wrote.")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


def work_of(a: argparse.Namespace) -> dict[str, Any]:
    """The arguments that say what is done."""
    names = ("method", "model", "teacher", "prompts", "samples", "new", "ends", "device", "threads")
    return {name: getattr(a, name) for name in names}


def variables(a: argparse.Namespace) -> dict[str, str]:
    """The environment of a way's process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(a.threads)}


def floor(dtype: str, a: argparse.Namespace) -> dict[str, float]:
    """The unavoidable seconds of an OPD step by part; none for other methods and for random lengths."""
    if a.method != "opd" or a.ends:
        return {}
    command = [sys.executable, str(HERE / "step_floor.py"), json.dumps(work_of(a) | {"kind": dtype})]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables(a), check=True)
    return json.loads(out.stdout.splitlines()[-1])["seconds"]


def measured(dtype: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of each way of a dtype."""
    ways = [Process(way, a) for way in WAYS[dtype] if a.trl_python or not way.startswith("trl")]
    try:
        for i in range(a.warmup + a.steps):
            for way in ways:
                row = way.step()
                if i >= a.warmup:
                    way.rows.append(row | {"load": os.getloadavg()[0]})
    finally:
        for way in ways:
            way.close()
    rows = [summary(way) | {"dtype": dtype} for way in ways]
    base = next((row for row in rows if row["way"].startswith("trl")), rows[0])
    for row in rows:
        row["ratio"] = round(row["tokens_per_second"] / base["tokens_per_second"], 3)
        row["cpu_ratio"] = round(row["tokens"] / row["cpu"] / (base["tokens"] / base["cpu"]), 3)
    if parts := floor(dtype, a):
        least = sum(parts.values())
        rows = [row | {"unavoidable": round(row["seconds"] / least, 2)} for row in rows]
        seconds = {name: round(s, 3) for name, s in (parts | {"seconds": least}).items()}
        rows.append({"way": f"unavoidable {dtype}", "dtype": dtype, "unavoidable": 1.0, **seconds})
    return rows


def summary(way: Process) -> dict[str, Any]:
    """Medians of a way's steps."""
    middle = {name: statistics.median(row[name] for row in way.rows) for name in way.rows[0] if name != "torch"}
    speed = statistics.median(row["tokens"] / row["seconds"] for row in way.rows)
    seconds = [row["seconds"] for row in way.rows]
    numbers = {name: round(value, 3) for name, value in middle.items()}
    spread = {"least": round(min(seconds), 3), "greatest": round(max(seconds), 3)}
    peak = {"peak_mib": round(max(row["peak_mib"] for row in way.rows))}
    fixed = {"way": way.way, "steps": len(seconds), "torch": way.rows[0]["torch"], "tokens_per_second": round(speed, 2)}
    return numbers | spread | peak | fixed


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; ratios are to TRL, or to the first way without it."""
    names = ("way", "seconds", "least", "greatest", "cpu", *PARTS, "tokens", "padded")
    names += ("tokens_per_second", "ratio", "cpu_ratio", "unavoidable", "peak_mib", "load")
    lines = ["|" + "|".join(name.replace("_", " ") for name in names) + "|", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("|" + "|".join(str(row.get(name, "")) for name in names) + "|" for row in rows)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("opd", "sft", "grpo"), default="opd")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="folder or hub id of the student")
    parser.add_argument("--teacher", help="that of the teacher; by default the student's folder under another name")
    for name, default in (("prompts", 8), ("samples", 1), ("new", 64), ("steps", 5), ("warmup", 1), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ends", type=float, default=0.0, help="probability that a completion ends at a token")
    parser.add_argument("--dtypes", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trl-python", help="interpreter of an environment with trl")
    parser.add_argument("--results", type=Path, default=HERE / "step.csv")
    parser.add_argument("--verbose", action="store_true")
    a = parser.parse_args(arguments)
    a.model = str(Path(a.model).resolve()) if Path(a.model).is_dir() else a.model
    with tempfile.TemporaryDirectory() as folder:
        a.teacher = a.teacher or linked(Path(a.model), Path(folder))
        run(a)


def linked(model: Path, folder: Path) -> str:
    """A folder of links to a model's files: a method refuses its start model as its teacher."""
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    return str(folder)


def run(a: argparse.Namespace) -> None:
    """Measure, write the rows and print them."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    machine = {"device": a.device, "processor": platform.processor() or platform.machine(), "threads": a.threads}
    ending = f"ending with probability {a.ends} at each" if a.ends else "each"
    work = f"{a.method}, {Path(a.model).name}, {a.prompts} prompts x {a.samples} completions x {a.new} tokens {ending}"
    rows = []
    for dtype in a.dtypes:
        rows += [row | machine | {"commit": commit.stdout.strip(), "work": work} for row in measured(dtype, a)]
    with a.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{work}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
