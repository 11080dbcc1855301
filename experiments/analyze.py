"""Tables and figures of the pages in this folder, made from their results.csv as each page.yaml asks.

python -m experiments.analyze                      # tables and figures of all pages, from the committed numbers
python -m experiments.analyze demo --collect       # first read the finished runs of outputs/demo into demo/results.csv

`--collect` replaces the rows of a run that it finds again (same labels and seed), adds new runs and keeps all other rows.

A page.yaml names its files (which studies, which configuration keys label a run, which evaluated numbers are kept), its
table (rows are groups of labels, columns are means or differences paired by seed) and its figure.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from matplotlib.axes import Axes

from opd_lightning.reporting.figures import COLOURS, MARKERS
from opd_lightning.reporting.statistics import over_seeds

HERE = Path(__file__).resolve().parent
COSTS = ("updates", "student_tokens", "flops", "reached")
"""Columns of a run's last row only."""
BLOCK = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)

STYLES = {"sft": 0, "opd": 1, "sdft": 2, "grpo": 3, "kd": 4, "opd_sampled": 5}
"""Colour and marker of a method, the same in all figures; at most eight names in one figure."""
SAME = {
    "smollm2_keep-opd": "opd",
    "smollm2_keep-seqkd": "sft",
    "smollm2_rule_sft": "sft",
    "student_reverse_kl": "opd",
    "teacher_none": "sft",
}
"""Runs that are such a method under another name."""

Row = dict[str, Any]
Runs = dict[tuple[str, ...], list[Row]]
"""Rows by run: by its labels and its seed, as text."""


def pages() -> list[Path]:
    """The folders that have a page.yaml."""
    return sorted(path.parent for path in HERE.glob("*/page.yaml"))


def read_page(folder: Path) -> dict[str, Any]:
    """A page's page.yaml."""
    return yaml.safe_load((folder / "page.yaml").read_text())


# From run folders to results.csv


def collect(folder: Path, outputs: Path) -> list[str]:
    """Put the finished runs of a page's studies into its CSV files: a row per run and evaluation.

    A run that a file has already (same labels and seed) is replaced where it stands, a new one is added at the end, and all
    other rows stay as they are.

    Returns:
        A sentence per file: how many runs were replaced, added and kept.

    Raises:
        ValueError: no study has a finished run, or two runs have the same labels and seed.
    """
    specs = read_page(folder).get("files", {})
    found = {name: finished(spec, outputs) for name, spec in specs.items()}
    if specs and not any(found.values()):
        studies = ", ".join(dict.fromkeys(study for spec in specs.values() for study in spec["studies"]))
        raise ValueError(f"{outputs} has no finished run of {studies}; make them with the command of {folder.name}/README.md")
    return [merge(folder / name, specs[name], runs) for name, runs in found.items()]


def finished(spec: Mapping[str, Any], outputs: Path) -> Runs:
    """The finished runs of a file's studies.

    Raises:
        ValueError: two of them have the same labels and seed.
    """
    found: Runs = {}
    places: dict[tuple[str, ...], Path] = {}
    for study in spec["studies"]:
        for path in sorted((outputs / study).glob("*/seed-*/status.json")):
            if rows := rows_of(path.parent, spec):
                run = run_of(rows[0], spec)
                if run in found:
                    both = f"{places[run]} and {path.parent}"
                    raise ValueError(f"{both} have the same labels and seed ({', '.join(run)}); move one of them away")
                found[run], places[run] = rows, path.parent
    return found


def merge(path: Path, spec: Mapping[str, Any], found: Runs) -> str:
    """Write a CSV file with the runs that it has and those that were found; see `collect`."""
    columns = [*spec["labels"], "seed", "step", *spec["numbers"]]
    before: Runs = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                before.setdefault(run_of(row, spec), []).append(row)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for rows in (before | found).values():
            writer.writerows([[shown(row.get(column, "")) for column in columns] for row in rows])
    replaced = len(before.keys() & found.keys())
    return f"{path.name}: {replaced} runs replaced, {len(found) - replaced} added, {len(before) - replaced} kept"


