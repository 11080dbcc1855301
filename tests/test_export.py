"""What a run leaves can be evaluated, exported and started from, and says the same everywhere."""

import json
import shutil

import pytest
import torch

from opd_lightning.evaluate import configuration, evaluate
from opd_lightning.export import export
from opd_lightning.models import Pretrained
from opd_lightning.training.run import run


def values(cfg) -> dict[str, float]:
    return {name: estimate.value for name, estimate in evaluate(cfg).items()}


def end(folder) -> dict[str, float]:
    """The run's own last evaluation."""
    numbers = json.loads((folder / "evaluation.json").read_text())["end"]
    return {name: value for name, value in numbers.items() if name != "step"}


def test_a_run_and_its_exported_folder_score_what_the_run_scored(small, tmp_path):
    folder = run(small("method=sft"))
    out = export(folder, tmp_path / "exported")
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= {p.name for p in out.iterdir()}
    assert values(configuration([f"run={folder}"])) == end(folder)
    plain = [f"model.path={out}", "method=sft", "task.n_train=16", "task.n_eval=8"]
    assert values(configuration(plain)) == end(folder)
    with pytest.raises(ValueError, match="is not empty"):
        export(folder, out)


def test_a_self_teacher_is_evaluated_as_what_the_run_started_from(small):
    folder = run(small("method=sdft", "evaluation=text", "optim.lr=1e-2"))
    assert end(folder)["heldout/reverse_kl"] > 1e-3
    assert values(configuration([f"run={folder}"])) == pytest.approx(end(folder), rel=1e-5)


def test_an_exported_folder_does_not_hide_what_the_run_learns_later(small):
    folder = run(small("method=sft", "trainer.max_steps=1"))
    assert export(folder, folder / "model") == folder / "model"
    assert run(small("method=sft", "trainer.max_steps=3")) == folder
    latest = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    loaded = Pretrained(str(folder)).model().state_dict()
    assert all(torch.equal(loaded[name.removeprefix("student.lm.")], value) for name, value in latest.items())


def test_lineage_names_every_ancestor(small, tiny):
    first = run(small("method=sft"))
    second = run(small("method=opd", f"model.path={first}"))
    assert Pretrained(str(second)).lineage() == [str(second), str(first), tiny]


def test_a_changed_evaluation_is_refused_rather_than_mixed(small):
    run(small("method=sft", "trainer.max_steps=1"))
    with pytest.raises(ValueError, match=r"evaluation\.suite differs"):
        run(small("method=sft", "trainer.max_steps=2", "evaluation=none"))


def test_bad_requests_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="no run folder"):
        configuration(["run=nowhere"])
    folder = run(small("method=sft"))
    with pytest.raises(ValueError, match="not whole groups"):
        configuration([f"run={folder}", "evaluation=text"])


def test_a_chat_template_of_ones_own_goes_with_the_run(small, tiny, other, tmp_path):
    """Base models have none: neither the teacher, nor a run that starts from this one, nor an export asks for it again."""
    for name, source in (("base", tiny), ("teacher", other)):
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}=")
    models = (f"model.path={tmp_path / 'base'}", f"model.teacher={tmp_path / 'teacher'}")
    folder = run(small("method=opd", *models, f"model.chat_template={tmp_path / 'mine.jinja'}"))
    with pytest.raises(ValueError, match=r"has no chat template; use an instruction-tuned model, or model\.chat_template="):
        Pretrained(str(tmp_path / "base")).tokenizer()
    assert Pretrained(str(folder)).tokenizer().chat_template == (tmp_path / "mine.jinja").read_text()
    assert (export(folder, tmp_path / "exported") / "chat_template.jinja").read_text() == (tmp_path / "mine.jinja").read_text()
