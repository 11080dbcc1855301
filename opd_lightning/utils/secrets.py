"""Secrets: keeps keys, passwords and access tokens out of files, logs and dashboards."""

import os
import re
from typing import Any

SECRET = re.compile(
    r"(?i)(api_?key|private_?key|secret|passw|credential|authorization)|_pat$"
    r"|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)(?<!end_)token$"
)
"""Names of secrets, in configurations and among environment variables; `max_tokens_per_microbatch` and `eos_token` are none."""

MASK = "(secret)"


def is_secret(name: str) -> bool:
    """Whether a name is that of a secret; of a dotted name the last part counts."""
    return SECRET.search(name.rsplit(".", maxsplit=1)[-1]) is not None


def redact_secrets(value: Any, name: str = "") -> Any:
    """A copy without secrets: texts under such a name, and values of environment variables with such a name, are masked."""
    if isinstance(value, dict):
        return {key: redact_secrets(part, str(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [redact_secrets(part, name) for part in value]
    if not isinstance(value, str) or not value:
        return value
    if is_secret(name):
        return MASK
    for secret in (v for n, v in os.environ.items() if is_secret(n) and len(v) >= 8):
        value = value.replace(secret, MASK)
    return value
