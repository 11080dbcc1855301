"""README and docs: their commands run, their links lead somewhere, and they stay short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.analyze import pages
from opd_lightning.config import compose

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKDOWN = [
    *PAGES,
    ROOT / "experiments" / "README.md",
    *(folder / "README.md" for folder in pages()),
    ROOT / "conf" / "method" / "README.md",
]
RUNNABLE = re.compile(r"<!-- runnable -->\n```bash\n(.*?)```", re.DOTALL)
BLOCKS = [(page, block) for page in PAGES for block in RUNNABLE.findall(page.read_text())]
TRAIN = re.compile(r"^(python -m opd_lightning (?!--cfg).*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short(page):
    assert len(page.read_text().split()) <= (1300 if page.name == "README.md" else 700)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_front_page_names_every_page_of_the_docs():
    text = (ROOT / "README.md").read_text()
    assert all(f"(docs/{page.name})" in text for page in PAGES[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(BLOCKS)])
def test_a_runnable_block_runs(page, block, tmp_path):
    """As it stands, but for the number of updates, in an empty folder."""
    short = TRAIN.sub(lambda line: line[1] if "max_steps" in line[1] else f"{line[1]} trainer.max_steps=2", block)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", short],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def commands(page: Path) -> list[list[str]]:
    """The overrides of each training or check command of a page that has no placeholder."""
    text = "\n".join(re.findall(r"```(?:bash|text)\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r"\s*python -m opd_lightning(\.check)? ", line)]
    found = [shlex.split(line, comments=True)[3:] for line in lines if "<" not in line and "..." not in line]
    return [
        [word for word in words if "=" in word and not word.startswith("-")] for words in found if "--config-dir" not in words
    ]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_a_configuration(page):
    """Each is composed with the first value of what it sweeps."""
    for words in commands(page):
        first = [re.sub(r"^([\w./@+]+=)([^,{\[]+),.*", r"\1\2", word) for word in words]
        if any(word.startswith("study=smollm2") for word in first):
            continue  # its experiment is chosen by the sweep; test_experiments composes it
        assert compose(first).model.path
