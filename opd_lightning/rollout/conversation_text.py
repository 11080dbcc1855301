"""The text of a sample: its completion, or the turns of its conversation with their writers."""

from itertools import groupby
from typing import Any

from opd_lightning.data.conversations import exchanges_of
from opd_lightning.types import Sample


def conversation_text(renderer: Any, sample: Sample, student: str | None = None) -> str:
    """What stands behind the prompt: a completion as its text, of a conversation each writer's part behind its name.

    The environment's parts are its messages, or where these are not known all that stands between the replies.

    Args:
        student: a name for the writer of the replies; None takes the sample's source.
    """
    behind = list(zip(sample.completion_ids, sample.loss_mask[sample.prompt_length :].tolist(), strict=True))
    parts = [(own, [token for token, _ in run]) for own, run in groupby(behind, key=lambda pair: pair[1])]
    texts = renderer.decode_all([ids for _, ids in parts])
    if len(parts) < 2:
        return "".join(texts)
    names = [(student or sample.source) if own else "environment" for own, _ in parts]
    answers = ["\n".join(str(turn["content"]) for turn in answers) for _, *answers in exchanges_of(sample.turns)]
    gaps = [i for i, (own, _) in enumerate(parts) if not own]
    if len(gaps) <= len(answers):  # a sample that is cut has fewer
        texts = [*texts]
        for i, text in zip(gaps, answers, strict=False):
            texts[i] = text
    return "\n".join(f"{name}: {text.strip()}" for name, text in zip(names, texts, strict=True))
