"""Messages for errors from outside (full disks, dead processes), with a remedy."""

import errno
import re
import traceback
from pathlib import Path

RESUME = "Then the same command goes on from the last checkpoint, or begins anew where there is none"

SERVICES = {"wandb": "W&B", "mlflow": "MLflow"}


def explain(error: BaseException) -> str | None:
    """A message for an error that the configuration did not cause; None for all others."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        remedy = "Lower max_tokens_per_microbatch or data.batch_size, or use model.checkpointing=true"
        return f"memory ran out ({text}). {remedy}. {RESUME}."
    if re.search(r"PytorchStreamWriter|inline_container|iostream error|unexpected pos", text):
        closed = re.search(r"Permission denied|Read-only", text)
        remedy = "Look at output_dir, and at its permissions" if closed else "Make room, or choose another output_dir"
        return f"a checkpoint could not be written ({text}). {remedy}. {RESUME}."
    places = {type(error).__module__.split(".")[0], *packages_in_traceback(error)}
    if service := next((name for package, name in SERVICES.items() if package in places), None):
        return f"{service} does not answer any more ({text}). {RESUME}; logger=none does without {service}."
    if re.search(r"Connection (closed|reset) by|Broken pipe|gloo|NCCL|ProcessGroup|store", text) and "/" in text:
        return f"another process of this run is gone ({text}). {RESUME}."
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "Make room, or choose another output_dir" if full else "Look at output_dir, and at its permissions"
        return f"a file could not be written or read ({text}). {remedy}. {RESUME}."
    return None


def packages_in_traceback(error: BaseException) -> set[str]:
    """Names of folders and packages in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return {part for frame in frames for part in Path(frame.filename).parts[:-1]}
