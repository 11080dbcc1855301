"""Peak memory of one update on a single completion of so many tokens, in MiB above weights and gradients.

    python -m experiments.scale.memory --part step --tokens 16384

loss: the exact reverse KL from hidden states to their gradients; step: the same with the backbone's forward and backward pass;
checkpointed: with activation checkpointing; padded: with a second, shorter row in the same micro-batch. A process of its own
measures resident memory (Linux).
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_lightning.losses import Objective, head_loss
from opd_lightning.losses.divergences import reverse_kl
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.losses.token_weights import completion_mask, token_mean
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.models import Student
from opd_lightning.types import Sequences, Tokens

PARTS = ("loss", "step", "checkpointed", "padded")


def student(hidden: int, layers: int, vocab: int, tokens: int, checkpointing: bool) -> Student:
    """A random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2 * tokens,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    lm = LlamaForCausalLM(config)
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Student(lm, chunk=256).train()


def update(model: Student, part: str, tokens: int, scores: HiddenScores) -> None:
    """One forward and backward pass."""
    lengths = [tokens, tokens // 2] if part == "padded" else [tokens]
    n, total = sum(lengths), torch.tensor(lengths)
    ids = torch.arange(n) % model.head.weight.shape[0]
    batch = Tokens(ids, torch.arange(n), torch.full((n,), 1 / n))
    objective = Objective(completion_mask, token_mean, divergence=reverse_kl, vocab_support=FullVocabulary())
    if part == "loss":
        hidden = torch.randn(n, model.head.weight.shape[1], requires_grad=True)
        head_loss(hidden, model.head, batch, {"teacher": scores}, objective, model.chunk)[0].backward()
        return
    mask = (torch.arange(tokens) < total[:, None]).long()
    row, column = mask.nonzero().unbind(1)
    sequences = Sequences(torch.zeros_like(mask), mask, row, column)
    model(sequences, batch, {"teacher": scores}, objective)[0].backward()


def peak(part: str, tokens: int, hidden: int = 128, layers: int = 4, vocab: int = 16384) -> float:
    """MiB above weights, gradients and the teacher's scores."""
    model = student(hidden, layers, vocab, tokens, part == "checkpointed")
    n = tokens + tokens // 2 if part == "padded" else tokens
    scores = HiddenScores(torch.randn(n, hidden), model.head.copy().project, vocab)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update(model, part, 16, scores.take(slice(0, 24 if part == "padded" else 16)))  # libraries allocate at their first use
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident("VmRSS")
    update(model, part, tokens, scores)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """A memory field of this process, in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="step")
    for name, default in (("tokens", 1024), ("hidden", 128), ("layers", 4), ("vocab", 16384), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(round(peak(a.part, a.tokens, a.hidden, a.layers, a.vocab), 1))


if __name__ == "__main__":
    main()
