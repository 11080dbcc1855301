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

IN_URL = re.compile(r"(?<=://)[^/@\s?#]+(?=@)|(?<=[?&])([^=&\s]*)=[^&#\s]+")
"""In a text: the user and password of a URL, and the arguments of its query, of which those with a secret's name count."""


def is_secret(name: str) -> bool:
    """Whether a name is that of a secret; of a dotted name the last part counts."""
    return SECRET.search(name.rsplit(".", maxsplit=1)[-1]) is not None


def redact_secrets(value: Any, name: str = "") -> Any:
    """A copy without secrets: masked are texts under such a name, values of environment variables with such a name, and what a
    URL holds of them.
    """
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
    return IN_URL.sub(masked, value)


def masked(found: re.Match[str]) -> str:
    """A user and password masked, and an argument of a query if it has a secret's name."""
    name = found[1]
    if name is None:
        return MASK
    return f"{name}={MASK}" if is_secret(name) or name.lower() == "key" else found[0]
