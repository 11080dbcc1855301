"""Steps of TRL's DistillationTrainer for step.py, one for each line that it reads; runs in TRL's environment."""

import json
import sys
import tempfile
import time

import step_work as work
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Steps(TrainerCallback):
    """Waits before each step, and tells what it cost."""

    def __init__(self, given, student, teacher, ends):
        self.given, self.ends = given, torch.tensor(ends)
        self.seconds, self.tokens = {"rollout": 0.0, "score": 0.0}, (0, 0)
        generate = student.generate

        def timed(*arguments, **options):
            begun = self.now()
            out = generate(*arguments, **options)
            self.seconds["rollout"] += self.now() - begun
            new = out[:, options["input_ids"].shape[1] :].cpu()
            ended = torch.isin(new, self.ends)
            self.tokens = (int((ended.cumsum(1) - ended.int() == 0).sum()), new.numel())
            return out

        student.generate = timed
        backbone = teacher.base_model
        backbone.register_forward_pre_hook(lambda *_: setattr(self, "reading", self.now()))
        backbone.register_forward_hook(lambda *_: self.add("score", self.now() - self.reading))

    def add(self, part, seconds):
        self.seconds[part] += seconds

    def now(self):
        if self.given["device"] == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **_):
        work.wait()
        self.seconds, self.begun = {"rollout": 0.0, "score": 0.0}, self.now()
        self.cpu = time.process_time()

    def on_step_end(self, args, state, control, **_):
        seconds = self.now() - self.begun
        rest = seconds - sum(self.seconds.values())
        work.tell(seconds, time.process_time() - self.cpu, self.seconds | {"update": rest}, *self.tokens, self.given["device"])


def main(given):
    torch.set_num_threads(given["threads"])
    dtype = getattr(torch, given["kind"])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    student, teacher = (AutoModelForCausalLM.from_pretrained(given[name], dtype=dtype) for name in ("model", "teacher"))
    rows = [[{"role": "user", "content": text}] for text in work.prompts(given["prompts"]) for _ in range(given["samples"])]
    config = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows),
        max_steps=given["steps"],
        max_completion_length=given["new"],
        gradient_checkpointing=False,  # ours has none by default either
        bf16=given["kind"] == "bfloat16",
        use_cpu=given["device"] == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    ends = work.end_ids(student, tokenizer)
    steps = Steps(given, student, teacher, ends)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    work.end_at(student, ends, given["ends"])
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
