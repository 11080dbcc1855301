"""An engine with a copy of the weights, as slow as wanted, that keeps a diary; for tests of rollouts ahead of training."""

import json
import os
import signal
import threading
import time

import torch
from transformers import AutoModelForCausalLM

from opd_lightning.models.weights import full_weights
from opd_lightning.types import Completion
from opd_lightning.utils.seeds import derive_seed


class SlowEngine:
    """Draws from its own copy of the student, with random numbers of its own; writes what it does into diary-<rank>.jsonl.

    Args:
        folder: for the diary; None keeps it in `diary` alone.
        seconds: that a rollout takes beside the drawing.
        fails_at, stops_at: the rollout (from 1) that raises an error, or in which the process gets SIGINT.
    """

    holds_weights = True

    def __init__(self, tokenizer, folder=None, seconds=0.0, fails_at=None, stops_at=None, **_):
        self.tokenizer, self.folder, self.seconds = tokenizer, folder, seconds
        self.fails_at, self.stops_at = fails_at, stops_at
        self.lm, self.version = None, None
        self.diary, self.calls, self.spent = [], 0, 0.0
        self.before = lambda call: None

    def note(self, **entry):
        self.diary.append(entry | {"thread": threading.current_thread().name})
        if self.folder is not None:
            with (self.folder / f"diary-{os.environ.get('LOCAL_RANK', '0')}.jsonl").open("a") as file:
                file.write(json.dumps(self.diary[-1]) + "\n")

    def update_weights(self, student, version):
        if self.lm is None:
            self.lm = AutoModelForCausalLM.from_config(student.lm.config).eval()
        self.lm.load_state_dict({name: weight.clone() for name, weight in full_weights(student.lm)})
        self.version = version
        self.note(pushed=version)

    @torch.no_grad()
    def generate(self, prompts, sampling, seed, model=None):
        begun = time.perf_counter()
        if sampling.temperature > 0:
            self.rollout()
        done = [
            self.draw(prompt.token_ids, sampling, derive_seed(seed, b, i))
            for b, prompt in enumerate(prompts)
            for i in range(sampling.n)
        ]
        self.note(version=self.version, seed=seed, prompts=[p.token_ids for p in prompts], greedy=sampling.temperature == 0)
        self.spent += time.perf_counter() - begun
        return done

    def rollout(self):
        """What happens to a rollout before it is written."""
        self.before(self.calls)
        self.calls += 1
        if self.calls == self.stops_at:
            os.kill(os.getpid(), signal.SIGINT)
        if self.calls == self.fails_at:
            raise RuntimeError("the engine is gone")
        time.sleep(self.seconds)

    def draw(self, prompt, sampling, seed):
        draws, ids, logprobs = torch.Generator().manual_seed(seed), list(prompt), []
        while len(logprobs) < sampling.max_new_tokens and (not logprobs or ids[-1] != self.tokenizer.eos_token_id):
            log_p = self.lm(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(log_p.argmax() if sampling.temperature == 0 else torch.multinomial(log_p.exp(), 1, generator=draws))
            ids.append(token)
            logprobs.append(float(log_p[token]))
        stopped = ids[-1] == self.tokenizer.eos_token_id
        return Completion(ids[len(prompt) :], "stop" if stopped else "length", logprobs, self.version)

    def close(self):
        self.note(closed=True)
