"""The unavoidable seconds of a step for step.py: weights read once for each decoded token, products at the machine's rate.

rollout   each prompt's products, and for each token of the longest completion all weights once, at the memory's speed
score     the products of the teacher's layers
update    the products of the student's layers and of both output layers, forward and backward, and AdamW's numbers once
"""

import json
import sys

import step_work as work
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.models.cost_model import NUMBERS, usual
from opd_lightning.models.flops import Sizes
from opd_lightning.utils.products import product, suits


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs of a large product in a second, and bytes that the memory gives in a second."""
    left, right = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    multiply = product if suits(right) else torch.nn.functional.linear
    numbers = torch.ones(2**28, device=device)
    with torch.no_grad():
        return 2 * 2048**3 / usual(lambda: multiply(left, right), device), 2**30 / usual(numbers.sum, device)


def main(given: dict) -> None:
    torch.set_num_threads(given["threads"])
    dtype = torch.float32 if given["kind"] == "float32" else torch.bfloat16
    sizes, teacher = (Sizes.of(AutoModelForCausalLM.from_pretrained(given[who], dtype=dtype)) for who in ("model", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    products, memory = rates(torch.device(given["device"]), dtype)
    rows, new = given["prompts"] * given["samples"], given["new"]
    chats = [[{"role": "user", "content": text}] for text in work.prompts(given["prompts"])]
    lengths = [
        len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]) for chat in chats
    ]
    read = [length + new for length in lengths for _ in range(given["samples"])]
    weights = (sizes.layers + sizes.head) * dtype.itemsize
    seconds = {
        "rollout": (sizes.read(lengths) + sizes.logits(rows)) / products + new * weights / memory,
        "score": teacher.read(read) / products,
        "update": (
            sizes.read(read) + sizes.backward(read, rows * new) + (sizes.logits(rows * new) + teacher.logits(rows * new))
        )
        / products
        + NUMBERS * dtype.itemsize * (sizes.layers + sizes.head) / memory,
    }
    print(json.dumps({"products": products, "memory": memory, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
