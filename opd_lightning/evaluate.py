"""python -m opd_lightning.evaluate run=<run folder> | [group=option] [key=value] ...: the evaluation suite, without training.

python -m opd_lightning.evaluate run=outputs/demo/sft-1a2b3c4d/seed-0                 # a run, as it was configured
python -m opd_lightning.evaluate run=outputs/demo/sft-1a2b3c4d/seed-0 task.n_eval=1024   # on more prompts
python -m opd_lightning.evaluate model.path=<folder or hub id> task=world             # any model
"""

import json
import sys
from dataclasses import asdict

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_lightning.config import build
from opd_lightning.config.aliases import read_run
from opd_lightning.config.compatibility import check
from opd_lightning.config.grammar import read, taken, unreadable
from opd_lightning.config.overrides import configured
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.evaluation import Estimate
from opd_lightning.models import Pretrained, Student, is_run


def evaluate(cfg: DictConfig) -> dict[str, Estimate]:
    """The numbers of the configured suite for the model at `model.path`.

    Raises:
        ValueError: something is wrong with the configuration or the model.
    """
    check(cfg)
    model: Pretrained = build(cfg.model)
    tokenizer, task = model.tokenizer(), build(cfg.task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = Student(model.model(), cfg.logits_chunk_size).to(device)
    student.verify_head(f"model.path={model.path}")
    renderer = ChatRenderer(tokenizer, model.template_options)
    generator = build(cfg.generator, tokenizer=tokenizer, renderer=renderer)
    generator.update_weights(student, 0)
    teachers = {}
    if cfg.teacher is not None and cfg.loss.divergence is not None:
        teacher = build(cfg.teacher, context=build(cfg.context))
        if teacher.frozen:
            teacher.check_tokenizer(tokenizer)
            # A teacher that is the student's start model is what the run started from, not what it became.
            teacher.setup(Student(model.start().model(), cfg.logits_chunk_size).to(device), renderer)
            teachers["teacher"] = teacher
    offers = {"task": task, "tokenizer": tokenizer, "renderer": renderer, "model": model.start()}
    suite = [build(node, **offers) for node in cfg.evaluation.suite.values() if node is not None]
    found = {name: value for evaluation in suite for name, value in evaluation(student, teachers, generator).items()}
    generator.close()
    return found


def configuration(arguments: list[str]) -> DictConfig:
    """The configuration of a run with its result as the model, or one composed from overrides."""
    runs = [a.removeprefix("run=") for a in arguments if a.startswith("run=")]
    if not runs:
        return configured(arguments)
    if not is_run(runs[0]):
        raise ValueError(f"run={runs[0]} is no run folder with config.yaml and checkpoints/last.ckpt.")
    cfg = OmegaConf.create(read_run(runs[0]))
    for word in (taken(a) for a in arguments if not a.startswith("run=")):
        if problem := unreadable([word], sweep=False):
            raise ValueError(problem)
        override = read(word)
        if word.startswith("-") or override.is_delete() or "." not in override.key_or_group:
            raise ValueError(f"{word}: with run= only single keys such as task.n_eval=512 can be changed, not whole groups.")
        OmegaConf.update(cfg, override.key_or_group, override.value())
    cfg.model.path, cfg.model.stand_in = runs[0], False
    return cfg


def main() -> None:
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    try:
        found = evaluate(configuration(sys.argv[1:]))
        told = {name: {k: v for k, v in asdict(estimate).items() if v is not None} for name, estimate in found.items()}
        print(json.dumps(told, indent=1))
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
