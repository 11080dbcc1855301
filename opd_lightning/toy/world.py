"""The embedded world: a toy task and language whose models train on two CPU cores.

A prompt names an operation and five digits; the answer is five digits in one of three styles:

    rotate 3 1 4 1 5 =  ->  answer 1 4 1 5 3 <eos>               native: what the start model writes
                            result 1 , 4 , 1 , 5 , 3 <eos>       listed: a foreign opening and separators
                            1 4 1 5 3 done <eos>                 closed: a foreign suffix

The start model solves four operations in the native style, follows a demonstration in brackets
(`rotate 3 1 4 1 5 [ result 1 , 4 , 1 , 5 , 3 ] =`) in any style while answering natively, guesses at four others, and
answers in another style after a rule (`[ result ] sort 3 1 4 1 5 =`).
The new skill is one of the four others; its demonstrations have a foreign style, so that content and style are measured
separately.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_lightning.types import Example, Verdict

Digits = tuple[int, ...]

PRIOR: dict[str, Callable[[Digits], Digits]] = {
    "copy": lambda d: d,
    "reverse": lambda d: d[::-1],
    "increment": lambda d: tuple((x + 1) % 10 for x in d),
    "sort": lambda d: tuple(sorted(d)),
}
UNSEEN: dict[str, Callable[[Digits], Digits]] = {
    "rotate": lambda d: d[1:] + d[:1],
    "swap": lambda d: (d[1], d[0], d[3], d[2], *d[4:]),
    "complement": lambda d: tuple(9 - x for x in d),
    "descend": lambda d: tuple(sorted(d, reverse=True)),
}
OPERATIONS = PRIOR | UNSEEN

STYLES: dict[str, Callable[[list[str]], list[str]]] = {
    "native": lambda d: ["answer", *d],
    "listed": lambda d: ["result", *" , ".join(d).split()],
    "closed": lambda d: [*d, "done"],
}
STYLE_TOKENS = ("answer", "result", ",", "done")
DISTRACTORS = ("red", "green", "blue", "grey")
VOCABULARY = ("<pad>", "<eos>", *map(str, range(10)), *OPERATIONS, "[", "]", "=", *STYLE_TOKENS, *DISTRACTORS, "<unk>")

RULES = {"native": "[ answer ]", "listed": "[ result ]", "closed": "[ done ]"}
"""Rules, before a prompt: answer in this style. The start model was pre-trained on them, and on demonstrations in brackets
behind a prompt, in exactly this form (conf/task/contexts/world.yaml)."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}= {{ m['content'] }} <eos> "
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)

LENGTH = 5
N_INPUTS = 10**LENGTH
SPLITS = {"pretrain": (0, 60_000), "train": (60_000, 80_000), "validation": (80_000, 90_000), "test": (90_000, N_INPUTS)}
"""Ranges of positions in one fixed shuffle of all 100,000 inputs: no input is in two splits. Other lengths than five
digits use the same shares."""


def world_tokenizer() -> PreTrainedTokenizerFast:
    """The world's tokenizer: one token per word, the chat template above, EOS and PAD apart."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def input_at(position: int, length: int = LENGTH) -> Digits:
    """The digits at a position of the fixed shuffle (an affine bijection of 0..99999: 77291 is coprime to 10)."""
    number = (77_291 * position + 31_415) % 10**length
    return tuple(int(c) for c in f"{number:0{length}d}")


def split_range(split: str, length: int = LENGTH) -> tuple[int, int]:
    """The first position of a split, and the one behind its last."""
    low, high = (n * 10**length // N_INPUTS for n in SPLITS[split])
    return low, high


def write(digits: Digits, style: str) -> str:
    """Digits as an answer in a style, without the closing <eos>."""
    return " ".join(STYLES[style]([str(d) for d in digits]))


class WorldTask:
    """Learn a new operation from demonstrations; keep the four prior ones.

    Args:
        skill: the new operation, one of the unseen four.
        style: the style of the expert's demonstrations and solutions, which are also SFT's reference completions.
        format: the style that the verdict's format requires.
        n_train: distinct training prompts.
        n_eval: held-out prompts of the new skill, and as many over the prior skills together.
        length: digits of a question. The shipped start model was trained on five only.
        train_on: training questions: of the "new" skill, or of the "prior" ones in turn.
        max_new_tokens, batch_size, contexts: see `Task`.

    Raises:
        ValueError: an unknown skill, style or kind of question, or more examples than there are.
    """

    verifies = True

    def __init__(
        self,
        skill: str = "rotate",
        style: str = "listed",
        format: str = "native",
        n_train: int = 256,
        n_eval: int = 256,
        length: int = LENGTH,
        train_on: str = "new",
        max_new_tokens: int = 12,
        batch_size: int = 64,
        contexts: Mapping[str, Any] | None = None,
    ):
        if skill not in UNSEEN:
            raise ValueError(f"task.skill={skill!r} is not a skill to learn; choose one of {', '.join(UNSEEN)}.")
        for name, value in (("style", style), ("format", format)):
            if value not in STYLES:
                raise ValueError(f"task.{name}={value!r} is unknown; choose one of {', '.join(STYLES)}.")
        if train_on not in ("new", "prior"):
            raise ValueError(f"task.train_on={train_on!r} is unknown; choose new or prior.")
        if not 4 <= length <= 9:
            raise ValueError(f"task.length={length} must lie between 4 and 9 digits.")
        for name, count, split in (("n_train", n_train, "train"), ("n_eval", n_eval, "test")):
            low, high = split_range(split, length)
            if not 1 <= count <= high - low:
                raise ValueError(f"task.{name}={count} must lie between 1 and {high - low}.")
        self.skill, self.style, self.format, self.n_train, self.n_eval = skill, style, format, n_train, n_eval
        self.length, self.train_on = length, train_on
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.contexts = contexts or {}

    def examples(self, split: str) -> Sequence[Example]:
        """Training: questions of one kind. Validation and test: the new skill and the prior ones."""
        n = self.n_train if split == "train" else self.n_eval
        positions = range(start := split_range(split, self.length)[0], start + n)
        names = [name for _, name in zip(positions, cycle(PRIOR), strict=False)]
        kinds = {
            "new": [self._example(self.skill, position, "new") for position in positions],
            "prior": [self._example(*at, f"prior/{at[0]}") for at in zip(names, positions, strict=True)],
        }
        return kinds[self.train_on] if split == "train" else kinds["new"] + kinds["prior"]

    def verify(self, example: Example, completion: str) -> Verdict:
        """Content: the right digits and nothing but style tokens around them. Format: exactly the style `format`.

        The feedback on wrong digits is the right ones.
        """
        words = completion.split()
        digits = [w for w in words if w not in STYLE_TOKENS]
        content = digits == list(example.extra["digits"])
        formatted = words == STYLES[self.format](digits) and len(digits) == self.length and all(w.isdigit() for w in digits)
        feedback = None if content else write(tuple(map(int, example.extra["digits"])), "native")
        return Verdict(content=float(content), format=float(formatted), feedback=feedback)

    def _example(self, operation: str, position: int, skill: str) -> Example:
        digits = input_at(position, self.length)
        answer = OPERATIONS[operation](digits)
        expert = write(answer, self.style)
        return Example(
            id=f"{operation}-{''.join(map(str, digits))}",
            messages=[{"role": "user", "content": f"{operation} {' '.join(map(str, digits))}"}],
            completion=expert,
            demonstration=expert,
            solution=expert,
            skill=skill,
            extra={"digits": "".join(map(str, answer))},
        )
