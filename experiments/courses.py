"""Runs as they went: every evaluation, and the means over seeds."""

from collections.abc import Iterable, Mapping

from experiments.grid import Row, picked, spread


def courses(runs: Iterable[tuple[Row, object]], numbers: Iterable[str]) -> list[Row]:
    """What was measured along each run, once per update."""
    measured = ((labels, {h["step"]: h for h in run.evaluation["history"]}.values()) for labels, run in runs)
    return [labels | {"update": h["step"]} | {n: h[n] for n in numbers if n in h} for labels, some in measured for h in some]


def along(rows: list[Row], numbers: Mapping[str, str]) -> list[list[str]]:
    """Lines of a table: means with intervals over seeds by arm and update; what was not measured is left empty."""
    told = []
    for arm, update in dict.fromkeys((r["arm"], r["update"]) for r in rows):
        mine = picked(rows, arm=arm, update=update)
        found = {n: [r[n] for r in mine if n in r] for n in numbers}
        told.append([f"`{arm}`", update, *(spread(values) if values else "" for values in found.values())])
    return told
