"""The package's rooms: imports lead down only, and files keep to their size."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "opd_lightning"
FLOORS = [
    ["types", "utils", "plugins"],
    ["contracts", "config"],
    ["data", "losses", "environments", "runs"],
    ["models", "rollout"],
    ["generation"],
    ["teachers", "tasks"],
    ["step", "evaluation", "toy"],
    ["module", "callbacks", "preflight", "reporting"],
    ["training", "export", "dashboard"],
    ["__main__", "check", "evaluate", "score", "study", "smollm2"],
    ["commands"],
]
"""From the ground up; rooms of one floor do not import each other."""
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The rooms that a file imports when it is loaded or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opd_lightning."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("opd_lightning.")}
    return found


def room(path: Path) -> str:
    """The first folder below the package, or the file at its root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} - {"__init__"} == {name for floor in FLOORS for name in floor}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_lead_down(path):
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    here = room(path)
    if here == "__init__":
        return
    for other in imported(path) - {here}:
        assert floor[other] < floor[here], f"{here} imports {other}"


def test_files_are_short_and_few_stand_at_the_root():
    assert not [path for path in FILES if len(path.read_text().splitlines()) > 300]
    assert len(list(PACKAGE.glob("*.py"))) <= 10
    assert len((PACKAGE / "module.py").read_text().splitlines()) < 220
