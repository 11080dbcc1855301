"""Context builders: the teacher's prompt from an example and, for some, from the student's judged attempts.

context(example, own, others)   the chat that the teacher reads; None where there is nothing to tell it
informs            does the teacher read something that the student does not?
reads_attempts     does it take the rollout's verdicts?
needs_siblings     does it take other completions of the same prompt?
template_options   keyword arguments for the teacher's chat template, such as {"enable_thinking": True}
max_prompt_tokens  the longest prompt of the teacher; None is what its window leaves
"""

import re
import string
from collections.abc import Mapping, Sequence

from opd_lightning.types import Attempt, Example, Messages


def check_template(template: str, needed: set[str]) -> None:
    """Raises ValueError unless the format string `template` has exactly the placeholders `needed`."""
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"context.template={template!r} is no format string ({error}); double literal braces.") from error
    if found != needed:
        raise ValueError(
            f"context.template={template!r} has the placeholders {sorted(found)}; it needs exactly {sorted(needed)}."
        )


class NoContext:
    """The teacher reads what the student reads.

    Args:
        template_options, max_prompt_tokens: of the teacher's prompt, see above.
    """

    informs = False
    reads_attempts = False
    needs_siblings = False

    def __init__(self, template_options: dict | None = None, max_prompt_tokens: int | None = None):
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"context.max_prompt_tokens={max_prompt_tokens} must be at least 1; null is the teacher's window.")
        self.template_options, self.max_prompt_tokens = template_options or {}, max_prompt_tokens

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The student's chat, unchanged."""
        return example.messages

    def wording(self) -> str:
        """What a builder says besides what it quotes: where completions repeat it, the context has leaked."""
        return ""


class Quote(NoContext):
    """The teacher also reads a part of the example: a demonstration (SDFT, arXiv 2601.19897), a solution (OPSD, 2601.18734).

    Args:
        part: "demonstration" or "solution".
        template: the last user turn anew, with the placeholders {prompt} and the part's name.
        template_options, max_prompt_tokens: of the teacher's prompt, see above.
    """

    informs = True

    def __init__(self, part: str, template: str, template_options: dict | None = None, max_prompt_tokens: int | None = None):
        super().__init__(template_options, max_prompt_tokens)
        if part not in ("demonstration", "solution"):
            raise ValueError(f"context.part={part!r} is no part of an example; choose demonstration or solution.")
        check_template(template, {"prompt", part})
        self.part, self.template = part, template

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The chat with the part.

        Raises:
            ValueError: the example does not have it.
        """
        quoted = getattr(example, self.part)
        if quoted is None:
            raise ValueError(
                f"example {example.id} has no {self.part}; context={self.part} needs one for each (task.columns.{self.part} "
                "maps it), or choose context=sibling, context=rule or an external teacher."
            )
        return reworded(example.messages, self.template, **{self.part: quoted})

    def wording(self) -> str:
        """The template without what it quotes."""
        return literal(self.template)


class Sibling(NoContext):
    """The teacher also reads another completion of the same prompt that was right (SDPO, arXiv 2601.20802).

    It is never the scored completion itself; where no other was right there is nothing to tell.

    Args:
        template: the last user turn anew, with the placeholders {prompt} and {sibling}.
        solved: the least content of a verdict that counts as right.
        strip: a regular expression, such as the thinking part's; what it matches in the sibling is left out.
        template_options, max_prompt_tokens: of the teacher's prompt, see above.
    """

    informs = True
    reads_attempts = True
    needs_siblings = True

    def __init__(
        self,
        template: str,
        solved: float = 1.0,
        strip: str | None = None,
        template_options: dict | None = None,
        max_prompt_tokens: int | None = None,
    ):
        super().__init__(template_options, max_prompt_tokens)
        check_template(template, {"prompt", "sibling"})
        if not 0 < solved <= 1:
            raise ValueError(f"context.solved={solved} must lie in (0, 1]; 1 takes right answers only.")
        try:
            self.strip = None if strip is None else re.compile(strip, re.DOTALL)
        except re.error as error:
            raise ValueError(f"context.strip={strip!r} is no regular expression ({error}).") from error
        self.template, self.solved = template, solved

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The chat with the first right sibling."""
        for attempt in others:
            if attempt.verdict.content >= self.solved:
                text = attempt.text if self.strip is None else self.strip.sub("", attempt.text).strip()
                return reworded(example.messages, self.template, sibling=text)
        return None

    def wording(self) -> str:
        """The template without what it quotes."""
        return literal(self.template)


