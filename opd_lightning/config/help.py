"""Help: what `python -m opd_lightning --help` prints, at most 80 columns wide on a narrow terminal."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from opd_lightning.config.grammar import quote_arguments
from opd_lightning.config.overrides import config_folders

PAGE = """\
python -m opd_lightning [-m] [group=option ...] [key=value ...]

One run that trains a model, or with -m a sweep of runs.

  python -m opd_lightning method=sdft trainer.max_steps=50
  python -m opd_lightning -m method=sft,opd seed=0,1,2 study.name=mine
  python -m opd_lightning --cfg job method=sdft        every key of a run

Flags
  -m                 a sweep: one run for each combination of values a,b,c
  --config-dir DIR   options of your own, in folders such as DIR/method
  --cfg job          print the configuration, and train nothing
  --hydra-help       all flags of Hydra

Keys to know first
  model.path         folder, hub id or finished run of the student
  teacher.path       another model with the same tokenizer
  task.path          with task=table: your rows (.jsonl, .csv, .parquet)
  optim.lr           learning rate
  data.batch_size    prompts per rollout, over all devices
  trainer.max_steps  updates
  rollout.sampling.max_new_tokens, max_tokens_per_microbatch, seed,
  evaluation.every, output_dir, study.name
  A key that no file lists is added with a plus: +trainer.profiler=simple

  --help keys        every key, its default, type and meaning; also one group
                     or key: --help optim, --help optim.lr
Other commands, each with --help
  python -m opd_lightning.check      checks of a run, without training
  python -m opd_lightning.study      the table and report of a sweep
  python -m opd_lightning.evaluate   the evaluations of a model
  python -m opd_lightning.score      a teacher's scores, written to files once
  python -m opd_lightning.export     a run's model as a Hugging Face folder
  python -m opd_lightning.dashboard  a W&B workspace of a study

Groups and their options
"""


def page(arguments: Sequence[str]) -> str:
    """The help page, with the options of all groups, those of --config-dir too; or the keys of the topic behind --help.

    Raises:
        ValueError: there is no such topic.
    """
    words, topic = [a for a in arguments if a not in ("-h", "--help")], topic_of(arguments)
    if topic is not None:
        words.remove(topic)
    folders = config_folders(quote_arguments(words))
    if topic is not None:
        from opd_lightning.config.reference_text import terminal

        return terminal(topic, folders, min(100, shutil.get_terminal_size().columns))
    return PAGE + "\n".join(groups(folders, min(100, shutil.get_terminal_size().columns)))


def topic_of(arguments: Sequence[str]) -> str | None:
    """The word behind --help; None without."""
    behind = next((b for a, b in pairwise(arguments) if a in ("-h", "--help")), "")
    return behind if re.fullmatch(r"\w[\w./]*(=\w+)?", behind) else None


def groups(folders: Sequence[Path], width: int) -> list[str]:
    """A line for each group of these folders, wrapped at `width`."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.glob("*/**/*.yaml"):
            found.setdefault(path.parent.relative_to(folder).as_posix(), set()).add(path.stem)
    return [
        textwrap.fill(
            f"{group}={', '.join(sorted(options))}",
            width,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for group, options in sorted(found.items())
    ]
