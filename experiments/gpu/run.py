"""Checks of a machine with a GPU in eight minutes: losses, bf16, LoRA, FSDP2, speed, memory, vLLM.

    make wheels && make gpu                                             # wheels: on a machine with a package index
    python -m experiments.gpu.run --device cpu --small --out outputs/gpu   # rehearsed without a GPU

Each part of parts.py is a process of its own, bounded in time; one that fails or takes too long is recorded, and the rest goes
on. Writes results.json, table.md and a log of each part into `--out`. torch, transformers, lightning and peft must be there;
`--wheels` is a folder with what else is needed (Hydra, OmegaConf, ANTLR), which is unpacked beside the results, not installed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"losses": 60, "bf16": 80, "lora": 80, "fsdp2": 90, "memory": 90, "step": 150, "vllm": 150}
"""The parts, and the seconds that each may take."""

PACKAGES = ("torch", "transformers", "lightning", "pytorch-lightning", "peft", "hydra-core", "omegaconf", "vllm")


def unpacked(wheels: Path | None, folder: Path) -> list[str]:
    """The folder with the wheels' content, in a list; an empty one without wheels."""
    found = sorted(wheels.glob("*.whl")) if wheels is not None and wheels.is_dir() else []
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [str(folder)] if found else []


def part(name: str, seconds: float, a: argparse.Namespace, path: list[str]) -> dict[str, Any]:
    """A part's rows, how it ended, and how long it took."""
    command = [sys.executable, "-m", "experiments.gpu.parts", name, "--device", a.device, *(["--small"] if a.small else [])]
    path = [str(ROOT), *path, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false"}
    begun, log = time.perf_counter(), a.out / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--out", str(a.out / name)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,  # so that what it has started ends with it
        )
        try:
            code: int | None = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = None
    taken = round(time.perf_counter() - begun, 1)
    lines = log.read_text(errors="replace").splitlines()
    rows = [json.loads(line.removeprefix("ROW ")) for line in lines if line.startswith("ROW ")]
    state = "done" if code == 0 else f"stopped after {taken:g} s" if code is None else "failed"
    last = next((line for line in reversed(lines) if line.strip() and not line.startswith("ROW ")), "")
    return {"part": name, "state": state, "seconds": taken, "rows": rows} | ({} if code == 0 else {"reason": last[-300:]})


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "processor": platform.machine(), "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return found | {"device": gpu or device, "load": round(os.getloadavg()[0], 1), "commit": commit.stdout.strip()}


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["|part|what|value|should be|holds|", "|---|---|---|---|---|"]
    for one in found["parts"]:
        for row in one["rows"]:
            holds = {True: "yes", False: "NO", None: "-"}[row["holds"]]
            lines.append(f"|{one['part']}|{row['what']}|{row['value']}|{row['limit']}|{holds}|")
        if one["state"] != "done":
            lines.append(f"|{one['part']}|{one['state']}|{one['reason'].replace('|', '/')}||NO|")
    about = found["machine"]
    versions = ", ".join(f"{name} {about[name]}" for name in PACKAGES if name in about)
    size = "small sizes" if found["small"] else "full sizes"
    told = f"{about['device']}, {about['cores']} cores, {versions}; {size}; {found['seconds']:g} s; commit {about['commit']}."
    return "\n".join([*lines, "", told, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, for a rehearsal")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--wheels", type=Path, help="folder with the wheels of what the machine lacks")
    parser.add_argument("--seconds", type=float, default=470, help="limit of the whole")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="some of the parts")
    a = parser.parse_args(arguments)
    a.out = a.out.resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    path, begun, parts = unpacked(a.wheels, a.out / "site"), time.perf_counter(), []
    found = {"machine": machine(a.device), "small": a.small, "parts": parts}
    for name in a.only:
        left = a.seconds - (time.perf_counter() - begun)
        parts.append(part(name, min(PARTS[name], left), a, path))
        print(f"{name}: {parts[-1]['state']}, {parts[-1]['seconds']:g} s", flush=True)
        found["seconds"] = round(time.perf_counter() - begun, 1)
        (a.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")  # what there is, if the machine goes away
        (a.out / "table.md").write_text(table(found))
    print(f"\n{table(found)}\n{a.out}")
    return int(any(one["state"] != "done" or any(row["holds"] is False for row in one["rows"]) for one in parts))


if __name__ == "__main__":
    sys.exit(main())
