"""A W&B workspace with the comparisons of report.html. Runs are grouped by method
(their job type) within the study (their group). Offline runs are synced first:

  wandb sync outputs/demo/*/seed-*/wandb/offline-run-*
  python -m opd_lightning.dashboard my-team/opd-lightning demo
"""

import argparse
import sys
from importlib.util import find_spec
from typing import Any

PANELS: dict[str, list[tuple[str, str, list[str]]]] = {
    "What was learned and what was kept": [
        ("forgetting against the new skill", "eval/new/accuracy", ["eval/prior/accuracy"]),
        ("forgetting against KL to the start model", "eval/start/new/forward_kl", ["eval/prior/accuracy"]),
        ("new skill", "trainer/global_step", ["eval/new/accuracy"]),
        ("prior skills, and their format", "trainer/global_step", ["eval/prior/accuracy", "eval/prior/format"]),
    ],
    "At what cost": [
        ("new skill by student tokens", "cost/student_tokens", ["eval/new/accuracy"]),
        ("new skill by FLOPs", "cost/flops", ["eval/new/accuracy"]),
        ("new skill by seconds", "cost/seconds", ["eval/new/accuracy"]),
    ],
    "How firmly": [
        ("perturbations", "", ["eval/robust/mean", "eval/robust/worst", "eval/robust/none"]),
    ],
    "Training": [
        ("loss", "trainer/global_step", ["train/loss"]),
        ("KL to the teacher, both ways", "trainer/global_step", ["train/forward_kl", "train/reverse_kl"]),
        ("gradient norm", "trainer/global_step", ["train/grad_norm"]),
        ("reward", "trainer/global_step", ["rollout/reward"]),
        ("length, truncated, repeated", "trainer/global_step", ["rollout/length", "rollout/truncated", "rollout/repetition"]),
    ],
}
"""Sections of (title, x axis, metrics); without an x axis bars of the last value. Tests compare them with what runs log."""


def workspace(entity: str, project: str, study: str) -> Any:
    """The workspace; `save()` uploads it.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    if find_spec("wandb_workspaces") is None:
        raise ValueError("the dashboard needs wandb-workspaces; pip install 'opd-lightning[dashboard]'.")
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def panel(title: str, x: str, metrics: list[Any]) -> Any:
        if not x:
            return wr.BarPlot(title=title, metrics=metrics, groupby_aggfunc="mean", groupby_rangefunc="minmax")
        return wr.LinePlot(title=title, x=x, y=metrics, groupby_aggfunc="mean", groupby_rangefunc="minmax")

    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"study {study}",
        sections=[
            ws.Section(name=name, panels=[panel(*given) for given in panels], is_open=True) for name, panels in PANELS.items()
        ],
        runset_settings=ws.RunsetSettings(filters=[ws.Metric("Group") == study], groupby=[ws.Metric("JobType")]),
        auto_generate_panels=False,
    )


def main() -> None:
    """The command of the dashboard."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m opd_lightning.dashboard", description=__doc__, formatter_class=layout)
    parser.add_argument("project", help="ENTITY/PROJECT, such as my-team/opd-lightning")
    parser.add_argument("study", help="the study's name, such as demo")
    given = parser.parse_args()
    entity, _, project = given.project.partition("/")
    if not entity or not project:
        sys.exit(f"error: {given.project} should be ENTITY/PROJECT.")
    try:
        made = workspace(entity, project, given.study)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        made.save()
    except Exception as error:  # wandb has many kinds
        sys.exit(f"error: W&B did not take the workspace ({' '.join(str(error).split())}); try: wandb login")
    print(made.url)


if __name__ == "__main__":
    main()
