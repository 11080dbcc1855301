"""HarnessTasks: tasks of the LM Evaluation Harness (EleutherAI), if it is installed."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_lightning.evaluation.estimate import Z95, Estimate
from opd_lightning.models import Student


class HarnessTasks:
    """Any task of lm-evaluation-harness, on the student as it is in memory.

    Args:
        tasks: names, such as ["ifeval", "mmlu"].
        tokenizer: the student's.
        limit: examples per task; None takes all.
        batch_size: sequences at a time.
        chat: apply the chat template.
        include_path: a folder with task files of your own.

    Raises:
        ValueError: the harness is not installed.
    """

    ends_only = True
    examples: tuple = ()  # the harness has its own

    def __init__(
        self,
        tasks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None = None,
        batch_size: int = 8,
        chat: bool = True,
        include_path: str | None = None,
    ):
        if find_spec("lm_eval") is None:
            raise ValueError("evaluation=harness needs lm-evaluation-harness; pip install 'opd-lightning[harness]'.")
        self.tasks, self.tokenizer, self.limit = list(tasks), tokenizer, limit
        self.batch_size, self.chat, self.include_path = batch_size, chat, include_path

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Any) -> dict[str, Estimate]:
        """`harness/<task>.<metric>` of each task, with its standard error's interval where the harness gives one."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        with student.eval_mode() as lm:
            model = HFLM(pretrained=lm, tokenizer=self.tokenizer, batch_size=self.batch_size)
            results: Any = lm_eval.simple_evaluate(
                model=model,
                tasks=self.tasks,
                limit=self.limit,
                apply_chat_template=self.chat,
                task_manager=TaskManager(include_path=self.include_path),
                bootstrap_iters=0,
            )
        estimates = {}
        for task, numbers in results["results"].items():
            for key, value in numbers.items():
                metric, _, variant = key.partition(",")
                if not isinstance(value, int | float) or metric.endswith("_stderr") or not variant:
                    continue
                error = numbers.get(f"{metric}_stderr,{variant}")
                has_error = isinstance(error, float)
                span = (value - Z95 * error, value + Z95 * error) if has_error else (None, None)
                estimates[f"harness/{task}.{metric}"] = Estimate(float(value), None, *span)
        return estimates
