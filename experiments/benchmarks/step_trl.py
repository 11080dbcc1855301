"""Steps of one of TRL's trainers (distillation, SFT, GRPO) for step.py, one for each line that it reads."""

import json
import sys
import tempfile
import time

import step_work as work
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


class Steps(TrainerCallback):
    """Waits before each step, and tells what it cost."""

    def __init__(self, given, student, teacher, ends):
        self.given, self.ends = given, torch.tensor(ends)
        self.seconds, self.tokens = {"rollout": 0.0, "score": 0.0}, given["tokens"]
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
        if teacher is None:
            return
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
    given["tokens"] = 0, 0
    dtype = getattr(torch, given["kind"])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    method = given["method"]
    student = AutoModelForCausalLM.from_pretrained(given["model"], dtype=dtype)
    teacher = AutoModelForCausalLM.from_pretrained(given["teacher"], dtype=dtype) if method == "opd" else None
    texts = work.prompts(given["prompts"])
    rows = [[{"role": "user", "content": text}] for text in texts for _ in range(given["samples"] if method == "opd" else 1)]
    columns = {"prompt": rows}
    if method == "sft":
        answers = [work.reference(text, given["new"]) for text in texts]
        columns["completion"] = [[{"role": "assistant", "content": answer}] for answer in answers]
        lengths = [len(tokenizer(answer).input_ids) + 1 for answer in answers]
        given["tokens"] = sum(lengths), max(lengths) * len(lengths)
    config = configuration(given, len(rows) * (given["samples"] if method == "grpo" else 1))
    ends = work.end_ids(student, tokenizer)
    steps = Steps(given, student, teacher, ends)
    arguments = {
        "model": student,
        "args": config,
        "train_dataset": Dataset.from_dict(columns),
        "processing_class": tokenizer,
        "callbacks": [steps],
    }
    if method == "opd":
        trainer = DistillationTrainer(teacher_model=teacher, **arguments)
    elif method == "sft":
        trainer = SFTTrainer(**arguments)
    else:
        trainer = GRPOTrainer(reward_funcs=rewards, **arguments)
    if method != "sft":
        work.end_at(student, ends, given["ends"])
    trainer.train()


def rewards(completions, **_):
    return [work.reward(completion[0]["content"]) for completion in completions]


def configuration(given, rows):
    """The trainer's arguments: a step of all rows, at TRL's defaults but without recomputed activations, as ours."""
    method, most = given["method"], {"max_completion_length": given["new"]}
    kind, own = {
        "opd": (DistillationConfig, most),
        "sft": (SFTConfig, {"max_length": None}),
        "grpo": (GRPOConfig, most | {"num_generations": given["samples"]}),
    }[method]
    return kind(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        max_steps=given["steps"],
        gradient_checkpointing=False,
        bf16=given["kind"] == "bfloat16",
        use_cpu=given["device"] == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **own,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
