"""Context builders: the teacher's prompt from an example and, in some, from the student's judged attempts.

context(example, own, others)   the teacher's chat; None where there is nothing to add
privileged         whether the teacher's prompt has information that the student's lacks
needs_rollouts     whether it uses the rollout's verdicts
needs_siblings     whether it uses other completions of the same prompt
template_options   keyword arguments for the teacher's chat template, such as {"enable_thinking": True}
max_prompt_tokens  limit of the teacher's prompt in tokens; None is the rest of its window
at                 in conversations: "first", in the first prompt alone, or "every", also in the turn before each later reply
"""

import re
import string
from collections.abc import Mapping, Sequence

from opd_lightning.types import Attempt, Example, Messages
from opd_lightning.utils.deprecation import RenamedAttribute, rename_members

RENAMED = {"informs": "privileged", "reads_attempts": "needs_rollouts", "wording": "template_text"}
"""Old names of members, which contexts outside the package may define."""
MEMBERS = (*RENAMED.values(), "needs_siblings", "template_options", "max_prompt_tokens")


def check_members(context: object) -> None:
    """Raises ValueError if a context lacks members, which `NoContext` has."""
    if missing := [name for name in MEMBERS if not hasattr(context, name)]:
        raise ValueError(
            f"context={type(context).__name__} lacks {', '.join(missing)}; "
            "derive it from opd_lightning.teachers.contexts.NoContext."
        )


def check_template(template: str, needed: set[str]) -> None:
    """Raises ValueError unless the format string `template` has exactly the placeholders `needed`."""
    try:
        placeholders = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"context.template={template!r} is no format string ({error}); double literal braces.") from error
    if placeholders != needed:
        raise ValueError(
            f"context.template={template!r} has the placeholders {sorted(placeholders)}; it needs exactly {sorted(needed)}."
        )


class NoContext:
    """The context without additions: the student's own prompt.

    Args:
        template_options, max_prompt_tokens, at: of the teacher's prompt, see above.
    """

    privileged = False
    needs_rollouts = False
    needs_siblings = False
    at = "first"
    informs = RenamedAttribute("privileged")
    reads_attempts = RenamedAttribute("needs_rollouts")

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        rename_members(cls, RENAMED)

    def __init__(self, template_options: dict | None = None, max_prompt_tokens: int | None = None, at: str = "first"):
        if at not in ("first", "every"):
            raise ValueError(f"context.at={at!r} is unknown; choose first, or every: also before each later reply.")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"context.max_prompt_tokens={max_prompt_tokens} must be at least 1; null is the teacher's window.")
        self.template_options, self.max_prompt_tokens, self.at = template_options or {}, max_prompt_tokens, at

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The student's chat, unchanged."""
        return example.messages

    def template_text(self) -> str:
        """The builder's fixed text, without quotes: where completions repeat it, the context has leaked."""
        return ""

    wording = template_text


class PrivilegedContext(NoContext):
    """The context with a part of the example: a demonstration (SDFT, arXiv 2601.19897), a solution (OPSD, 2601.18734).

    Args:
        part: "demonstration" or "solution".
        template: the new last user turn, with the placeholders {prompt} and the part's name.
        template_options, max_prompt_tokens, at: of the teacher's prompt, see above.
    """

    privileged = True

    def __init__(
        self,
        part: str,
        template: str,
        template_options: dict | None = None,
        max_prompt_tokens: int | None = None,
        at: str = "first",
    ):
        super().__init__(template_options, max_prompt_tokens, at)
        if part not in ("demonstration", "solution"):
            raise ValueError(f"context.part={part!r} is no part of an example; choose demonstration or solution.")
        check_template(template, {"prompt", part})
        self.part, self.template = part, template

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The chat with the part in its last turn.

        Raises:
            ValueError: the example lacks it.
        """
        quoted = getattr(example, self.part)
        if quoted is None:
            raise ValueError(
                f"example {example.id} has no {self.part}; context={self.part} needs one for each (task.columns.{self.part} "
                "maps it), or choose context=sibling, context=rule or an external teacher."
            )
        return apply_template(example.messages, self.template, **{self.part: quoted})

    def template_text(self) -> str:
        """The template without its placeholders."""
        return literal(self.template)


class Sibling(NoContext):
    """The context with another, correct completion of the same prompt (SDPO, arXiv 2601.20802).

    It is never the scored completion itself; None where no other is correct.

    Args:
        template: the new last user turn, with the placeholders {prompt} and {sibling}.
        solved: the smallest `content` of a verdict that counts as correct.
        wrong: take one that is not correct, for a second reading to contrast with the first (RLCSD, arXiv 2606.11709).
        strip: a regular expression; its matches in the sibling, such as a thinking part, are left out.
        template_options, max_prompt_tokens, at: of the teacher's prompt, see above.
    """

    privileged = True
    needs_rollouts = True
    needs_siblings = True

    def __init__(
        self,
        template: str,
        solved: float = 1.0,
        strip: str | None = None,
        template_options: dict | None = None,
        max_prompt_tokens: int | None = None,
        wrong: bool = False,
        at: str = "first",
    ):
        super().__init__(template_options, max_prompt_tokens, at)
        check_template(template, {"prompt", "sibling"})
        if not 0 < solved <= 1:
            raise ValueError(f"context.solved={solved} must lie in (0, 1]; 1 takes right answers only.")
        try:
            self.strip = None if strip is None else re.compile(strip, re.DOTALL)
        except re.error as error:
            raise ValueError(f"context.strip={strip!r} is no regular expression ({error}).") from error
        self.template, self.solved, self.wrong = template, solved, wrong

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The chat with the first correct sibling, or wrong one; None without one."""
        for attempt in others:
            if (attempt.verdict.content < self.solved) == self.wrong:
                text = attempt.text if self.strip is None else self.strip.sub("", attempt.text).strip()
                return apply_template(example.messages, self.template, sibling=text)
        return None

    def template_text(self) -> str:
        """The template without its placeholders."""
        return literal(self.template)


