"""report.html: one file that opens from disk, with everything embedded and every piece of model output escaped."""

import base64
import json
from html import escape
from pathlib import Path

import yaml

from opd_lightning.report.runs import Run
from opd_lightning.report.table import by_cell, summarise

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: pre-wrap; }
figure { margin: 1.5rem 0; break-inside: avoid; } img { max-width: 100%; } figcaption { color: #444; font-size: 0.9rem; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
@media print { body { margin: 0; max-width: none; } details { display: none; } }
"""


def write_html(runs: list[Run], left_out: list[str], figures: list[tuple[Path, str]], path: Path) -> None:
    """Write the report."""
    header, rows = summarise(runs)
    study = runs[0].config["study"]["name"]
    examples = runs[0].evaluation["examples"]
    measured = ", ".join(f"{name} on {info['n']} held-out prompts" for name, info in examples.items())
    machine = ", ".join(f"{k} {v}" for k, v in runs[0].status["machine"].items())
    parts = [
        f"<h1>Study {escape(study)}</h1>",
        f"<p>{len(runs)} runs from one start model (<code>{escape(runs[0].status['start_model'][0])}</code>); "
        f"measured: {escape(measured)}.</p>",
        "<h2>Results after the last update</h2>",
        html_table(header, rows),
        "<p>Means over seeds, with [lowest, highest]. Student tokens are those that the student sampled; teacher tokens are "
        "all that a teacher read, prompts included. Seconds are this machine's and leave evaluation out; compare them within "
        "this report only. No method is called better here: that takes several seeds and an interval.</p>",
        *(f"<p>Left out: {escape(sentence)}.</p>" for sentence in left_out),
        "<h2>Figures</h2>",
        *(html_figure(file, caption) for file, caption in figures),
        "<h2>The same held-out prompts, before and after</h2>",
        html_table(["prompt", "start", *(cell[0].name for cell in by_cell(runs).values())], answers(runs), text_from=1),
        "<h2>What was written during training</h2>",
        html_table(["method", "step", "prompt", "completion"], samples(runs), text_from=2),
        "<h2>How each run was configured</h2>",
        *(html_config(cell[0]) for cell in by_cell(runs).values()),
        f"<p>{escape(machine)}</p>",
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(study)}</title><style>{STYLE}</style><body>'
    path.write_text(page + "\n".join(parts) + "</body></html>\n", encoding="utf-8")


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


def answers(runs: list[Run]) -> list[list[str]]:
    """Each held-out prompt with the start model's answer and that of the first seed of each cell."""
    files = [cell[0].folder / "answers.json" for cell in by_cell(runs).values()]
    read = [json.loads(file.read_text()) for file in files if file.is_file()]
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