def run_of(row: Row, spec: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a run from the others of a file: its labels and its seed."""
    return tuple(str(shown(row.get(name, ""))) for name in (*spec["labels"], "seed"))


def rows_of(run: Path, spec: Mapping[str, Any]) -> list[Row]:
    """The rows of one run folder, costs in the last; none if the run is not finished."""
    status = json.loads((run / "status.json").read_text())
    if status["state"] != "finished":
        return []
    config = yaml.safe_load((run / "config.yaml").read_text())
    history = {h["step"]: h for h in json.loads((run / "evaluation.json").read_text())["history"]}
    ledger = json.loads((run / "ledger.json").read_text())
    labels = {name: select(config, key) for name, key in spec["labels"].items()} | {"seed": config["seed"]}
    rows = [labels | h for step, h in sorted(history.items()) if step > 0 or not spec.get("end_only")]
    costs = (ledger["steps"], ledger["tokens"].get("student_tokens", 0), sum(ledger["flops"].values()))
    rows[-1] |= dict(zip(COSTS, (*costs, status["ended_by"] != "trainer.max_steps"), strict=True))
    return rows[-1:] if spec.get("end_only") else rows


def select(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of a run's configuration."""
    for part in key.split("."):
        config = config[part]
    return config


def shown(value: Any) -> Any:
    """A cell of a CSV file: six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else value


# From results.csv to a table


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; empty cells are left out, numbers are floats, labels stay text."""
    with path.open(newline="") as file:
        return [{key: number(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def number(text: str) -> float | str:
    """A number, or the text where it is none."""
    try:
        return float(text)
    except ValueError:
        return text


def picked(rows: Iterable[Row], labels: Mapping[str, Any]) -> list[Row]:
    """The rows with these labels; a list of values takes any of them."""
    wanted = {key: value if isinstance(value, list) else [value] for key, value in labels.items()}
    return [row for row in rows if all(row.get(key) in values for key, values in wanted.items())]


def groups(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """The different labels of these names, in the order in which they first occur."""
    return list({tuple(row[name] for name in names): {name: row[name] for name in names} for row in rows}.values())


def ends(rows: Iterable[Row], number: str | Sequence[str]) -> dict[float, float]:
    """A number by seed, each at its run's last evaluation that has it; of several names, the first that a row has.

    Raises:
        ValueError: two rows have the same seed and step, so they are of two runs.
    """
    found: dict[float, float] = {}
    seen: set[tuple[float, float]] = set()
    for row in sorted(rows, key=lambda row: row.get("step", 0)):
        at = row.get("seed", 0), row.get("step", 0)
        if at in seen:
            raise ValueError(f"two runs have the same labels, seed ({at[0]:g}) and step ({at[1]:g}): {row}")
        seen.add(at)
        if name := next((n for n in ([number] if isinstance(number, str) else number) if n in row), None):
            found[at[0]] = row[name]
    return found


def cell(rows: Sequence[Row], labels: Row, column: Mapping[str, Any]) -> str:
    """One cell: a mean over seeds, or with `less` the difference to the row with those labels, paired by seed.

    A difference is left out where a run of either missed the target (`reached`): it stands at another accuracy.
    """
    form, at = column.get("format", ".3f"), column.get("at", {})
    own = picked(rows, labels | column.get("of", {}))
    mine = ends(picked(own, at), column["number"])
    if "less" not in column:
        return interval(list(mine.values()), form)
    base = picked(rows, labels | column["less"])
    other = ends(picked(base, at), column["number"])
    if own == base or any(row.get("reached") == "False" for row in [*own, *base]):
        return ""
    both = sorted(set(mine) & set(other))
    return interval([mine[seed] - other[seed] for seed in both], "+" + form)


def interval(values: Sequence[float], form: str) -> str:
    """Mean and half-width of Student's 95 % interval over seeds; the mean alone of one value, or of values that agree."""
    if not values:
        return ""
    middle = f"{mean(values):{form}}"
    if len(values) == 1:
        return middle
    found = over_seeds(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    half = f"{(found.high - found.low) / 2:{form.lstrip('+')}}"
    return f"{middle}±{half}" if float(half) > 1e-3 * abs(float(middle)) else middle


def table(folder: Path) -> str:
    """A page's table in Markdown."""
    page = read_page(folder)
    spec, names = page["table"], page.get("names", {})
    rows = picked(read_rows(folder / spec.get("of", "results.csv")), spec.get("where", {}))
    wanted = spec.get("order") or groups(rows, spec["rows"])
    facts = spec.get("facts", {})
    lines = [[*spec["rows"].values(), *facts, *(column["title"] for column in spec["columns"])]]
    lines.append(["---"] * len(lines[0]))
    for labels in wanted:
        values = [str(names.get(value := labels[name], shown(value))) for name in spec["rows"]]
        values += [str(fact[values[0]]) for fact in facts.values()]
        lines.append([*values, *(cell(rows, labels, column) for column in spec["columns"])])
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def rewritten(folder: Path) -> str:
    """A page's text with its table made again."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(folder)}\n{found[2]}", (folder / "README.md").read_text())


# From results.csv to a figure


def draw(folder: Path) -> None:
    """Write figure.png of a page whose page.yaml has a `figure`."""
    page = read_page(folder)
    if (spec := page.get("figure")) is None:
        return
    rows = picked(read_rows(folder / spec.get("of", "results.csv")), spec.get("where", {}))
    panels = (
        [({spec["panel"]: value}, spec["y"][0]) for value in spec["panels"]]
        if "panel" in spec
        else [({}, y) for y in spec["y"]]
    )
    figure, all_axes = plt.subplots(1, len(panels), figsize=(1.8 + 3.8 * len(panels), 3.4), squeeze=False, layout="constrained")
    units = [spec["ylabel"]] * len(panels) if isinstance(spec["ylabel"], str) else spec["ylabel"]
    for axes, (where, y), title, unit in zip(all_axes[0], panels, spec["titles"], units, strict=True):
        curves(axes, picked(rows, where), spec, y, page.get("names", {}))
        axes.set(title=title, xlabel=spec["xlabel"], ylabel=unit)
        if spec.get("log"):
            axes.set_xscale("log")
            axes.set_xticks(at := sorted({row[spec["x"]] for row in rows}), [f"{x:g}" for x in at])
            axes.minorticks_off()
        axes.grid(alpha=0.25)
    handles, names = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(folder / "figure.png", dpi=110)
    plt.close(figure)


def curves(axes: Axes, rows: Sequence[Row], spec: Mapping[str, Any], y: str, names: Mapping[str, str]) -> None:
    """A line per group of `by`: means over seeds at each step, with a band from the lowest to the highest run.

    Two measurements, before and after, are markers with a thin dashed line between them and bars from lowest to highest.
    """
    found = groups(rows, spec["by"])
    for labels, style in zip(found, styles([next(iter(labels.values())) for labels in found]), strict=True):
        mine = [row for row in picked(rows, labels) if y in row and spec["x"] in row]
        steps = sorted({row[spec.get("group", "step")] for row in mine})
        some = [picked(mine, {spec.get("group", "step"): step}) for step in steps]
        xs, ys = [mean(row[spec["x"]] for row in at) for at in some], [[row[y] for row in at] for at in some]
        few = len(xs) == 2
        line = {"linestyle": "--", "linewidth": 0.8, "markersize": 6} if few else {"markersize": 3}
        label = ", ".join(str(names.get(value, value)) for value in labels.values())
        again, place = divmod(style, len(COLOURS))  # beyond the colours, with another marker
        colour, marker = COLOURS[place], MARKERS[(place + again) % len(MARKERS)]
        axes.plot(xs, list(map(mean, ys)), label=label, color=colour, marker=marker, **line)
        if few:
            axes.vlines(xs, list(map(min, ys)), list(map(max, ys)), color=colour, linewidth=1)
            axes.set_xticks(xs)
        elif spec["x"] == spec.get("group", "step"):
            axes.fill_between(xs, list(map(min, ys)), list(map(max, ys)), color=colour, alpha=0.15, linewidth=0)


def styles(names: Sequence[str]) -> list[int]:
    """The style of each name: its method's, or one that is left; beside methods, first one that no method has."""
    fixed = {name: STYLES[method] for name in names if (method := SAME.get(name, name)) in STYLES}
    order = [*range(len(STYLES) if fixed else 0, len(COLOURS)), *range(len(STYLES) if fixed else 0)]
    free = chain((i for i in order if i not in fixed.values()), count(len(COLOURS)))
    return [fixed[name] if name in fixed else next(free) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="folders beside this file; all where none is named")
    parser.add_argument("--collect", action="store_true", help="first put finished runs into results.csv")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs' studies lie")
    given = parser.parse_args()
    for folder in [HERE / name for name in given.pages] or pages():
        try:
            told = collect(folder, given.outputs) if given.collect else []
            (folder / "README.md").write_text(rewritten(folder))
            draw(folder)
        except ValueError as error:
            sys.exit(f"error: {folder.name}: {error}")
        print("\n  ".join([folder.name, *told]))


if __name__ == "__main__":
    main()
