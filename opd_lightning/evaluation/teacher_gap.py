"""TeacherAccuracy: accuracy of the teacher with its context, beside the student's on the same prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from opd_lightning.contracts import Generator, Renderer, Task
from opd_lightning.evaluation.estimate import Estimate, proportion
from opd_lightning.models import Student
from opd_lightning.types import Completion, Example, SamplingParams


class TeacherAccuracy:
    """Greedy accuracy of the teacher with its context and of the student without: the gap that distillation can close.

    Args:
        task, split, n: the first n examples of a split; those without what the context quotes are left out.
        renderer: the student's.
        max_new_tokens: longer completions are cut there, and judged as they are.
    """

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        max_new_tokens: int,
        split: str = "test",
        n: int = 64,
    ):
        self.task, self.examples = task, list(task.examples(split))[:n]
        self.renderer = renderer
        self.sampling = SamplingParams(max_new_tokens, temperature=0.0)
        self.teacher_accuracy: Estimate | None = None

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """`teacher/shown/accuracy` and `teacher/shown/student_accuracy`; none if the teacher cannot write or be judged."""
        teacher = teachers.get("teacher")
        if teacher is None or not self.task.verifies or not teacher.writes or teacher.context.needs_rollouts:
            return {}
        examples = [example for example in self.examples if can_be_shown(teacher, example)]
        if not examples:
            return {}
        if self.teacher_accuracy is None or not teacher.frozen:
            done, _ = teacher.write(teacher.prompts(examples), self.sampling, 0, generator)
            self.teacher_accuracy = self.judge(examples, done)
        prompts = [self.renderer.render(example.messages, example.tools) for example in examples]
        own = self.judge(examples, generator.generate(prompts, self.sampling, 0))
        return {"teacher/shown/accuracy": self.teacher_accuracy, "teacher/shown/student_accuracy": own}

    def judge(self, examples: list[Example], done: Sequence[Completion]) -> Estimate:
        """The share of right completions."""
        texts = self.renderer.decode_all([completion.token_ids for completion in done])
        right = [self.task.verify(e, text).content >= 1.0 for e, text in zip(examples, texts, strict=True)]
        return proportion([float(r) for r in right])

    def warnings(self, numbers: Mapping[str, float]) -> list[str]:
        """A warning if these numbers show that the teacher is no better than the student."""
        teacher, student = numbers.get("teacher/shown/accuracy"), numbers.get("teacher/shown/student_accuracy")
        if teacher is None or student is None or teacher > student:
            return []
        return [
            f"the teacher with its context answers {teacher:.3f} of the held-out prompts right, the student without it "
            f"{student:.3f}: training can only change the student's style. Show the teacher more (another context or "
            "wording), or take a stronger teacher or start model."
        ]


def can_be_shown(teacher: Any, example: Example) -> bool:
    """Whether an example has the part that the context quotes; held-out rows often lack it."""
    try:
        return teacher.context(example) is not None
    except ValueError:
        return False
