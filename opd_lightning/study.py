"""A study's report: prints a short table, and writes results.csv, comparisons.csv,
figures and report.html into the study's folder.

  python -m opd_lightning.study outputs/demo
"""

import argparse
import sys
from pathlib import Path


def report(folder: Path, against: str | None = None) -> Path:
    """Report on the runs below `folder`: print the short table, and write the files.

    Raises:
        ValueError: there is nothing to compare.
    """
    from opd_lightning.reporting.compare import compare, write_comparisons  # these take seconds
    from opd_lightning.reporting.figures import draw
    from opd_lightning.reporting.html import write_html
    from opd_lightning.reporting.picture import picture
    from opd_lightning.reporting.runs import load_study
    from opd_lightning.reporting.table import write_csv
    from opd_lightning.reporting.terminal import columns, terminal

    runs, left_out = load_study(folder)
    compared = compare(runs, against)
    for line in terminal(runs, compared, left_out, columns()):
        print(line)
    write_csv(runs, folder / "results.csv")
    write_comparisons(compared.comparisons, folder / "comparisons.csv")
    caption = picture(runs, folder / "picture.png")
    opening = (folder / "picture.png", caption) if caption else None
    write_html(runs, compared, left_out, opening, draw(runs, folder), folder / "report.html")
    return folder / "report.html"


def rates(folder: Path) -> str:
    """The chosen learning rates, as lines for conf/study.

    Raises:
        ValueError: there is no finished run, or none measured the validation split.
    """
    from opd_lightning.reporting.compare import choose_rates  # takes seconds
    from opd_lightning.reporting.runs import load_study

    runs, left_out = load_study(folder)
    for sentence in left_out:
        print(f"note: {sentence}", file=sys.stderr)
    if any("validation/prior/accuracy" not in run.evaluation["end"] for run in runs):
        raise ValueError(f"{folder} has no validation/prior/accuracy to choose by; make its runs with evaluation=validation.")
    return "\n".join(["lr:", *(f"  {name}: {rate:g}  # {why}" for name, (rate, why) in choose_rates(runs).items())])


def main() -> None:
    """The command of the report on a study."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m opd_lightning.study", description=__doc__, formatter_class=layout)
    parser.add_argument("folder", type=Path, help="the folder of a study, such as outputs/demo")
    parser.add_argument("--against", metavar="METHOD", help="compare with this method instead of the study's baseline")
    parser.add_argument("--rates", action="store_true", help="print each method's best learning rate by validation accuracy")
    given = parser.parse_args()
    try:
        if not given.folder.is_dir():
            raise ValueError(f"there is no folder {given.folder}; give that of a study, such as outputs/demo.")
        print(rates(given.folder) if given.rates else f"report: {report(given.folder, given.against)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
