"""Two stages of runs as they went: every evaluation, the means over seeds, and how far one arm is from another."""

from collections.abc import Iterable, Mapping

from experiments.grid import Row, paired, spread


def courses(runs: Iterable[tuple[Row, object]], numbers: Iterable[str]) -> list[Row]:
    """What was measured along each run, once per update."""
    measured = ((labels, {h["step"]: h for h in run.evaluation["history"]}.values()) for labels, run in runs)
    return [labels | {"update": h["step"]} | {n: h.get(n) for n in numbers} for labels, some in measured for h in some]


def along(rows: list[Row], numbers: Mapping[str, str]) -> list[list[str]]:
    """Lines of a table: means with intervals over seeds by arm and update; what was not measured is left empty."""
    told = []
    for arm, update in dict.fromkeys((r["arm"], r["update"]) for r in rows):
        found = {n: [r[n] for r in rows if (r["arm"], r["update"]) == (arm, update) and r[n] is not None] for n in numbers}
        told.append([f"`{arm}`", update, *(spread(values) if values else "" for values in found.values())])
    return told


def differences(rows: list[Row], arm: str, baseline: str, numbers: Mapping[str, str]) -> list[list[str]]:
    """Lines of a table: the arm less the baseline at each update after the first, paired by seed."""
    updates = dict.fromkeys(r["update"] for r in rows if r["arm"] == arm and r["update"])
    return [
        [update, *(paired([r for r in rows if r["update"] == update], arm, baseline, n) for n in numbers)] for update in updates
    ]
