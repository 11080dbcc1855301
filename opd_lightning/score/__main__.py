"""python -m opd_lightning.score out=FOLDER [k=20] [group=option] [key=value] ...

Writes a teacher's scores of every training prompt's completions to a folder,
once, for training without the teacher.

Of the references:
  python -m opd_lightning.score out=kept method=kd teacher.path=<folder>
  python -m opd_lightning method=kd teacher=cached teacher.path=kept \\
      loss/vocab_support=topk

Of the model's own completions:
  python -m opd_lightning.score out=kept method=opd \\
      model.path=<model> teacher.path=<teacher>
  python -m opd_lightning method=opd_topk rollout=recorded rollout.path=kept \\
      teacher=cached teacher.path=kept

  k=20             most probable tokens per position
  kind=hidden      the teacher's hidden states in bfloat16: all the vocabulary
  passes=1         completions of each prompt, times rollout.num_generations
  shard_size=256   prompts per file

The same command goes on after an interruption.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from opd_lightning.config.overrides import configured
from opd_lightning.config.values import check_made, check_values
from opd_lightning.utils.secrets import redact_secrets

OPTIONS = {"out": "", "kind": "topk", "k": "20", "passes": "1", "shard_size": "256"}
"""The command's own options, with their defaults."""


def main() -> None:
    """The command of scores."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    own = {name: value for a in arguments for name, _, value in [a.partition("=")] if name in OPTIONS}
    overrides = [a for a in arguments if a.partition("=")[0] not in OPTIONS]
    options: dict[str, Any] = OPTIONS | own
    try:
        if not options["out"]:
            raise ValueError("out= is missing: give the folder to write to (out=<folder>).")
        for name in ("k", "passes", "shard_size"):
            if not options[name].isdigit():
                raise ValueError(f"{name}={options[name]} is no number.")
            options[name] = int(options[name])
        out = Path(options.pop("out"))
        check_values(cfg := configured(overrides))
        check_made(cfg)
        print("loading torch, lightning and transformers ...", file=sys.stderr, flush=True)
        from opd_lightning.score.make import score  # takes seconds
        from opd_lightning.training.run import quiet

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        quiet()
        score(cfg, out, **options)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {redact_secrets(str(error))}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
