"""Context builders: the teacher's prompt from an example."""

import string

from opd_lightning.tasks.base import Example, Messages


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
        template_options: keyword arguments for the chat template, such as {"enable_thinking": True}.
    """

    informs = False

    def __init__(self, template_options: dict | None = None):
        self.template_options = template_options or {}

    def __call__(self, example: Example) -> Messages:
        """The student's chat, unchanged."""
        return example.messages


class Demonstration:
    """The teacher also reads an expert's answer, in the last user turn (SDFT, arXiv 2601.19897).

    Args:
        template: the new user turn, with the placeholders {prompt} and {demonstration}.
        template_options: keyword arguments for the chat template.
    """

    informs = True

    def __init__(self, template: str, template_options: dict | None = None):
        check_template(template, {"prompt", "demonstration"})
        self.template, self.template_options = template, template_options or {}

    def __call__(self, example: Example) -> Messages:
        """The chat with the demonstration.

        Raises:
            ValueError: the example has no demonstration.
        """
        if example.demonstration is None:
            raise ValueError(f"example {example.id} has no demonstration; context=demonstration needs one for each.")
        *before, last = example.messages
        shown = self.template.format(prompt=last["content"], demonstration=example.demonstration)
        return [*before, {**last, "content": shown}]
