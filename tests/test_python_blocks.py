"""Python in README, docs and the notebook: every block that is marked runnable runs, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = {f"{page.stem}-{i}": block for page in PAGES for i, block in enumerate(RUNNABLE.findall(page.read_text()))}
ANY = re.compile(r"(<!-- runnable -->\n)?```python\n(.*?)```", re.DOTALL)
FRAGMENTS = {page.stem: code for page in PAGES for marked, code in ANY.findall(page.read_text()) if not marked}
"""Examples that need what stands around them in their page, by page."""
SURROUNDINGS = {
    "conversations": "",
    "loggers_and_exports": """
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from opd_lightning.models import locate
start = str(locate("pkg://opd_lightning/toy/assets/world/start"))
get_peft_model(AutoModelForCausalLM.from_pretrained(start), LoraConfig(target_modules="all-linear")).save_pretrained("adapter")
""",
    "run_folder": """
import torch
torch.save({"texts": ["one"]}, "nonfinite-step-12-rank-0.pt")
""",
}
NOTEBOOKS = sorted((ROOT / "experiments").glob("*.ipynb"))


def execute(program: str, folder: Path) -> str:
    """The output of a program in a process of its own."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cells(notebook: Path) -> list[str]:
    """The code cells; what is the last line of a cell is printed as notebooks would show it."""
    code = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in code]


def shown(cell: str) -> str:
    """A cell that prints its last expression as a notebook shows it."""
    lines = cell.rstrip().splitlines()
    if re.match(r"[a-z][\w.]*( =|\s*\.trainer)|\s|def |from |import ", lines[-1]):
        return cell
    return "\n".join([*lines[:-1], f"display({lines[-1]})"])


def test_front_page_and_page_have_runnable_python():
    assert {"README-0", "python-0", "python-1", "python-2"} <= set(BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name, tmp_path):
    execute(BLOCKS[name], tmp_path)


def test_every_example_without_a_mark_is_run_in_its_surroundings():
    assert set(FRAGMENTS) == set(SURROUNDINGS)


@pytest.mark.slow
@pytest.mark.parametrize("page", SURROUNDINGS)
def test_a_fragment_runs(page, tmp_path):
    code = FRAGMENTS[page].replace('"Qwen/Qwen3-1.7B"', "start").replace("outputs/.../adapter", "adapter")
    execute(SURROUNDINGS[page] + code, tmp_path)


def test_notebooks_are_without_outputs():
    for notebook in NOTEBOOKS:
        assert all(not cell.get("outputs") for cell in json.loads(notebook.read_text())["cells"]), notebook
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    """Its cells in order, each last expression displayed by its own `_repr_..._`."""
    display = """
def display(value):
    for name in ("_repr_html_", "_repr_png_"):
        if hasattr(value, name):
            shown = getattr(value, name)()
            if shown is not None:
                return print(name, len(shown))
    print(repr(value))
"""
    printed = execute("\n".join([display, *map(shown, cells(notebook))]), tmp_path)
    assert "_repr_html_" in printed and "_repr_png_" in printed and "'answer 1 4 1 5 3'" in printed, printed


def test_habit_files_are_yaml():
    files = [ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml", *(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.y*ml")]
    assert all(yaml.safe_load(path.read_text()) for path in files) and len(files) > 3


def test_versions_agree():
    import opd_lightning

    version = opd_lightning.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
