"""The hub of models: one quick question whether it answers, before transformers asks it many times."""

import logging
from functools import lru_cache

from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache
from huggingface_hub.utils import get_session

from opd_lightning.models.files import FolderError

log = logging.getLogger(__name__)

SECONDS = 5.0
"""How long the hub may take to answer."""


def check(path: str, name: str) -> None:
    """Check that the hub answers, for an id whose files are not in its cache; without, each file is asked for six times.

    Args:
        name: the field and its value, for the error.

    Raises:
        FolderError: it does not.
    """
    if is_offline_mode() or (reason := silence(constants.ENDPOINT)) is None:
        return
    if any(isinstance(try_to_load_from_cache(path, file), str) for file in ("config.json", "adapter_config.json")):
        log.warning(f"warning: {constants.ENDPOINT} does not answer; with HF_HUB_OFFLINE=1 the copy of {path} is read at once.")
        return
    raise FolderError(
        f"{name} is no folder here, and the hub does not answer ({constants.ENDPOINT}: {reason}); give a folder "
        f"({name.partition('=')[0]}=<folder>), or HF_HUB_OFFLINE=1 to read what the hub's cache has."
    )


@lru_cache
def silence(endpoint: str) -> str | None:
    """Why the hub does not answer; None where it does, whatever its answer is."""
    try:
        get_session().head(endpoint, timeout=SECONDS)
    except Exception as error:  # of requests or httpx, by the version of huggingface_hub
        return " ".join(str(error).split())[:150] or type(error).__name__
    return None
