"""Pre-training of the embedded world's models: the start model, and from it the external teacher with the new skill.

    python -m opd_lightning.toy.pretrain --out opd_lightning/toy/assets/world      # about 15 minutes, one core

A start model is trained on prior operations without a demonstration (45 %), on any operation with a demonstration, whose
content is the answer in the native style (40 %, or --demonstrations, at the expense of the former), and on unseen operations
with random answers (15 %, right about 1 time in 25, so that reinforcement learning finds rewards; with --guess digit by digit).
With --obey below 1 only that share of demonstrations decides the answer; the others are ignored. 15 % of all prompts begin
with a rule that sets another style. An error-tolerant model also continues correctly after wrong digits, so that with a
demonstration it is a reliable teacher on a student's wrong prefixes.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from opd_lightning.models.flops import Sizes
from opd_lightning.toy.world import (
    LENGTH,
    OPERATIONS,
    PRIOR,
    RULES,
    STYLES,
    UNSEEN,
    VOCABULARY,
    Digits,
    WorldTask,
    input_at,
    split_range,
    world_tokenizer,
    write,
)

TOKEN = {token: i for i, token in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Mixture:
    """What a model is pre-trained on.

    Attributes:
        tolerant: corrupt some digits of answers, with right labels after them.
        demonstrations: share of questions with a demonstration.
        obey: share of demonstrations whose content is the answer; the rest is ignored.
        lengths: digits of a question, with equal shares.
        guess: chance that a digit of a guessed answer is right, otherwise that of `copy`; None guesses an operation.
        skill, teach: the new skill and its share, for the teacher.
    """

    tolerant: bool = True
    demonstrations: float = 0.4
    obey: float = 1.0
    lengths: tuple[int, ...] = (LENGTH,)
    guess: float | None = None
    skill: str = ""
    teach: float = 0.0

    @property
    def width(self) -> int:
        """Tokens of the longest sequence, and one more."""
        return 5 * max(self.lengths) + 9


def new_model(seed: int) -> LlamaForCausalLM:
    """A causal transformer of 0.34M parameters with the world's vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=TOKEN["<pad>"],
        eos_token_id=TOKEN["<eos>"],
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def sample_sequence(rng: np.random.Generator, mixture: Mixture) -> tuple[str, str, bool]:
    """One (prompt, answer, whether its digits may be corrupted) of the mixture."""
    length = mixture.lengths[0] if len(mixture.lengths) == 1 else int(rng.choice(mixture.lengths))
    digits = input_at(int(rng.integers(*split_range("pretrain", length))), length)
    question, content, corruptible = sample_question(rng, digits, mixture)
    if rng.random() < 0.15:
        style = str(rng.choice(list(STYLES)))
        return f"{RULES[style]} {question} =", write(content, style), corruptible
    return f"{question} =", write(content, "native"), corruptible


def sample_question(rng: np.random.Generator, digits: Digits, mixture: Mixture) -> tuple[str, Digits, bool]:
    """A question about digits, perhaps with a demonstration, and the content of its answer."""
    shown = " ".join(map(str, digits))
    if rng.random() < mixture.teach:
        return f"{mixture.skill} {shown}", UNSEEN[mixture.skill](digits), True
    kind = rng.random()
    if kind < 0.85 - mixture.demonstrations:
        name = str(rng.choice(list(PRIOR)))
        return f"{name} {shown}", PRIOR[name](digits), True
    if kind < 0.85:
        name = str(rng.choice(list(OPERATIONS)))
        content = tuple(int(d) for d in rng.integers(0, 10, len(digits)))
        if rng.random() < 0.5:
            content = OPERATIONS[str(rng.choice(list(OPERATIONS)))](digits)
        demonstration = write(content, str(rng.choice(list(STYLES))))
        if mixture.obey < 1 and rng.random() >= mixture.obey:
            content = PRIOR[name](digits) if name in PRIOR else guessed(rng, name, digits, mixture.guess)
        return f"{name} {shown} [ {demonstration} ]", content, True
    name = str(rng.choice([n for n in UNSEEN if mixture.teach == 0 or n != mixture.skill]))
    return f"{name} {shown}", guessed(rng, name, digits, mixture.guess), False


def guessed(rng: np.random.Generator, name: str, digits: Digits, guess: float | None) -> Digits:
    """A random answer that is rarely right."""
    if guess is not None:
        right, wrong = UNSEEN[name](digits), digits
        return tuple(a if rng.random() < guess else b for a, b in zip(right, wrong, strict=True))
    names, share = list(OPERATIONS), [0.21] * len(PRIOR) + [0.04] * len(UNSEEN)
    return OPERATIONS[str(rng.choice(names, p=share))](digits)


