"""Memory of the loss with a teacher of 262,144 tokens, by rows of logits at a time and by tokens of the batch.

python -m experiments.cross_tokenizer.memory

Heads alone, of random weights: a student with 49,152 tokens, and a teacher of which it shares 46,000; all others count under
one of these, as nearly all of Gemma's do. Writes memory.csv: how far the peak of resident memory lies above that before the
first case, while loss and gradient were computed. The cases of a
reading are in one process, in order, for a peak never falls.
"""

import argparse
import csv
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUDENT, TEACHER, SHARED, WIDTH = 49_152, 262_144, 46_000, 64
CASES = [(32, 256), (32, 1024), (128, 256)]
"""Rows of logits at a time, and tokens."""


def peak() -> float:
    """The peak of resident memory, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def compute(reading: str, chunk: int, tokens: int) -> None:
    """Loss and gradient."""
    import torch

    from opd_lightning.losses import Head, head_loss
    from opd_lightning.losses.divergences import forward_kl, total_variation
    from opd_lightning.losses.objective import Objective
    from opd_lightning.losses.targets import HiddenScores
    from opd_lightning.losses.token_weights import completion_mask, token_mean
    from opd_lightning.losses.vocab_support import FullVocabulary
    from opd_lightning.teachers.alignment.match import SharedIds
    from opd_lightning.teachers.alignment.scores import AlignedScores, OnShared, by_rank
    from opd_lightning.types import Tokens
    from opd_lightning.utils.vocabulary import ValidIds

    torch.manual_seed(0)
    hidden, other = (torch.randn(tokens, WIDTH) for _ in range(2))
    weight, matrix = torch.randn(STUDENT, WIDTH, requires_grad=True), torch.randn(TEACHER, WIDTH)
    pairs = torch.arange(SHARED), torch.arange(SHARED) * 5
    classes = torch.arange(STUDENT) % SHARED, torch.randint(SHARED, (TEACHER,)).scatter(0, pairs[1], pairs[0])
    both = SharedIds(*pairs, ValidIds(STUDENT), classes)
    target = OnShared(both, ValidIds(TEACHER)) if reading == "shared" else by_rank
    inner = HiddenScores(other, Head(matrix).project, TEACHER)
    scores = AlignedScores(inner, torch.arange(tokens), target, STUDENT)
    divergence = forward_kl if reading == "shared" else total_variation
    loss = Objective(completion_mask, token_mean, divergence, FullVocabulary())
    rows = Tokens(torch.randint(STUDENT, (tokens,)), torch.arange(tokens), torch.full((tokens,), 1 / tokens))
    total, _ = head_loss(hidden.requires_grad_(), Head(weight), rows, {"teacher": scores}, loss, chunk=chunk)
    total.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reading", choices=("shared", "uld"))
    reading = parser.parse_args().reading
    if reading:
        compute(reading, 1, 4)  # what is loaded or made once
        before = peak()
        for case in CASES:
            compute(reading, *case)
            print(round(peak() - before), flush=True)
        return
    with (HERE / "memory.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("reading", "chunk", "tokens", "mib"))
        for name in ("shared", "uld"):
            command = [sys.executable, "-m", "experiments.cross_tokenizer.memory", "--reading", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            writer.writerows([name, *case, mib] for case, mib in zip(CASES, output.split(), strict=True))


if __name__ == "__main__":
    main()
