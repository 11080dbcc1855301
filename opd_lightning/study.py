"""python -m opd_lightning.study FOLDER: a table, results.csv, figures and one self-contained report.html."""

import argparse
import sys
from pathlib import Path

from opd_lightning.report.figures import draw
from opd_lightning.report.html import write_html
from opd_lightning.report.runs import load_study
from opd_lightning.report.table import print_table, write_csv


def report(folder: Path) -> Path:
    """Report on the runs below `folder`, in it.

    Raises:
        ValueError: there is nothing to compare.
    """
    runs, left_out = load_study(folder)
    print_table(runs)
    for sentence in left_out:
        print(f"left out: {sentence}")
    write_csv(runs, folder / "results.csv")
    write_html(runs, left_out, draw(runs, folder), folder / "report.html")
    return folder / "report.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of a study, such as outputs/demo")
    try:
        print(f"report: {report(parser.parse_args().folder)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
