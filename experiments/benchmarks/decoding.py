"""Decoding with each of the generator's shortcuts, against transformers' `generate`: seconds per new token, and equal tokens.

    python experiments/benchmarks/decoding.py --model models/smollm2-135m-instruct
    python experiments/benchmarks/decoding.py --samples 4 --ends 0.05 --dtypes float32

The ways take turns. Seconds are those that processors worked (of the clock on a GPU), medians of the rounds; the ratio is to
`generate` in the same precision. "mixed" is float32 weights under autocast to bfloat16.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import step_work as work
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.generation.decoding import PLAIN, Shortcuts
from opd_lightning.generation.transformers import decode
from opd_lightning.models.packed import packed
from opd_lightning.types import SamplingParams

WAYS = {
    "generate": (PLAIN, False),
    "finished rows leave": (Shortcuts(drop_finished=True), False),
    "prompts read once": (Shortcuts(share_prefill=True), False),
    "both": (Shortcuts(True, True), False),
    "both, packed": (Shortcuts(True, True), True),
}


def precision(dtype: str, device: str):
    """The context of a dtype; Lightning's autocast keeps no casts either."""
    return torch.autocast(device, torch.bfloat16, cache_enabled=False) if dtype == "mixed" else nullcontext()


def measure(a: argparse.Namespace, dtype: str) -> None:
    """Print a line for each way."""
    clock = time.process_time if a.device == "cpu" else time.perf_counter
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    lm = AutoModelForCausalLM.from_pretrained(a.model, dtype=kept).eval().to(a.device)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    ends = work.end_ids(lm, tokenizer)
    work.end_at(lm, ends, a.ends)
    chats = [[{"role": "user", "content": text}] for text in work.prompts(a.prompts)]
    rows = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    prompts = [row for row in rows for _ in range(a.samples)]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    written = {}
    for i in range(a.rounds + 1):
        for name, (shortcuts, pack) in WAYS.items():
            torch.manual_seed(1)
            begun = clock()
            with torch.no_grad(), precision(dtype, a.device), packed(lm) if pack else nullcontext():
                written[name] = decode(lm, prompts, SamplingParams(a.new), ends, tokenizer.pad_token_id, None, shortcuts)
            if i:  # the first round warms up
                seconds[name].append(clock() - begun)
    tokens = sum(len(completion.token_ids) for completion in written["generate"])
    base = statistics.median(seconds["generate"])
    for name, values in seconds.items():
        same = sum(x.token_ids == y.token_ids for x, y in zip(written[name], written["generate"], strict=True))
        middle, spread = statistics.median(values), f"{min(values):.2f} to {max(values):.2f}"
        print(f"|{dtype}|{name}|{middle:.2f}|{spread}|{tokens}|{base / middle:.2f}|{same}/{len(prompts)}|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    for name, default in (("prompts", 8), ("samples", 1), ("new", 64), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ends", type=float, default=0.0, help="probability that a completion ends at a token")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "mixed"])
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print("|precision|way|seconds|spread|tokens|ratio|equal completions|\n|---|---|---|---|---|---|---|")
    for dtype in a.dtypes:
        measure(a, dtype)


if __name__ == "__main__":
    main()
