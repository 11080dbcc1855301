"""report.html: one self-contained file, with model output escaped.

It begins with the summary, a picture and a short table; everything else is folded.
"""

import base64
from html import escape
from pathlib import Path

from opd_lightning.reporting.answer import answer
from opd_lightning.reporting.compare import Compared, difference_text
from opd_lightning.reporting.headline import COSTS, chosen, lines, one_seed, seed_counts
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.sections import Section, sections

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { line-height: 1.2; font-size: 1.5rem; }
.answer { font-size: 1.15rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th { vertical-align: bottom; } td { white-space: pre-line; vertical-align: top; }
th:first-child, td:first-child { text-align: left; min-width: 5rem; overflow-wrap: break-word; }
td.text { text-align: left; white-space: pre-wrap; min-width: 9rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; break-inside: avoid; overflow-x: auto; } img { max-width: 100%; }
figcaption, .note { color: #444; font-size: 0.9rem; }
.opening img { width: 32rem; } .opening + .scroll { margin-bottom: 1.2rem; }
details { border-top: 1px solid #ddd; padding: 0.6rem 0; } details details { margin-left: 1rem; }
summary { cursor: pointer; font-weight: 600; } code, pre { overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
@media (max-width: 40rem) { body { margin: 0.5rem auto; } .answer { font-size: 1.05rem; }
  table { font-size: 0.75rem; } th, td { padding: 0.25rem 0.3rem; }
  details img { max-width: none; height: 17rem; }
  th:first-child, td:first-child { position: sticky; left: 0; background: #fff; min-width: 3rem; padding-left: 0; } }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } details { display: none; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: 0.15rem 0.3rem; } }
"""
HEAD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
    'initial-scale=1"><title>{title}</title><style>{style}</style></head><body>'
)

Figure = tuple[Path, str]
"""A file and its caption."""


def write_html(
    runs: list[Run],
    compared: Compared,
    left_out: list[str],
    picture: Figure | None,
    figures: list[Figure],
    path: Path,
) -> None:
    """Write the report: the summary, the picture and a table, then the folded sections."""
    study = escape(runs[0].config["study"]["name"])
    parts = [
        HEAD.format(title=study, style=STYLE),
        f"<h1>Study {study}</h1>",
        f'<p class="answer">{escape(" ".join(answer(runs, compared)))}</p>',
        f'<div class="opening">{html_figure(*picture)}</div>' if picture else "",
        *methods(runs, compared),
        folded("More figures", "".join(html_figure(*figure) for figure in figures)) if figures else "",
        *map(html_section, sections(runs, compared, left_out)),
        "</body></html>\n",
    ]
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def methods(runs: list[Run], compared: Compared) -> list[str]:
    """The short table of methods, with their differences from the baseline."""
    names, target = [*(h.name for h in chosen(runs)), *COSTS], any(run.censored for run in runs)
    header = ["method", *(["target met"] if target else []), *(h.label for h in chosen(runs)), *COSTS.values()]
    rows = []
    for line in lines(runs):
        verdicts = ["" if one_seed(runs) else difference_text(runs, compared, line.label, name) for name in names]
        cells = ["\n".join(filter(None, [*cell, verdict])) for cell, verdict in zip(line.cells, verdicts, strict=True)]
        rows.append([line.label, *([line.met] if target else []), *cells])
    note = f"Means of {seed_counts(runs)} seeds, [lowest, highest] where they differ."
    if compared.comparisons:
        note += f" Under these, the difference from {compared.baseline} as far as the seeds show one at 95 %."
    return [html_table(header, rows), "" if one_seed(runs) else f'<p class="note">{escape(note)}</p>']


def html_section(section: Section) -> str:
    """A folded section with its folded sub-sections."""
    texts = "".join(f"<p>{escape(text)}</p>" for text in section.texts)
    table = html_table(section.header, section.rows, section.text_from) if section.rows else ""
    inner = "".join(folded(title, f"<pre>{escape(text)}</pre>") for title, text in section.files.items())
    return folded(section.title, table + texts + inner)


def folded(title: str, body: str) -> str:
    """HTML folded under a title."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def html_table(header: list[str], rows: list[list[str]], text_from: int = 10**6) -> str:
    """A table; cells from column `text_from` on are left-aligned text."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=text' if i >= text_from else ''}>{escape(c)}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def html_figure(file: Path, caption: str) -> str:
    """An embedded image with its caption."""
    data = base64.b64encode(file.read_bytes()).decode()
    alt = escape(caption, quote=True)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{alt}"><figcaption>{escape(caption)}</figcaption></figure>'
