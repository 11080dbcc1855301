"""How often the default interval covers the truth, in simulated studies of two methods that differ by 0.1 on 256 prompts.

python experiments/benchmarks/coverage.py
"""

import numpy as np

from opd_lightning.reporting.statistics import over_seeds


def coverage(seeds: int, sd: float, studies: int = 4000) -> float:
    """The share of studies whose interval holds 0.1; single seeds vary by sd, prompts are unequally hard."""
    rng, covered = np.random.default_rng(1), 0
    hard = rng.uniform(-0.2, 0.2, 256)
    for _ in range(studies):
        skills = [mean + rng.normal(0, sd, (seeds, 1)) / 2**0.5 + hard for mean in (0.75, 0.65)]
        first, second = ((rng.random((seeds, 256)) < skill).mean(1) for skill in skills)
        found = over_seeds(dict(enumerate(first)), dict(enumerate(second)))
        covered += found.low <= 0.1 <= found.high
    return covered / studies


if __name__ == "__main__":
    for seeds in (3, 5, 10):
        print(f"{seeds:2d} seeds:", *(f"sd {sd}: {coverage(seeds, sd):.4f} " for sd in (0.0, 0.03, 0.08)))
