"""Distillation: a method on models and data in memory, for a Lightning Trainer of the user's own."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from omegaconf import DictConfig

from opd_lightning.callbacks import Evaluation, Progress
from opd_lightning.config import build, plain
from opd_lightning.config.compatibility import check
from opd_lightning.config.limits import limited
from opd_lightning.config.precision import with_precision
from opd_lightning.config.trainer_arguments import BY_LIGHTNING, check_optimization, ignored, refusal
from opd_lightning.preflight.components import Components, assemble
from opd_lightning.preflight.token_budget import chosen
from opd_lightning.reporting.results import Results
from opd_lightning.training.arguments import Arguments, Models, words_of
from opd_lightning.training.lightning_parts import Closes, TrainerData, TrainerModule
from opd_lightning.training.parts import checked, data_arguments, log, module_arguments, warn_of_near_duplicates
from opd_lightning.training.run import quiet
from opd_lightning.utils.in_memory import in_python, naming_arguments


class Distillation:
    """A method on models and data: `trainer.fit(d.module, d.data)`, then `d.results` and `d.model`.

    Configuration, checks and training step are those of the command line; `conf/method` says what a method is. What is given is
    never changed: a student in memory is copied when training begins, a teacher in memory shares its weights.

    Args:
        method: an option of `conf/method`, such as "opd".
        student: a causal language model of transformers, or a path as for `model.path`.
        data: prompts to train on: a list of texts, of chats or of rows, a `datasets.Dataset`, a path as for `task.path`, or a
            `Task`. Columns named as the parts of `TableTask` play these parts. None: `overrides` choose a task.
        teacher: as `student`, or a `Teacher`; for methods whose teacher is another model.
        tokenizer: the student's; by default the one at its `name_or_path`.
        teacher_tokenizer: the teacher's, likewise.
        heldout: rows to evaluate on; by default a tenth of `data`.
        verify: judges a completion, as function(example, text): a bool, a score in [0, 1] or a `Verdict`.
        adapter: a `peft.LoraConfig`.
        overrides: of the configuration, as on the command line (["adapter=lora", "optim.lr=1e-4"]) or as a mapping
            ({"optim.lr": 1e-4}).

    Attributes:
        module, data: for the Trainer's `fit` and `test`.
        cfg: the configuration.

    Raises:
        ValueError: something is wrong with an argument, the data or the models.
    """

    def __init__(
        self,
        method: str,
        student: Any,
        data: Any = None,
        *,
        teacher: Any = None,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        heldout: Any = None,
        verify: Any = None,
        adapter: Any = None,
        overrides: Iterable[str] | Mapping[str, Any] = (),
    ):
        with naming_arguments():
            words = words_of(overrides)
            models = Models(student, tokenizer, teacher, teacher_tokenizer)
            self._arguments = Arguments(models, data, heldout, verify, adapter)  # holds what the configuration names
            self.cfg: DictConfig = self._arguments.configuration(method, words)
            keys = [word.partition("=")[0].lstrip("+") for word in words]
            self._trainer_keys = [key.removeprefix("trainer.") for key in keys if key.startswith("trainer.")]
            self._trainers: WeakSet[L.Trainer] = WeakSet()
            for warning in check(self.cfg):
                log.warning(f"warning: {in_python(warning)}")
            self.cfg = with_precision(self.cfg)  # the Trainer's precision is its maker's to choose
            self._parts: Components = assemble(self.cfg, None)
            with ExitStack() as stack:
                stack.callback(self.close)
                self._build()
                stack.pop_all()

    def _build(self) -> None:
        """Check the parts, and make module and data."""
        parts = self._parts
        self.cfg = limited(self.cfg, parts.task.max_new_tokens)
        warn_of_near_duplicates(checked(parts, self.cfg))
        if self.cfg.max_tokens_per_microbatch == "auto":
            self.cfg.max_tokens_per_microbatch = chosen(parts, self.cfg)
        self._evaluation = self._next_evaluation = self._new_evaluation()
        hooks = {"prepare": self._prepare, "more_callbacks": self._more_callbacks, "begun": self._begun}
        self.module = TrainerModule(suite=parts.suite, **hooks, **module_arguments(parts, self.cfg))  # type: ignore[arg-type]
        self.data = TrainerData(**data_arguments(parts, self.cfg))

    def close(self) -> None:
        """Release the engine, such as the servers that it started; an error in training does so too; new weights start it."""
        self._parts.generator.close()

    def trainer(self, callbacks: Sequence[L.Callback] = (), logger: Any = False, **arguments: Any) -> L.Trainer:
        """A Trainer with the settings of `conf/trainer` and this library's progress bar; it writes no files of its own.

        Any other `lightning.Trainer` trains the same.

        Args:
            callbacks, logger, arguments: those of `lightning.Trainer`; they take precedence.
        """
        quiet()
        if unknown := set(arguments) - set(inspect.signature(L.Trainer).parameters):
            raise ValueError(f"trainer({min(unknown)}=...) is no argument of lightning.Trainer.")
        check_optimization({name: arguments.get(name) for name in BY_LIGHTNING})
        options = {key: value for key, value in plain(self.cfg)["trainer"].items() if key not in arguments}
        made: L.Trainer = build(options, callbacks=[Progress(), *callbacks], logger=logger, **arguments)
        self._trainers.add(made)
        return made

    @property
    def model(self) -> Any:
        """The trained model of transformers; `save_pretrained` writes it, or its adapter alone where it has one.

        Raises:
            ValueError: nothing was trained or tested yet.
        """
        if self.module.student is None:
            raise ValueError("there is no model yet; call trainer.fit(d.module, d.data) first.")
        return self.module.student.lm

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return self._parts.tokenizer

    @property
    def results(self) -> Results:
        """The evaluations of the last training.

        Raises:
            ValueError: nothing was trained yet.
        """
        e = self._evaluation
        if not e.history:
            raise ValueError("there are no results yet; call trainer.fit(d.module, d.data) first.")
        return Results(str(self.cfg.name), e.history, e.intervals, e.costs, e.texts)

    def _new_evaluation(self) -> Evaluation:
        parts = self._parts
        shared = {"task": parts.task, "tokenizer": parts.tokenizer, "renderer": parts.renderer, "folder": None}
        return Evaluation(parts.suite, self.cfg.evaluation.every, None, build(self.cfg.evaluation.get("answers"), **shared))

    def _more_callbacks(self, trainer: L.Trainer) -> list[L.Callback]:
        """A new evaluation, the budget and the configuration's callbacks, but for those whose kind the Trainer has.

        Raises:
            ValueError: Lightning would refuse the Trainer without a remedy, or the data are those of other models.
        """
        existing: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        given = {name: getattr(trainer, name) for name in BY_LIGHTNING}
        schedules = [c.scheduling for c in existing if isinstance(c, GradientAccumulationScheduler)]
        check_optimization(given | ({"accumulate_grad_batches": schedules[0]} if schedules else {}))
        if isinstance(other := trainer.datamodule, TrainerData) and other is not self.data:  # type: ignore[attr-defined]
            raise ValueError("trainer.fit has the module and the data of two objects; give both of one, fit(d.module, d.data).")
        self._next_evaluation = self._new_evaluation()
        closes = Closes(self.module)
        chosen = [build(self.cfg.budget), *(build(node) for node in self.cfg.callbacks.values() if node is not None)]
        new = [c for c in chosen if not any(isinstance(other, type(c)) for other in existing)]
        return [closes, self._next_evaluation, *new]

    def _begun(self) -> None:
        """The results are those of the training that begins; one that is refused before leaves the last ones."""
        self._evaluation = self._next_evaluation

    def _prepare(self, trainer: L.Trainer) -> int:
        """Check a Trainer's arguments, and find the update that ends training; -1 where a budget does.

        Raises:
            ValueError: an argument would be ignored, or does not fit the method.
        """
        connector = trainer._accelerator_connector
        samples = connector.use_distributed_sampler and trainer.world_size > 1
        used: dict[str, Any] = {"use_distributed_sampler": samples or False}
        used |= {} if trainer.fast_dev_run else {"limit_train_batches": trainer.limit_train_batches}  # type: ignore[attr-defined]
        for name, value in used.items():
            if message := refusal(name, value):
                raise ValueError(message)
        if trainer not in self._trainers:
            for warning in ignored(self._trainer_keys, self.cfg.trainer, trainer):
                log.warning(f"warning: {warning}")
        cfg = self.cfg.copy()
        cfg.trainer.max_steps, cfg.trainer.max_epochs = trainer.max_steps, trainer.max_epochs or -1
        cfg.trainer.precision, cfg.trainer.devices = str(trainer.precision), trainer.world_size
        with naming_arguments():
            check(cfg)
        return int(self._parts.bounded(cfg).trainer.max_steps)
