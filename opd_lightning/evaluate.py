"""python -m opd_lightning.evaluate run=<run folder> | [group=option] [key=value] ...: the evaluation suite, without training.

python -m opd_lightning.evaluate run=outputs/demo/sft-1a2b3c4d/seed-0                 # a run, as it was configured
python -m opd_lightning.evaluate run=outputs/demo/sft-1a2b3c4d/seed-0 task.n_eval=1024   # on more prompts
python -m opd_lightning.evaluate model.path=<folder or hub id> task=world             # any model
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_lightning.config import build
from opd_lightning.config.aliases import read_run
from opd_lightning.config.compatibility import check
from opd_lightning.config.grammar import grammar_error, parse, quote_override
from opd_lightning.config.limits import limited
from opd_lightning.config.overrides import configured
from opd_lightning.evaluation import Estimate
from opd_lightning.models import Pretrained, Student, is_run
from opd_lightning.models.files import check_vocabulary
from opd_lightning.preflight.references import limit_for
from opd_lightning.preflight.rendering import check_rows
from opd_lightning.runs.status import started
from opd_lightning.teachers.alignment import aligned
from opd_lightning.teachers.contexts import NoContext


def evaluate(cfg: DictConfig) -> dict[str, Estimate]:
    """The numbers of the configured suite for the model at `model.path`.

    Raises:
        ValueError: something is wrong with the configuration or the model.
    """
    check(cfg)
    model: Pretrained = build(cfg.model)
    renderer, task = model.renderer(started(Path(model.path))), build(cfg.task)
    tokenizer = renderer.tokenizer
    if task.max_new_tokens is None:
        task.max_new_tokens = limit_for(task, renderer, model.window())
    cfg = limited(cfg, task.max_new_tokens)
    check_rows(task, renderer, {"student": NoContext(model.template_options)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = Student(model.model(), cfg.logits_chunk_size, renderer.valid_ids).to(device)
    check_vocabulary(tokenizer.get_vocab(), student.head.weight.shape[0], model.name)
    student.verify_head(f"model.path={model.path}")
    generator = build(cfg.generator, tokenizer=tokenizer, renderer=renderer)
    generator.update_weights(student, 0)
    teachers = {}
    if cfg.teacher is not None and cfg.loss.divergence is not None:
        teacher = build(cfg.teacher, context=build(cfg.context))
        if teacher.frozen:
            teacher = aligned(teacher, renderer)
            # A teacher with the student's start weights has those of the run's start, not of its result.
            teacher.setup(Student(model.start().model(), cfg.logits_chunk_size, renderer.valid_ids).to(device), renderer)
            teachers["teacher"] = teacher
    arguments = {"task": task, "tokenizer": tokenizer, "renderer": renderer, "model": model.start()}
    suite = [build(node, **arguments) for node in cfg.evaluation.suite.values() if node is not None]
    estimates = {name: value for evaluation in suite for name, value in evaluation(student, teachers, generator).items()}
    generator.close()
    return estimates


def configuration(arguments: list[str]) -> DictConfig:
    """The configuration of a run with its result as the model, or one composed from overrides."""
    runs = [a.removeprefix("run=") for a in arguments if a.startswith("run=")]
    if not runs:
        return configured(arguments)
    if not is_run(runs[0]):
        raise ValueError(f"run={runs[0]} is no run folder with config.yaml and checkpoints/last.ckpt.")
    cfg = OmegaConf.create(read_run(runs[0]))
    for word in (quote_override(a) for a in arguments if not a.startswith("run=")):
        if problem := grammar_error([word], sweep=False):
            raise ValueError(problem)
        override = parse(word)
        if word.startswith("-") or override.is_delete() or "." not in override.key_or_group:
            raise ValueError(f"{word}: with run= only single keys such as task.n_eval=512 can be changed, not whole groups.")
        OmegaConf.update(cfg, override.key_or_group, override.value())
    cfg.model.path, cfg.model.stand_in = runs[0], False
    return cfg


def main() -> None:
    """The command of the evaluation suite."""
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    try:
        estimates = evaluate(configuration(sys.argv[1:]))
        numbers = {name: {k: v for k, v in asdict(x).items() if v is not None} for name, x in estimates.items()}
        print(json.dumps(numbers, indent=1))
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