class Feedback(NoContext):
    """The context with the environment's feedback on the scored completion; None without feedback.

    The completion itself is left out, for a teacher with it repeats it (SDPO's ablation).

    Args:
        template: the new last user turn, with the placeholders {prompt} and {feedback}.
        template_options, max_prompt_tokens, at: of the teacher's prompt, see above.
    """

    privileged = True
    needs_rollouts = True

    def __init__(
        self, template: str, template_options: dict | None = None, max_prompt_tokens: int | None = None, at: str = "first"
    ):
        super().__init__(template_options, max_prompt_tokens, at)
        check_template(template, {"prompt", "feedback"})
        self.template = template

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The chat with the verdict's feedback."""
        feedback = None if own is None else own.verdict.feedback
        return None if feedback is None else apply_template(example.messages, self.template, feedback=feedback)

    def template_text(self) -> str:
        """The template without its placeholders."""
        return literal(self.template)


class FirstOf(NoContext):
    """The first of several builders that returns a chat: SDPO takes a sibling, else the feedback.

    Args:
        choices: builders by name, in order; None is skipped.
        template_options, max_prompt_tokens, at: of the teacher's prompt, see above; those of the choices are ignored.
    """

    privileged = True
    needs_rollouts = True
    needs_siblings = True

    def __init__(
        self,
        choices: Mapping[str, NoContext | None],
        template_options: dict | None = None,
        max_prompt_tokens: int | None = None,
        at: str = "first",
    ):
        super().__init__(template_options, max_prompt_tokens, at)
        self.choices = [choice for choice in choices.values() if choice is not None]
        if not self.choices:
            raise ValueError("context.choices is empty; choose context=sibling or context=feedback.")
        self.needs_siblings = all(choice.needs_siblings for choice in self.choices)

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The first chat that is not None."""
        chats = (choice(example, own, others) for choice in self.choices)
        return next((chat for chat in chats if chat is not None), None)

    def template_text(self) -> str:
        """The fixed text of all choices."""
        return "\n".join(choice.template_text() for choice in self.choices)


class Rule(NoContext):
    """The context with a rule for every prompt, and worked examples as earlier turns (context distillation).

    Args:
        system: the rule; it comes before the example's own system prompt.
        turns: worked examples, [{"user": ..., "assistant": ...}, ...]; small models hardly follow rules without.
        template_options, max_prompt_tokens, at: of the teacher's prompt, see above.
    """

    privileged = True

    def __init__(
        self,
        system: str | None = None,
        turns: Sequence[Mapping[str, str]] = (),
        template_options: dict | None = None,
        max_prompt_tokens: int | None = None,
        at: str = "first",
    ):
        super().__init__(template_options, max_prompt_tokens, at)
        if not system and not turns:
            raise ValueError("context=rule has neither a rule nor worked examples; set context.system or context.turns.")
        for turn in turns:
            if set(turn) != {"user", "assistant"}:
                raise ValueError(f"context.turns has {dict(turn)!r}; a worked example is {{user: ..., assistant: ...}}.")
        self.system = system
        self.turns: Messages = [{"role": role, "content": t[role]} for t in turns for role in ("user", "assistant")]

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The rule, the worked examples, then the example's chat."""
        chat = example.messages
        system = chat[0]["content"] if chat[0]["role"] == "system" else None
        systems = [text for text in (self.system, system) if text]
        before: Messages = [{"role": "system", "content": "\n\n".join(systems)}] if systems else []
        return [*before, *self.turns, *(chat[1:] if system is not None else chat)]

    def template_text(self) -> str:
        """The rule, without the worked examples, which are meant to be imitated."""
        return self.system or ""


def apply_template(chat: Messages, template: str, **parts: str) -> Messages:
    """The chat with its last turn in a template."""
    *before, last = chat
    return [*before, {**last, "content": template.format(prompt=last["content"], **parts)}]


def literal(template: str) -> str:
    """A template's fixed text, one line for each part between placeholders."""
    return "\n".join(text for text, *_ in string.Formatter().parse(template) if text)