def sample_batch(rng: np.random.Generator, size: int, mixture: Mixture):
    """Input ids and labels [B, T]; labels are -100 outside the answer and stay right where inputs are corrupted."""
    ids = np.full((size, mixture.width), TOKEN["<pad>"])
    labels = np.full((size, mixture.width), -100)
    for row in range(size):
        prompt, answer, corruptible = sample_sequence(rng, mixture)
        left = [TOKEN[t] for t in prompt.split()]
        right = [TOKEN[t] for t in answer.split()] + [TOKEN["<eos>"]]
        n, m = len(left), len(right)
        ids[row, : n + m] = left + right
        labels[row, n : n + m] = right
        if mixture.tolerant and corruptible and rng.random() < 0.5:
            for t in range(n + 1, n + m - 1):
                if rng.random() < 0.25:
                    ids[row, t] = TOKEN[str(rng.integers(0, 10))]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def train(model, steps: int, lr: float, warmup: int, seed: int, mixture: Mixture):
    """Cross-entropy on answers; AdamW with warm-up and linear decay to 5 %. Returns tokens seen and seconds."""
    rng = np.random.default_rng([seed, int(mixture.teach * 100)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    begun, tokens = time.perf_counter(), 0
    model.train()
    for step in range(steps):
        ids, labels = sample_batch(rng, 160, mixture)
        optimizer.zero_grad()
        loss = backward(model, ids, labels)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * (1 - 0.95 * max(0, step - warmup) / (steps - warmup))
        optimizer.step()
        tokens += int((ids != TOKEN["<pad>"]).sum())
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss:.4f}  {tokens / (time.perf_counter() - begun):.0f} tokens/s", flush=True)
    return tokens, time.perf_counter() - begun


def backward(model, ids, labels, groups: int = 4) -> float:
    """Gradients of the mean loss over answer tokens; rows of similar length are batched together to save time."""
    counted, lengths, mean = int((labels != -100).sum()), (ids != TOKEN["<pad>"]).sum(1), 0.0
    for rows in lengths.argsort().chunk(groups):
        width = int(lengths[rows].max())
        logits = model(input_ids=ids[rows, :width]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows, 1:width].flatten(), reduction="sum") / counted
        loss.backward()
        mean += loss.item()
    return mean


@torch.no_grad()
def measure(model, task: WorldTask, split: str = "validation") -> dict[str, float]:
    """Greedy accuracy per skill without a demonstration, and of the new skill with one ("new/demonstrated"); of prior skills
    with a rule the share in the style it sets ("prior/ruled")."""
    model.eval()
    tokenizer = world_tokenizer()
    scores: dict[str, list[float]] = {}
    cases = [(e, e.messages[0]["content"], e.skill) for e in task.examples(split)]
    cases += [(e, f"{p} [ {e.demonstration} ]", "new/demonstrated") for e, p, skill in cases if skill == "new"]
    cases += [(e, f"{RULES['listed']} {p}", "prior/ruled") for e, p, skill in cases if skill.startswith("prior")]
    for example, prompt, skill in cases:
        ids = torch.tensor([[TOKEN[t] for t in f"{prompt} =".split()]])
        out = model.generate(ids, max_new_tokens=2 * task.length + 2, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = str(tokenizer.decode(out, skip_special_tokens=True))
        ruled = skill == "prior/ruled"
        right = (
            float(text == write(tuple(map(int, example.extra["digits"])), "listed"))
            if ruled
            else task.verify(example, text).content
        )
        scores.setdefault(skill, []).append(right)
    return {skill: math.fsum(values) / len(values) for skill, values in scores.items()}


def flops(model, tokens: int, steps: int, rows: int = 160) -> int:
    """FLOPs of this training, for sequences of the mean length; all positions have logits."""
    sizes, length = Sizes.of(model), [round(tokens / steps / rows)]
    return steps * rows * (sizes.read(length) + sizes.logits(*length) + sizes.backward(length, *length))


def main() -> None:
    """The command of the pre-training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets start/ and teacher/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000, help="pre-training steps of 160 sequences")
    parser.add_argument("--teacher-steps", type=int, default=1000, help="0: no teacher")
    parser.add_argument("--skill", default="rotate", choices=list(UNSEEN), help="what the teacher learns")
    parser.add_argument("--fragile", action="store_true", help="no corrupted digits: a start model without error recovery")
    parser.add_argument("--tolerant-teacher", action="store_true", help="with --fragile: but the teacher recovers from errors")
    parser.add_argument("--demonstrations", type=float, default=0.4, help="share of questions with a demonstration")
    parser.add_argument("--obey", type=float, default=1.0, help="share of demonstrations that decide the answer")
    parser.add_argument("--base", type=Path, help="a start model to continue, at a quarter of the rate")
    parser.add_argument("--lengths", type=int, nargs="+", default=[LENGTH], help="digits of a question")
    parser.add_argument("--guess", type=float, help="chance of each digit of a guessed answer to be right")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tolerant_teacher = not args.fragile or args.tolerant_teacher
    start = Mixture(not args.fragile, args.demonstrations, args.obey, tuple(args.lengths), args.guess)
    model = LlamaForCausalLM.from_pretrained(args.base) if args.base else new_model(args.seed)
    stages: dict[str, dict] = {
        "start": dict(steps=args.steps, lr=5e-4 if args.base else 2e-3, warmup=50 if args.base else 200, mixture=start),
        "teacher": dict(
            steps=args.teacher_steps,
            lr=5e-4,
            warmup=50,
            mixture=replace(start, tolerant=tolerant_teacher, skill=args.skill, teach=0.4),
        ),
    }
    for name, options in stages.items():
        if not options["steps"]:
            continue
        tokens, seconds = train(model, seed=args.seed, **options)
        scores: dict[str, float] = {}
        for length in args.lengths:
            measured = measure(model, WorldTask(skill=args.skill, n_eval=128 if length == LENGTH else 64, length=length))
            scores |= measured if length == LENGTH else {f"{key} ({length} digits)": value for key, value in measured.items()}
        folder = args.out / name
        model.save_pretrained(folder)
        world_tokenizer().save_pretrained(folder)
        cost = {
            "train_tokens": tokens,
            "train_flops": flops(model, tokens, options["steps"]),
            "parameters": model.num_parameters(),
        }
        cost["seconds"] = round(seconds)
        made = {"command": "python -m opd_lightning.toy.pretrain", "seed": args.seed}
        made |= {"base": str(args.base)} if args.base and name == "start" else {}
        made |= {key: value for key, value in options.items() if key != "mixture"} | asdict(options["mixture"])
        (folder / "made.json").write_text(json.dumps(made | cost | {"validation": scores}, indent=1) + "\n")
        print(name, json.dumps(scores))


if __name__ == "__main__":
    main()
