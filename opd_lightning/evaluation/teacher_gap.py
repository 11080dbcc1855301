"""Is the teacher worth listening to? What it can do behind what it is shown, beside the student on the same prompts."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from opd_lightning.data.renderer import encode_chat
from opd_lightning.evaluation.estimate import Estimate, proportion
from opd_lightning.generation.transformers import Completions, Sampling, complete
from opd_lightning.models import Student
from opd_lightning.teachers.local import Scorer
from opd_lightning.types import Example, Prompts, Task


class TeacherAccuracy:
    """Greedy accuracy of the teacher with its context and of the student without: the gap that distillation can close.

    Args:
        task, split, n: the first n examples of a split that the context can be worded for.
        tokenizer: the student's.
        max_new_tokens: a completion that has not ended by then is judged as it stands.
        template_options: keyword arguments for the student's chat template.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        split: str = "test",
        n: int = 64,
        template_options: dict | None = None,
    ):
        self.task, self.tokenizer = task, tokenizer
        self.examples, self.template_options = list(task.examples(split))[:n], template_options or {}
        self.sampling = Sampling(max_new_tokens, temperature=0.0)
        self.known: Estimate | None = None

    def __call__(self, student: Student, scorers: Mapping[str, Scorer]) -> dict[str, Estimate]:
        """`teacher/shown/accuracy` and `teacher/shown/student_accuracy`; nothing where no teacher can write or be judged."""
        scorer = scorers.get("teacher")
        if scorer is None or not self.task.verifies or not scorer.weights.writes or scorer.context.reads_attempts:
            return {}
        examples = [e for e in self.examples if tellable(scorer, e)]
        if not examples:
            return {}
        ids = [encode_chat(self.tokenizer, e.messages, **self.template_options) for e in examples]
        if self.known is None or not scorer.weights.fixed:
            done, *_ = scorer.write(student, Prompts(examples, ids), self.sampling, seed=0)
            self.known = self.judge(examples, done)
        with student.evaluating() as lm:
            own = self.judge(examples, complete(lm, ids, self.sampling, self.tokenizer))
        return {"teacher/shown/accuracy": self.known, "teacher/shown/student_accuracy": own}

    def judge(self, examples: list[Example], done: Completions) -> Estimate:
        """The share of right completions."""
        texts = done.texts(self.tokenizer)
        right = [self.task.verify(e, text).content >= 1.0 for e, text in zip(examples, texts, strict=True)]
        return proportion([float(r) for r in right])

    def warnings(self, found: Mapping[str, float]) -> list[str]:
        """What to say before training on these numbers."""
        teacher, student = found.get("teacher/shown/accuracy"), found.get("teacher/shown/student_accuracy")
        if teacher is None or student is None or teacher > student:
            return []
        return [
            f"the teacher with its context answers {teacher:.3f} of the held-out prompts right, the student without it "
            f"{student:.3f}: there is nothing to learn from such a teacher but its manner. Show it more (another context or "
            "wording), or take a stronger teacher or start model."
        ]


def tellable(scorer: Scorer, example: Example) -> bool:
    """Has the example what the context quotes? Held-out rows often lack it."""
    try:
        return scorer.context(example) is not None
    except ValueError:
        return False
