"""A task from your own rows: a file, a folder or a hub data set, and which column plays which part."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from opd_lightning.config.names import nearest
from opd_lightning.tasks.chats import chat, reply
from opd_lightning.tasks.columns import UNUSED, check_parts, part_of, prompt_column, unread
from opd_lightning.tasks.first import First
from opd_lightning.tasks.rows import Row, iter_rows, text, written
from opd_lightning.tasks.verifiers import Late, within
from opd_lightning.types import Example, Verdict


class TableTask:
    """Rows with a prompt each, and whatever the method needs: a completion to imitate, an answer to verify.

    `columns` says which column plays which part: {"prompt": "question"}, or words around columns: {"prompt": "{question}\\n
    Options: {options[0]}, {options[1]}"} (a template where there are braces; double literal ones).

        prompt         the user's turn, or a whole chat in one of the ways of `chats.py`; its last assistant turn, if it ends
                       in one, is the completion. The column "prompt", "messages" or "conversations" unless given
        completion     what SFT imitates, text or an assistant's turn
        demonstration  an expert's answer that a teacher may be shown; the completion unless given
        solution       a solution that a teacher may be shown; the completion unless given
        answer         what the verifier compares with
        system         a system prompt of the row's own
        skill          the name under which it is evaluated
        id             unique; file and line unless given

    Splits are disjoint by construction: equal prompts (case and blanks apart) are kept once, held-out ones leave the training
    set, and `notes` says how many rows that cost. Which rows are held out follows from their prompts alone.

    Args:
        path, name, split: the training rows, see `read_rows`.
        columns: as above.
        heldout: {"path", "name", "split"} of the test rows; None holds out a tenth of the rows, at most n_eval. Validation
            rows always come from `path`.
        verifier: judges (completion, answer), see `verifiers.py`; None has no verdicts.
        system: the system prompt of rows that have none of their own.
        prepare: maps a row to the row to use, or to None to leave it out.
        n_train: at most so many training examples; None takes all.
        n_eval: at most so many validation and as many test examples.
        max_new_tokens: see `Task`; None covers the references, see `preflight.references.limit_for`.
        batch_size, contexts: see `Task`.
        bad_rows: "refuse" the first malformed row, or "skip" them all; `notes` then counts and lists them.
        verify_seconds: a verdict that takes longer is that the completion is wrong, for a model's text can send a regular
            expression on an endless search; None waits. See `within` for where it holds.
        max_rows: nothing behind so many rows of `path` is read, for long files; the splits are those of a file that ends there.
            n_train alone reads all rows, for any of them may be among those that are taken, but keeps only these.

    Raises:
        ValueError: a row is malformed, lacks a mapped column or an answer for the verifier (with file and line).
    """

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str],
        name: str | None = None,
        split: str = "train",
        heldout: Mapping[str, str] | None = None,
        verifier: Callable[[str, str], Verdict] | None = None,
        system: str | None = None,
        prepare: Callable[[Row], Row | None] | None = None,
        n_train: int | None = None,
        n_eval: int = 128,
        max_new_tokens: int | None = 128,
        batch_size: int = 8,
        contexts: Mapping[str, Any] | None = None,
        bad_rows: str = "refuse",
        verify_seconds: float | None = 10.0,
        max_rows: int | None = None,
    ):
        if bad_rows not in ("refuse", "skip"):
            raise ValueError(f"task.bad_rows={bad_rows!r} is unknown; choose refuse or skip.")
        self.bad: list[str] | None = [] if bad_rows == "skip" else None
        self.columns = {part: str(column) for part, column in columns.items() if column is not None}
        check_parts(self.columns)
        for key in heldout or {}:
            if key not in ("path", "name", "split"):
                raise ValueError(f"task.heldout.{key} is unknown{nearest(key, ('path', 'name', 'split'))}")
        if heldout is not None and "path" not in heldout:
            raise ValueError("task.heldout.path is missing; say where the held-out rows are, or task.heldout=null.")
        for key, value in (("n_train", n_train), ("n_eval", n_eval), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise ValueError(f"task.{key}={value} must be at least 1.")
        least = getattr(verifier, "seconds", 0)  # a verifier with a limit of its own gives its own verdict on it
        if verify_seconds is not None and not least < verify_seconds <= 86400:
            raise ValueError(f"task.verify_seconds={verify_seconds} must exceed {least}, up to a day (86400); null waits.")
        self.verify_seconds = verify_seconds
        self.verifier, self.system, self.prepare = verifier, system, prepare
        self.verifies = verifier is not None
        self.partial_scores = getattr(verifier, "partial_scores", False)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.contexts = contexts or {}
        self.notes: dict[str, Any] = {"repeated_prompts": 0}
        self.unused: Counter[str] = Counter()
        self.splits = self._split(path, name, split, heldout, n_train, n_eval, max_rows)
        self._count_bad()
        if self.unused:
            self.notes["warnings"] = [
                f"the column {column!r} has something in {n} rows and plays no part, so no model reads it; {UNUSED[column]}."
                for column, n in self.unused.items()
            ]

    def _count_bad(self) -> None:
        if self.bad:
            self.notes |= {"skipped_rows": len(self.bad), "skipped_list": self.bad[:100]}

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Examples leave all splits, each with the reason why it cannot be used.

        Args:
            reasons: a sentence by example id.

        Raises:
            ValueError: bad rows are refused, or no training example is left.
        """
        if not reasons:
            return
        first = next(iter(reasons.values()))
        if self.bad is None:
            raise ValueError(f"{first} task.bad_rows=skip leaves such rows out ({len(reasons)} here).")
        self.splits = {name: [e for e in some if e.id not in reasons] for name, some in self.splits.items()}
        if not self.splits["train"]:
            raise ValueError(f"task.bad_rows=skip leaves no training example, the first for this: {first}")
        self.bad += reasons.values()
        self._count_bad()

    def _split(self, path, name, split, heldout, n_train, n_eval, max_rows) -> dict[str, list[Example]]:
        """The three splits, of rows that are read once; of those that are in none, only a digest of the prompt is kept."""
        other, bad = First(n_eval), None if self.bad is None else list[str]()
        if heldout is not None:
            for example in self._read(**{"name": None, "split": "test", **heldout}, bad=bad, lenient=True):
                other.add(example)
        (test,) = other.parts([n_eval])
        named, taken = {e.id for e in test}, set[str]()  # two files may have the same name, and rows are called by it
        rows = First(None if n_train is None else 2 * n_eval + n_train, without=other.keys)
        for example in self._read(path, name, split, bad=self.bad, max_rows=max_rows):
            if rows.add(example) and example.id in named:
                taken.add(example.id)
        if self.bad is not None and bad:
            self.bad.extend(bad)
        self.notes["repeated_prompts"] = rows.read - rows.distinct
        test = [replace(e, id=f"heldout/{e.id}") if e.id in taken else e for e in test]
        held = min(n_eval, max(1, rows.distinct // 10))
        if heldout is not None:
            validation, train = rows.parts([held, n_train])
            return {"train": train, "validation": validation, "test": test}
        if rows.distinct < 3:
            raise ValueError(f"task.path={path} has {rows.distinct} distinct prompts; training, validation and test need 3.")
        test, validation, train = rows.parts([held, held, n_train])
        return {"train": train, "validation": validation, "test": test}

    def _read(
        self,
        path: str,
        name: str | None,
        split: str,
        bad: list[str] | None,
        lenient: bool = False,
        max_rows: int | None = None,
    ) -> Iterator[Example]:
        places: dict[str, str] = {}
        unfit: list[str] = []  # rows that can be read, and give no example
        empty = True
        for place, row in iter_rows(path, name, split, bad, max_rows):
            try:
                prepared = self._prepare(place, row)
                if prepared is None:
                    continue
                example = self._example(place, prepared, lenient)
                if example.id in places:
                    raise ValueError(
                        f"{place}: task.columns.id={self.columns.get('id')} is {example.id!r} as in {places[example.id]}; give "
                        "every row another, or task.columns.id=null calls rows by file and line."
                    )
                if "id" in self.columns:  # file and line are one row's alone
                    places[example.id] = place
                self.unused.update(unread(prepared, self.columns))
            except ValueError as error:
                if bad is None:
                    raise
                unfit.append(str(error))
                continue
            empty = False
            yield example
        if bad is not None:
            bad.extend(unfit)
        if empty:
            why = f"task.bad_rows=skip leaves no row, the first for this: {bad[0]}" if bad else "task.prepare leaves no row."
            raise ValueError(f"task.path={path}: {why}")

    def _prepare(self, place: str, row: Row) -> Row | None:
        if self.prepare is None:
            return row
        try:
            return self.prepare(row)
        except Exception as error:
            columns = ", ".join(row)
            raise ValueError(
                f"{place}: task.prepare raised {type(error).__name__} ({error}); columns are {columns}. It must take every "
                "row, or return None to leave one out."
            ) from error

    def examples(self, split: str) -> Sequence[Example]:
        """ "train", "validation" or "test"."""
        return self.splits[split]

    def verify(self, example: Example, completion: str) -> Verdict:
        """The verifier's verdict; without one, or not in time, nothing is ever right."""
        if self.verifier is None:
            return Verdict(0.0)
        try:
            with within(self.verify_seconds):
                return self.verifier(completion, example.extra["answer"])
        except Late:
            return Verdict(0.0)

    def _example(self, place: str, row: Row, lenient: bool) -> Example:
        # Held-out rows of public data sets often lack what only training needs.
        spared = ("completion", "demonstration", "solution") if lenient else ()
        columns = self.columns if "prompt" in self.columns else {"prompt": prompt_column(row, place), **self.columns}
        found = {
            part: written(part_of(row, part, column, place, part in spared), f"{place}: task.columns.{part}={column}")
            for part, column in columns.items()
        }
        messages, answered = chat(found["prompt"], place)
        own = text(found.get("system"), "system", place)
        if messages[0]["role"] != "system" and (system := own or self.system):
            messages = [{"role": "system", "content": system}, *messages]
        elif own and own != messages[0]["content"]:
            raise ValueError(f"{place}: task.columns.system and the chat give two system prompts; leave one out.")
        completion, demonstration, solution = (
            reply(found.get(part), part, place) for part in ("completion", "demonstration", "solution")
        )
        if completion and answered and completion != answered:
            raise ValueError(
                f"{place}: task.columns.completion and the chat's last turn give two completions; leave one out (task.prepare)."
            )
        completion = completion or answered
        answer = text(found.get("answer"), "answer", place)
        if self.verifies and answer is None:
            raise ValueError(
                f"{place}: has no answer for task.verifier to compare with; map it (task.columns.answer=<column>)."
            )
        return Example(
            id=text(found.get("id"), "id", place) or place,
            messages=messages,
            completion=completion,
            demonstration=demonstration or completion,
            solution=solution or completion,
            skill=text(found.get("skill"), "skill", place) or "new",
            extra={} if answer is None else {"answer": answer},
        )
