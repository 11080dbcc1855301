"""Tables and figures of the pages in this folder, made from their results.csv as each page.yaml asks.

python -m experiments.analyze                      # tables and figures of all pages, from the committed numbers
python -m experiments.analyze demo --collect       # first read the finished runs of outputs/demo into demo/results.csv

A page.yaml names its files (which studies, which configuration keys label a run, which evaluated numbers are kept), its
table (rows are groups of labels, columns are means or differences paired by seed) and its figure.
"""

import argparse
import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
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

Row = dict[str, Any]


def pages() -> list[Path]:
    """The folders that have a page.yaml."""
    return sorted(path.parent for path in HERE.glob("*/page.yaml"))


def read_page(folder: Path) -> dict[str, Any]:
    """A page's page.yaml."""
    return yaml.safe_load((folder / "page.yaml").read_text())


# From run folders to results.csv


def collect(folder: Path, outputs: Path) -> None:
    """Write a page's CSV files from the finished runs of its studies: a row per run and evaluation.

    Raises:
        ValueError: a study has no finished run.
    """
    for name, spec in read_page(folder).get("files", {}).items():
        rows = []
        for study in spec["studies"]:
            found = [rows_of(path.parent, spec) for path in sorted((outputs / study).glob("*/seed-*/status.json"))]
            rows += [row for some in found for row in some]
            if not any(found):
                raise ValueError(
                    f"{outputs / study} has no finished run; make them with the command of {folder.name}/README.md"
                )
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            columns = [*spec["labels"], "seed", "step", *spec["numbers"]]
            writer.writerow(columns)
            writer.writerows([[shown(row.get(column, "")) for column in columns] for row in rows])


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


def ends(rows: Iterable[Row], column: str) -> dict[float, float]:
    """A number by seed, each at its run's last evaluation that has it."""
    found: dict[float, float] = {}
    for row in sorted(rows, key=lambda row: row.get("step", 0)):
        if column in row:
            found[row.get("seed", 0)] = row[column]
    return found


def cell(rows: Sequence[Row], labels: Row, column: Mapping[str, Any]) -> str:
    """One cell: a mean over seeds, or with `less` the difference to the row with those labels, paired by seed."""
    form, at = column.get("format", ".3f"), column.get("at", {})
    mine = ends(picked(rows, labels | column.get("of", {}) | at), column["number"])
    if "less" not in column:
        return interval(list(mine.values()), form)
    other = ends(picked(rows, labels | column["less"] | at), column["number"])
    both = sorted(set(mine) & set(other))
    return interval([mine[seed] - other[seed] for seed in both], "+" + form) if mine != other else ""


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
    lines = [[*spec["rows"].values(), *(column["title"] for column in spec["columns"])]]
    lines.append(["---"] * len(lines[0]))
    for labels in wanted:
        values = [names.get(value := labels[name], shown(value)) for name in spec["rows"]]
        lines.append([*map(str, values), *(cell(rows, labels, column) for column in spec["columns"])])
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
    for axes, (where, y), title in zip(all_axes[0], panels, spec["titles"], strict=True):
        curves(axes, picked(rows, where), spec, y, page.get("names", {}))
        axes.set(title=title, xlabel=spec["xlabel"], ylabel=spec["ylabel"])
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
    """A line per group of `by`: means over seeds at each step, with a band from the lowest to the highest run."""
    for i, labels in enumerate(groups(rows, spec["by"])):
        mine = [row for row in picked(rows, labels) if y in row and spec["x"] in row]
        steps = sorted({row[spec.get("group", "step")] for row in mine})
        some = [picked(mine, {spec.get("group", "step"): step}) for step in steps]
        xs, ys = [mean(row[spec["x"]] for row in at) for at in some], [[row[y] for row in at] for at in some]
        label = ", ".join(str(names.get(value, value)) for value in labels.values())
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(xs, list(map(mean, ys)), label=label, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=3)
        if spec["x"] == spec.get("group", "step"):
            axes.fill_between(xs, list(map(min, ys)), list(map(max, ys)), color=colour, alpha=0.15, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="folders beside this file; all where none is named")
    parser.add_argument("--collect", action="store_true", help="first write results.csv from finished runs")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs' studies lie")
    given = parser.parse_args()
    for folder in [HERE / name for name in given.pages] or pages():
        if given.collect:
            collect(folder, given.outputs)
        (folder / "README.md").write_text(rewritten(folder))
        draw(folder)
        print(folder.relative_to(HERE))


if __name__ == "__main__":
    main()
