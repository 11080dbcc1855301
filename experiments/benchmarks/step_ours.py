"""Steps of this package for step.py, one for each line that it reads."""

import json
import sys
import time

import lightning as L
import step_work as work
import torch
from transformers import AutoTokenizer

from opd_lightning import Distillation


class Steps(L.Callback):
    """Waits before each step, and tells what it cost."""

    def __init__(self, given: dict, tokenizer):
        self.given, self.tokenizer = given, tokenizer

    def on_train_start(self, trainer, module):
        lm = module.student.lm
        if self.given["method"] != "sft":
            work.end_at(lm, work.end_ids(lm, self.tokenizer), self.given["ends"])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        work.wait()
        self.before = dict(module.ledger.seconds)
        self.begun, self.cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.given["device"] == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self.begun, time.process_time() - self.cpu
        parts = {part: module.ledger.seconds[part] - self.before.get(part, 0.0) for part in ("rollout", "score", "update")}
        lengths = [sample.trainable for sample in outputs["samples"]]
        work.tell(seconds, cpu, parts, sum(lengths), max(lengths) * len(lengths), self.given["device"])


def main(given: dict) -> None:
    torch.set_num_threads(given["threads"])
    texts = work.prompts(given["prompts"] + 2)
    pure = given["kind"] == "bf16-true"
    method, data, more = given["method"], texts, {}
    if method == "opd":
        more = {"teacher": given["teacher"]}
    elif method == "sft":
        data = [{"prompt": text, "completion": work.reference(text, given["new"])} for text in texts]
    else:
        more = {"verify": lambda example, text: work.reward(text)}
    options = {
        "task.max_new_tokens": None if method == "sft" else given["new"],
        "data.batch_size": given["prompts"],
        "rollout.num_generations": given["samples"],
        "trainer.precision": given["kind"],
        "model.dtype": "bfloat16" if pure else "float32",
        "optim.lr": 1e-6,
        "evaluation": "none",
    }
    if method == "sft":
        del options["rollout.num_generations"]
    ours = Distillation(method, given["model"], data[:-2], heldout=data[-2:], overrides=options, **more)
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    device = "gpu" if given["device"] == "cuda" else "cpu"
    trainer = ours.trainer([Steps(given, tokenizer)], max_steps=given["steps"], accelerator=device)
    trainer.fit(ours.module, ours.data)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
