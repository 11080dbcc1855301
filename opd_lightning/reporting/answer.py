"""Summary of a study in two or three sentences: which method is best in the headline numbers, and at what cost."""

from statistics import mean

from opd_lightning.reporting.compare import Compared, Comparison
from opd_lightning.reporting.headline import Headline, chosen, more_seeds, numbers, one_seed
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.table import labels, metrics

MANY = 8
"""From this many methods on, costs of the most expensive one alone are given."""


def answer(runs: list[Run], compared: Compared) -> list[str]:
    """The sentences of the summary."""
    if len(labels(runs)) == 1:
        return single_method(runs)
    aimed = runs[0].config["budget"]["accuracy"] is not None
    headlines = chosen(runs)[: 1 if aimed else 2]
    if aimed and reached(runs):  # all learned the new skill equally, so prior skills are compared
        headlines = chosen(runs)[1:2] or headlines
    best = [sentence for headline in headlines if (sentence := winner(runs, compared, headline))]
    if one_seed(runs):
        once = f"One seed decides nothing; for an answer add seeds to the same command: {more_seeds(runs)}."
        return [once, *(f"In these runs, {sentence[0].lower()}{sentence[1:]}" for sentence in best[-1:]), costs(runs)]
    return [*([target(runs)] if aimed else []), *best, costs(runs)]


def single_method(runs: list[Run]) -> list[str]:
    """The sentences for a study with one method: what it changed."""
    (label, cell), start = next(iter(labels(runs).items())), runs[0].evaluation["start"]
    ends = {h: mean(numbers(run)[h.name] for run in cell) for h in chosen(runs) if h.name in start}
    changes = joined([f"{h.label} from {start[h.name]:.3f} to {end:.3f}" for h, end in ends.items()])
    return [f"There is one method, {inline(label)}, so nothing is compared.", *([f"It changed {changes}."] if changes else [])]


def reached(runs: list[Run]) -> dict[str, list[Run]]:
    """The methods that reached the study's target with every seed; all, if it has none."""
    return {label: cell for label, cell in labels(runs).items() if not any(run.censored for run in cell)}


def target(runs: list[Run]) -> str:
    """A sentence on the target accuracy, and the methods that missed it."""
    budget, cells = runs[0].config["budget"], labels(runs)
    missed = {label: sum(run.censored for run in cells[label]) for label in cells if label not in reached(runs)}
    misses = joined([f"by {inline(label)} in {n} of {len(cells[label])} runs" for label, n in missed.items()])
    metric = "the new skill" if budget["metric"].endswith("new/accuracy") else budget["metric"]
    if not reached(runs):
        return f"No method reached {budget['accuracy']:g} on {metric} with every seed."
    outcome = f"missed {misses}" if misses else "which every run reached"
    return f"Training ended at {budget['accuracy']:g} on {metric}, {outcome}."


def winner(runs: list[Run], compared: Compared, headline: Headline) -> str:
    """The best method in a number, against the baseline or the next best; of those that reached the target, if any did."""
    means = {
        label: mean(numbers(run)[headline.name] for run in cell)
        for label, cell in (reached(runs) or labels(runs)).items()
        if all(headline.name in numbers(run) for run in cell)
    }
    if len(means) < 2:
        return ""
    texts = {label: f"{value:.3f}" for label, value in means.items()}
    order = sorted(means, key=lambda label: means[label] * (1 if headline.least else -1))
    first = [label for label in order if texts[label] == texts[order[0]]]
    if len(first) == len(order):
        return f"All methods are equal in {headline.label}: {texts[order[0]]}."
    behind = next(label for label in order if label not in first)
    other = behind if compared.baseline in first or compared.baseline not in means else compared.baseline
    sentence = f"{headline.won} {joined([*map(inline, first)])}: {texts[first[0]]}, against {texts[other]} by {inline(other)}"
    comparison = compared.of(other if compared.baseline in first else first[0], headline.name)
    return f"{sentence}{uncertainty(comparison) if comparison else ''}."


def uncertainty(comparison: Comparison) -> str:
    """The uncertainty of a difference, in brackets; empty for a single seed, which has its own sentence."""
    d = comparison.difference
    if d.seeds == 1:
        return ""
    if d.alike:
        return f" ({abs(d.mean):.3f} apart with every one of {d.seeds} seeds)"
    subject = f"{inline(comparison.method)} is " if comparison.shown else ""
    return f" ({subject}{comparison.verdict} with {d.seeds} seeds: {d})"


def costs(runs: list[Run]) -> str:
    """The cost of each method (of MANY, of the most expensive one) as a multiple of the cheapest, and what is not counted."""
    cells = labels(runs)
    spent = {label: mean(numbers(run)["flops"] for run in cell) for label, cell in cells.items()}
    least, *others = sorted(spent, key=lambda label: spent[label])
    shown = others if len(others) < MANY else others[-1:]
    multiples = joined([f"{inline(label)} {spent[label] / (spent[least] or 1):.1f}" for label in shown])
    made = {label: metrics(cell[0]).get("teacher_training") for label, cell in cells.items()}
    taught = joined([f"{inline(label)}, {flops:.2e}" for label, flops in made.items() if flops])
    uncounted = f" (training the teacher of {taught}, is not counted)" if taught else ""
    if max(spent.values()) < 1.01 * spent[least]:
        return f"All methods cost the same, {spent[least]:.2e} FLOPs{uncounted}."
    return f"In FLOPs, {inline(least)} cost least ({spent[least]:.2e}), {multiples} times as much{uncounted}."


def inline(label: str) -> str:
    """A label within a sentence: "sdft (lr 1e-4)" for "sdft, lr 1e-4"."""
    name, _, settings = label.partition(", ")
    return f"{name} ({settings})" if settings else name


def joined(parts: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
