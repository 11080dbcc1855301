"""The half of the runs that begins with fragile start models; run.py takes them up.

python -m experiments.less_forgetting.fragile
"""

from experiments.grid import Bench, start
from experiments.less_forgetting.run import grid


def main(bench: Bench) -> None:
    grid(bench, ("fragile-0k", "fragile-1k"))


if __name__ == "__main__":
    start(main, __file__)
