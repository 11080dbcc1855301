"""One of each: what a user adds without touching the package. Run from this folder:

python -m opd_lightning --config-dir conf loss/divergence=hellinger trainer.max_steps=5
"""

import json
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch

from opd_lightning.environments import SingleTurn
from opd_lightning.evaluation import Estimate
from opd_lightning.generation import TransformersGenerator
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.rollout import StudentRollout
from opd_lightning.teachers import BaseTeacher
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, SamplingParams, Verdict


def hellinger(log_s, log_t):
    """A divergence: log-probabilities [n, V] of student and teacher to entries [n, V] whose sum over V is the divergence."""
    return 0.5 * ((log_s / 2).exp() - (log_t / 2).exp()).square()


def unsure(log_s, targets, tokens, boost=2.0):
    """A factor of each token's loss from scores and verdicts: where the teacher is surer, and the answer was wrong."""
    teacher = targets["teacher"]
    gap = -(log_s.exp() * log_s).sum(-1) + (teacher.log_p.exp() * teacher.log_p).sum(-1)
    wrong = torch.ones_like(gap) if tokens.reward is None else 1 - tokens.reward
    return torch.where((gap > 0) & (wrong > 0), boost, 1.0)


unsure.reads_verdicts = True  # so that completions are judged


class Unigram(BaseTeacher):
    """A teacher: the frequencies of tokens in reference answers, whatever stands before."""

    def __init__(self, texts, smoothing=1.0, context=None):
        super().__init__(context)
        self.texts, self.smoothing = texts, smoothing

    def setup(self, student, renderer):
        super().setup(student, renderer)
        counts = torch.full((student.head.weight.shape[0],), self.smoothing)
        for text in self.texts:
            for token in renderer.reply(text):
                counts[token] += 1
        self.logits = counts.log().to(student.lm.device)

    def score(self, samples, max_tokens=None):
        n = sum(sample.trainable for sample in samples)
        rows = torch.zeros(n, 1, device=self.logits.device)
        return HiddenScores(rows, lambda hidden, out=None: self.logits.expand(len(hidden), -1).clone(), len(self.logits))


class Logged(TransformersGenerator):
    """A generator: keeps what was asked and written in a file."""

    def __init__(self, tokenizer, path):
        super().__init__(tokenizer)
        self.path = Path(path)

    def generate(self, prompts, sampling, seed, model=None):
        done = super().generate(prompts, sampling, seed, model)
        with self.path.open("a") as file:
            file.writelines(json.dumps({"seed": seed, "ids": completion.token_ids}) + "\n" for completion in done)
        return done


class AskAgain(SingleTurn):
    """An environment: a wrong answer is asked for again, a few times."""

    def reset(self, example):
        self.tries = 3
        return super().reset(example)

    def step(self, reply):
        self.tries -= 1
        verdict = self.task.verify(self.example, reply)
        over = verdict.content == 1 or self.tries == 0
        return ([], verdict) if over else ([{"role": "user", "content": "again"}], None)


def ask_again(task):
    """Makes a new episode each time it is called."""
    return lambda: AskAgain(task)


class LastDigit:
    """A task: the last digit of a number, right if it is the only digit of the answer."""

    verifies = True

    def __init__(self, max_new_tokens=3, batch_size=8, contexts=None):
        self.max_new_tokens, self.batch_size, self.contexts = max_new_tokens, batch_size, contexts or {}

    def examples(self, split):
        first = {"train": 0, "validation": 100, "test": 200}[split]
        return [self.example(number) for number in range(first, first + 50)]

    def example(self, number):
        digits = " ".join(str(number + 1000))
        chat = [{"role": "user", "content": f"copy {digits}"}]
        return Example(str(number), chat, completion=digits[-1], extra={"answer": digits[-1]})

    def verify(self, example, completion):
        return Verdict(float(completion.split() == [example.extra["answer"]]))


class Shortest:
    """An evaluation: the length of the shortest greedy answer, in tokens."""

    def __init__(self, task, renderer, n=16):
        self.examples = task.examples("test")[:n]
        self.prompts = [renderer.render(example.messages) for example in self.examples]
        self.sampling = SamplingParams(task.max_new_tokens, temperature=0.0)

    def __call__(self, student, teachers, generator):
        done = generator.generate(self.prompts, self.sampling, seed=0)
        return {"shortest": Estimate(float(min(len(completion.token_ids) for completion in done)))}


def later(tokens, share=0.5):
    """A token weight [N]: the first token of a completion counts less than the others."""
    return tokens.weight * torch.where(tokens.position == 0, share, 1.0)


class Hint(NoContext):
    """A context: the first character of the reference, in front of the question."""

    privileged = True

    def __call__(self, example, own=None, others=()):
        question = example.messages[-1]["content"]
        return [*example.messages[:-1], {"role": "user", "content": f"{example.completion.split()[1]} {question}"}]


class Warmer(StudentRollout):
    """A rollout: the student's own, at a temperature that rises with the seed's last digit."""

    def __call__(self, prompts, seed, generator, teachers=None):
        generator_at = Hotter(generator, 1.0 + seed % 10 / 100)
        return super().__call__(prompts, seed, generator_at, teachers)


class Hotter:
    """An engine that draws at another temperature."""

    def __init__(self, generator, temperature):
        self.generator, self.temperature = generator, temperature

    def generate(self, prompts, sampling, seed, model=None):
        return self.generator.generate(prompts, replace(sampling, temperature=self.temperature), seed, model)


def same_digits(completion, answer):
    """A verifier of rows: the digits are those of the answer, whatever stands between."""
    digits = ["".join(filter(str.isdigit, text)) for text in (completion, answer)]
    return Verdict(float(digits[0] == digits[1]))


class Longest(L.Callback):
    """A callback: prints the length of the longest completion of each update."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        print("longest", max(sample.trainable for sample in outputs["samples"]))
