"""Sections of a report: all differences and numbers, what was left out, how runs were made, and samples."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from opd_lightning.config.labels import short_value
from opd_lightning.reporting.answer import joined
from opd_lightning.reporting.compare import Compared
from opd_lightning.reporting.runs import Run
from opd_lightning.reporting.table import labels, summarise


@dataclass(frozen=True)
class Section:
    """A folded part of the report, as text that is not yet escaped.

    Attributes:
        title: what opens it.
        header, rows: a table; none without rows.
        text_from: the first column of text, which is left-aligned.
        texts: paragraphs after the table.
        files: long texts by title, each folded again.
    """

    title: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text_from: int = 10**6
    texts: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether the section has no content."""
        return not (self.rows or self.texts or self.files)


def sections(runs: list[Run], compared: Compared, left_out: list[str]) -> list[Section]:
    """All sections that are not empty."""
    prompts = answered(runs)
    written = ["method", "step", "prompt", "completion", "reward"]
    configs = {label: yaml.safe_dump(cell[0].config, sort_keys=False) for label, cell in labels(runs).items()}
    notes = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in [*left_out, *compared.sentences]]
    all_sections = [
        all_differences(compared),
        all_numbers(runs),
        Section("How the runs were made", texts=protocol(runs)),
        Section(f"What was left out or not compared ({len(notes)})", texts=notes),
        Section("The same held-out prompts, before and after", ["prompt", "start model", *prompts], answers(prompts), 0),
        Section("What was written during training", written, samples(runs), 2),
        Section("The configuration of each method", files=configs),
    ]
    return [section for section in all_sections if not section.empty]


def all_differences(compared: Compared) -> Section:
    """The section of all comparisons, with the method of comparison."""
    header = ["number", "method", "difference", "95 % interval", "seeds", "interval over", "p (Holm)", "verdict"]
    rows = []
    for c in compared.comparisons:
        d, digits = c.difference, "+.2e" if c.metric == "flops" else "+.3f"
        interval = f"[{d.low:{digits}}, {d.high:{digits}}]" if d.bounded and not d.alike else ""
        basis = [str(d.seeds), d.over if d.bounded else "", f"{c.adjusted:.2g}" if d.seeds > 1 else ""]
        verdict = f"{c.verdict}: the same with every seed" if d.alike else c.verdict
        rows.append([c.metric, c.method, f"{d.mean:{digits}}", interval, *basis, verdict])
    texts = [
        "Differences are paired by seed; intervals are Student's t over seeds, each at 95 %. A verdict needs more: p below "
        "0.05 after Holm's adjustment among the methods compared on one number. Where every seed shows the same difference, "
        "there is no spread to judge it by, and so no verdict.",
        "Perturbations that force one style of opening favour methods with that style, and the mean depends on how many of "
        "them there are.",
        "A single seed gets no verdict; its interval, where there is one, is a bootstrap over the prompts of this run only and "
        "does not cover other seeds.",
    ]
    return Section(f"All differences from {compared.baseline}", header, rows, 7, texts=texts if rows else [])


def all_numbers(runs: list[Run]) -> Section:
    """The section of all numbers after the last update, one column per method."""
    header, rows = summarise(runs)
    turned = [list(line) for line in zip(header, *rows, strict=True)]
    texts = [
        "new/… is the skill that was taught, prior/… those that were there before: accuracy counts contents in any style, "
        "format the set style. start/… is KL to the start model (nats per token, forward: start to model), robust/… accuracy "
        "on the new skill under one perturbation, teacher/shown/… that of the teacher with what it is shown.",
        "Means over seeds, with [lowest, highest]. Student tokens are those that the student sampled; teacher tokens are "
        "all that a teacher read, prompts included. FLOPs are those of rollouts, teacher, forward and backward passes; what "
        "training the teacher had cost stands beside them (empty if unknown or without a teacher). Seconds are "
        "this machine's and leave evaluation out; compare them within this report only. A censored run is one that did not "
        "reach the target.",
    ]
    body = [[cell.replace(" [", "\n[") for cell in line] for line in turned[1:]]
    return Section("All numbers after the last update", turned[0], body, texts=texts)


def protocol(runs: list[Run]) -> list[str]:
    """Start model, evaluations, budget, learning rates and machine, as sentences."""
    budget = runs[0].config["budget"]
    limits = {f"{name} at {budget[name]:,}" for name in ("student_tokens", "flops", "seconds") if budget[name] is not None}
    if budget["accuracy"] is not None:
        limits.add(f"{budget['metric']} at {budget['accuracy']} in {budget['in_a_row']} evaluations one after the other")
    most = max(run.config["trainer"]["max_steps"] for run in runs)
    ends = [*sorted(limits), *([f"{most} updates at most"] if most > 0 else [])]
    measured = ", ".join(f"{name} on {info['n']} held-out prompts" for name, info in runs[0].evaluation["examples"].items())
    used = {name: sorted({run.config["optim"]["lr"] for run in runs if run.name == name}) for name in {r.name: 0 for r in runs}}
    rates = ", ".join(f"{name} {joined([short_value(float(rate)) for rate in rates])}" for name, rates in used.items())
    return [
        f"{len(runs)} runs from one start model, {runs[0].status['start_model'][0]}. Measured: {measured or 'nothing'}.",
        f"What ended a run: {'; '.join(ends)}. Learning rates: {rates}.",
        "Machine: " + ", ".join(f"{name} {value}" for name, value in runs[0].status["machine"].items()) + ".",
    ]


def answered(runs: list[Run]) -> dict[str, Path]:
    """The answers.json of the first seed of each method, where there is one."""
    files = {label: cell[0].folder / "answers.json" for label, cell in labels(runs).items()}
    return {label: file for label, file in files.items() if file.is_file()}


def answers(files: dict[str, Path]) -> list[list[str]]:
    """Each held-out prompt with the start model's answer and that of each method."""
    read = [json.loads(file.read_text()) for file in files.values()]
    columns = [read[0]["prompts"], read[0]["start"], *(r["end"] for r in read)] if read else []
    return [list(row) for row in zip(*columns, strict=True)]


def samples(runs: list[Run]) -> list[list[str]]:
    """The first and the last sample of the first seed of each method."""
    rows = []
    for label, cell in labels(runs).items():
        file = cell[0].folder / "samples.jsonl"
        kept = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        for line in [*kept[:1], *kept[-1:]]:
            reward = line.get("reward")
            judged = "" if reward is None else " ".join(filter(None, [f"{reward:.3g}", line.get("verdict") or ""]))
            rows.append([label, str(line["step"]), line["prompt"], line["completion"], judged])
    return rows
