"""Token budget: the padded tokens of a forward pass, chosen once for a run where the configuration leaves it open."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from opd_lightning.preflight.components import Components
from opd_lightning.preflight.resources import automatic_tokens, batch_shape
from opd_lightning.runs.status import is_worker, read_status, write_status

log = logging.getLogger(__name__)

KEY = "max_tokens_per_microbatch"


def with_token_budget(parts: Components, cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration with a number for max_tokens_per_microbatch=auto; status.json keeps it.

    A run that goes on takes the number that it began with, since another one would round its gradients otherwise; other
    processes of a run take that of the first, if it is there already.
    """
    if cfg[KEY] == "auto":
        earlier, resumed = read_status(folder), (folder / "checkpoints" / "last.ckpt").exists()
        known = resumed or (is_worker() and KEY in earlier)
        cfg = cfg.copy()
        cfg[KEY] = earlier.get(KEY) if known else chosen(parts, cfg)
    write_status(folder, "running", **{KEY: cfg[KEY]})
    return cfg


def chosen(parts: Components, cfg: DictConfig) -> int | None:
    """The automatic number; None, the whole batch, for a model whose sizes are unknown. Says so where it cuts a batch."""
    try:
        tokens, free = automatic_tokens(parts, cfg)
        rows, window = cfg.data.batch_size * parts.rollout.sampling.n, parts.model.window()
    except (ValueError, OSError):  # these name a field
        raise
    except Exception:  # the check of memory warns of it
        return None
    if rows * window > tokens and (most := rows * batch_shape(parts, cfg)[1]) > tokens:
        log.info(
            f"forward passes take at most {tokens:,} padded tokens, since {free} and an update may have {most:,}; "
            f"{KEY}=<n> sets another number, null none. Gradients do not depend on it."
        )
    return tokens
