"""The weights check: weight files against configurations, from the files' headers; nothing is loaded."""

from collections.abc import Iterator

from opd_lightning.preflight.checks import CheckResult
from opd_lightning.preflight.components import Components
from opd_lightning.teachers.base import all_parts


def weights(parts: Components) -> Iterator[CheckResult]:
    """Check results on the weight files of student and local teachers: complete, undamaged, and in the model's shapes."""
    teachers = {name: part.source for name, part in all_parts(parts.teachers) if part.source and not part.shares_weights}
    sources = {"student": parts.model} | teachers
    for name, source in sources.items():
        try:
            warnings = source.preview()
        except ValueError as error:
            yield CheckResult(f"{name}'s weights", "fail", str(error))
            continue
        yield from (CheckResult(f"{name}'s weights", "warn", sentence) for sentence in warnings)
        if not warnings:
            yield CheckResult(f"{name}'s weights", "pass", f"{source.path}: files and names fit config.json")