class Feedback(NoContext):
    """The teacher also reads what the environment said of the scored completion, where it said something.

    The completion itself is not shown: a teacher that reads it repeats it (SDPO's ablation).

    Args:
        template: the last user turn anew, with the placeholders {prompt} and {feedback}.
        template_options, max_prompt_tokens: of the teacher's prompt, see above.
    """

    informs = True
    reads_attempts = True

    def __init__(self, template: str, template_options: dict | None = None, max_prompt_tokens: int | None = None):
        super().__init__(template_options, max_prompt_tokens)
        check_template(template, {"prompt", "feedback"})
        self.template = template

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The chat with the verdict's feedback."""
        said = None if own is None else own.verdict.feedback
        return None if said is None else reworded(example.messages, self.template, feedback=said)

    def wording(self) -> str:
        """The template without what it quotes."""
        return literal(self.template)


class FirstOf(NoContext):
    """The first of several builders that has something to tell: SDPO takes a sibling, else the feedback.

    Args:
        choices: builders by name, asked in order; a None is passed over.
        template_options, max_prompt_tokens: of the teacher's prompt, see above; those of the choices do not count.
    """

    informs = True
    reads_attempts = True
    needs_siblings = True

    def __init__(
        self,
        choices: Mapping[str, NoContext | None],
        template_options: dict | None = None,
        max_prompt_tokens: int | None = None,
    ):
        super().__init__(template_options, max_prompt_tokens)
        self.choices = [choice for choice in choices.values() if choice is not None]
        if not self.choices:
            raise ValueError("context.choices is empty; choose context=sibling or context=feedback.")
        self.needs_siblings = all(choice.needs_siblings for choice in self.choices)

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The first chat that there is."""
        chats = (choice(example, own, others) for choice in self.choices)
        return next((chat for chat in chats if chat is not None), None)

    def wording(self) -> str:
        """What any of them says."""
        return "\n".join(choice.wording() for choice in self.choices)


class Rule(NoContext):
    """The teacher also reads a rule that holds for every prompt, with worked examples as earlier turns (context distillation).

    Args:
        system: the rule; it comes before the example's own system prompt.
        turns: worked examples, [{"user": ..., "assistant": ...}, ...]; small models obey little without.
        template_options, max_prompt_tokens: of the teacher's prompt, see above.
    """

    informs = True

    def __init__(
        self,
        system: str | None = None,
        turns: Sequence[Mapping[str, str]] = (),
        template_options: dict | None = None,
        max_prompt_tokens: int | None = None,
    ):
        super().__init__(template_options, max_prompt_tokens)
        if not system and not turns:
            raise ValueError("context=rule has neither a rule nor worked examples; set context.system or context.turns.")
        for turn in turns:
            if set(turn) != {"user", "assistant"}:
                raise ValueError(f"context.turns has {dict(turn)!r}; a worked example is {{user: ..., assistant: ...}}.")
        self.system = system
        self.turns: Messages = [{"role": role, "content": t[role]} for t in turns for role in ("user", "assistant")]

    def __call__(self, example: Example, own: Attempt | None = None, others: Sequence[Attempt] = ()) -> Messages | None:
        """The rule, the worked examples, the example's chat."""
        chat = example.messages
        theirs = chat[0]["content"] if chat[0]["role"] == "system" else None
        words = [text for text in (self.system, theirs) if text]
        before: Messages = [{"role": "system", "content": "\n\n".join(words)}] if words else []
        return [*before, *self.turns, *(chat[1:] if theirs is not None else chat)]

    def wording(self) -> str:
        """The rule; worked examples are meant to be imitated."""
        return self.system or ""


def reworded(chat: Messages, template: str, **parts: str) -> Messages:
    """The chat with its last turn in other words."""
    *before, last = chat
    return [*before, {**last, "content": template.format(prompt=last["content"], **parts)}]


def literal(template: str) -> str:
    """A template's own words, a line for each stretch between placeholders."""
    return "\n".join(text for text, *_ in string.Formatter().parse(template) if text)
