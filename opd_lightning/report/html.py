"""report.html: one file that opens from disk, with everything embedded and every piece of model output escaped."""

import base64
import json
from html import escape
from pathlib import Path

import yaml

from opd_lightning.report.compare import Comparison
from opd_lightning.report.runs import Run
from opd_lightning.report.table import by_cell, labels, summarise

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } td { white-space: pre-line; }
 td.text { text-align: left; white-space: pre-wrap; }
figure { margin: 1.5rem 0; break-inside: avoid; } img { max-width: 100%; } figcaption { color: #444; font-size: 0.9rem; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
tr:nth-child(1) th { position: sticky; top: 0; background: #fff; } td:first-child { white-space: nowrap; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } details { display: none; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: 0.15rem 0.3rem; } h2 { break-after: avoid; } }
"""


def write_html(
    runs: list[Run], comparisons: list[Comparison], left_out: list[str], figures: list[tuple[Path, str]], path: Path
) -> None:
    """Write the report."""
    header, rows = summarise(runs)
    turned = [list(line) for line in zip(header, *rows, strict=True)]  # a column per method: numbers are many, methods few
    study = runs[0].config["study"]["name"]
    examples = runs[0].evaluation["examples"]
    measured = ", ".join(f"{name} on {info['n']} held-out prompts" for name, info in examples.items())
    machine = ", ".join(f"{k} {v}" for k, v in runs[0].status["machine"].items())
    parts = [
        f"<h1>Study {escape(study)}</h1>",
        f"<p>{len(runs)} runs from one start model (<code>{escape(runs[0].status['start_model'][0])}</code>); "
        f"measured: {escape(measured)}.</p>",
        f"<p>{escape(protocol(runs))}</p>",
        "<h2>What can be said</h2>",
        *verdicts(comparisons),
        *(f"<p>Note: {escape(sentence)}.</p>" for sentence in left_out),
        "<h2>Results after the last update</h2>",
        html_table(turned[0], [[cell.replace(" [", "\n[") for cell in line] for line in turned[1:]]),
        "<p>new/… is the skill that was taught, prior/… those that were there before: accuracy counts contents in any style, "
        "format the asked style. start/… is KL to the start model (nats per token, forward: start to model), robust/… accuracy "
        "on the new skill under one perturbation, teacher/shown/… that of the teacher with what it is shown.</p>"
        "<p>Means over seeds, with [lowest, highest]. Student tokens are those that the student sampled; teacher tokens are "
        "all that a teacher read, prompts included. FLOPs are those of rollouts, teacher, forward and backward passes; what "
        "making the teacher had cost stands beside them (empty where nobody knows it or no teacher was asked). Seconds are "
        "this machine's and leave evaluation out; compare them within this report only. A censored run is one that did not "
        "reach the target.</p>",
        "<h2>Figures</h2>",
        *(html_figure(file, caption) for file, caption in figures),
        "<h2>The same held-out prompts, before and after</h2>",
        html_table(["prompt", "start", *answered(runs)], answers(runs), text_from=1),
        "<h2>What was written during training</h2>",
        html_table(["method", "step", "prompt", "completion"], samples(runs), text_from=2),
        "<h2>How each run was configured</h2>",
        *(html_config(cell[0]) for cell in by_cell(runs).values()),
        f"<p>{escape(machine)}</p>",
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(study)}</title><style>{STYLE}</style><body>'
    path.write_text(page + "\n".join(parts) + "</body></html>\n", encoding="utf-8")


def protocol(runs: list[Run]) -> str:
    """What ended the runs, at which learning rates."""
    budget = runs[0].config["budget"]
    limits = {f"{name} at {budget[name]:,}" for name in ("student_tokens", "flops", "seconds") if budget[name] is not None}
    if budget["accuracy"] is not None:
        limits.add(f"{budget['metric']} at {budget['accuracy']} in {budget['in_a_row']} evaluations one after the other")
    most = max(run.config["trainer"]["max_steps"] for run in runs)
    ends = [*sorted(limits), *([f"{most} updates at most"] if most > 0 else [])]
    rates = {label: cell[0].config["optim"]["lr"] for label, cell in labels(runs).items()}
    told = ", ".join(f"{label} {rate:g}" for label, rate in rates.items())
    return f"What ended a run: {'; '.join(ends)}. Learning rates: {told}."


def verdicts(comparisons: list[Comparison]) -> list[str]:
    """Sentences where the interval supports them, and the rest in one table."""
    if not comparisons:
        return ["<p>Nothing was compared: that takes two methods that reached the target, with a seed in common.</p>"]
    sure = [f"<li>{escape(c.sentence)}</li>" for c in comparisons if c.verdict != "undecided"]
    rows = []
    for c in comparisons:
        d = c.difference
        numbers = [f"{d.mean:+.4g}", f"[{d.low:+.4g}, {d.high:+.4g}]", str(d.seeds), d.over, f"{c.adjusted:.2g}"]
        rows.append([c.metric, c.method, c.baseline, *numbers, c.verdict])
    return [
        f"<ul>{''.join(sure)}</ul>" if sure else "<p>No difference is supported by its interval: all are undecided.</p>",
        html_table(["number", "method", "against", "difference", "95 %", "seeds", "over", "p (Holm)", "verdict"], rows),
        "<p>Differences are paired by seed; intervals are Student's t over seeds, each at 95 %. A verdict needs more: p below "
        "0.05 after Holm's adjustment among the methods compared on one number. Perturbations that force one style of opening "
        "favour whoever writes that style, and the mean depends on how many of them there are. A single seed is always "
        "undecided; its interval, where there is one, is a bootstrap over the prompts of this run only.</p>",
    ]


def html_table(header: list[str], rows: list[list[str]], text_from: int = 10**6) -> str:
    """A table; cells from column `text_from` on are left-aligned text."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=text' if i >= text_from else ''}>{escape(c)}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def html_figure(file: Path, caption: str) -> str:
    """An image, embedded."""
    data = base64.b64encode(file.read_bytes()).decode()
    alt = escape(caption, quote=True)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{alt}"><figcaption>{escape(caption)}</figcaption></figure>'


def html_config(run: Run) -> str:
    """The resolved configuration, folded."""
    text = escape(yaml.safe_dump(run.config, sort_keys=False))
    return f"<details><summary><code>{escape(run.cell)}</code></summary><pre>{text}</pre></details>"


def answered(runs: list[Run]) -> dict[str, Path]:
    """The answers of the first seed of each cell that kept some."""
    files = {label: cell[0].folder / "answers.json" for label, cell in labels(runs).items()}
    return {label: file for label, file in files.items() if file.is_file()}


def answers(runs: list[Run]) -> list[list[str]]:
    """Each held-out prompt with the start model's answer and that of the first seed of each cell."""
    read = [json.loads(file.read_text()) for file in answered(runs).values()]
    if not read:
        return []
    columns = [read[0]["prompts"], read[0]["start"], *(r["end"] for r in read)]
    return [list(row) for row in zip(*columns, strict=True)]


def samples(runs: list[Run]) -> list[list[str]]:
    """The first and the last sample of the first seed of each cell."""
    rows = []
    for cell in by_cell(runs).values():
        file = cell[0].folder / "samples.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        for line in [*lines[:1], *lines[-1:]]:
            rows.append([cell[0].name, str(line["step"]), line["prompt"], line["completion"]])
    return rows
