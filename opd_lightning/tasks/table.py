"""A task from rows of a file, a folder or a hub data set, with a mapping of columns to the parts of an example."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

from opd_lightning.config.names import nearest
from opd_lightning.tasks.chats import chat, is_text, learning, marked, replies, tools_of, transcript
from opd_lightning.tasks.columns import UNUSED, all_columns, cells, check_id, check_parts, mapping, no_rows, part_of, unread
from opd_lightning.tasks.compact import examples_of, needed, packed, plain_digest, without
from opd_lightning.tasks.first import FirstExamples
from opd_lightning.tasks.rows import Row, check_utf8, iter_rows, text
from opd_lightning.tasks.splits import digest_of
from opd_lightning.tasks.verifiers import VerifierTimeout, time_limit
from opd_lightning.types import Example, Verdict


class TableTask:
    """A task of rows with a prompt each, and as the method needs, a completion to imitate or an answer to verify.

    `columns` maps parts to columns: {"prompt": "question"}, or to text around columns: {"prompt": "{question}\\n
    Options: {options[0]}, {options[1]}"} (a template where there are braces; double literal ones).

        prompt         the user's turn, or a full chat in a format of `chats.py`, whose last assistant turn, if it ends in one,
                       is the completion. The column "prompt", "messages", "conversations" or "question" unless given
        completion     the reference for SFT, text or an assistant's turn; the column "completion", or of question
                       and answer the answer, unless prompt, completion or answer are given
        demonstration  an expert's answer for a teacher's prompt; the completion unless given
        solution       a solution for a teacher's prompt; the completion unless given
        answer         the verifier's reference; the column "answer" unless prompt, completion or answer are given
        system         the row's own system prompt
        skill          the name under which it is evaluated
        tools          JSON schemas of the functions that the prompt describes; the column "tools" unless given
        id             unique; file and line unless given

    Splits are disjoint by construction: equal prompts (up to case and blanks) are kept once, held-out ones leave the training
    set, and `notes` counts the removed rows. The split of a row follows from its prompt alone.

    Args:
        path, name, split: the training rows, see `read_rows`.
        columns: as above.
        heldout: {"path", "name", "split"} of the test rows; None holds out a tenth of the rows, at most n_eval. Validation
            rows always come from `path`.
        verifier: judges (completion, answer), see `verifiers.py`, or with `reads_example` (example, completion), where
            `example.extra` has the row's columns; None has no verdicts.
        system: the system prompt of rows without one.
        prepare: maps a row to the row to use, or to None to leave it out.
        n_train: at most so many training examples; None takes all.
        n_eval: at most so many validation and as many test examples.
        max_new_tokens: see `Task`; None covers the references, see `preflight.references.limit_for`.
        batch_size, contexts: see `Task`.
        bad_rows: "refuse" the first malformed row, or "skip" them all; `notes` then counts and lists them.
        verify_seconds: a completion whose verdict takes longer is wrong, for a regular expression can search a model's text
            endlessly; None sets no limit. See `time_limit` for where it holds.
        train_on: "last", the reply that a chat ends with, or "all" of its replies (see `chats.learning`).
        max_rows: number of rows of `path` to read, for long files; the splits are those of a file that ends there. n_train
            alone reads all rows, for each may be selected, but keeps only the selected ones.

    Raises:
        ValueError: a row is malformed, lacks a mapped column or an answer for the verifier (with file and line).
    """

    marked, train_on = 0, "last"
    """Rows with turns before the last reply that are marked for training."""

    repeats: Sequence[str] = ()
    """Warnings of rows that are left out for their prompts."""

    reads_example = False
    """Whether the verifier reads the example, not the answer alone."""

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
        train_on: str = "last",
    ):
        if train_on not in ("last", "all"):
            raise ValueError(f"task.train_on={train_on!r} is unknown; choose last or all.")
        self.train_on = train_on
        if bad_rows not in ("refuse", "skip"):
            raise ValueError(f"task.bad_rows={bad_rows!r} is unknown; choose refuse or skip.")
        self.bad: list[str] | None = [] if bad_rows == "skip" else None
        self.columns = {part: str(column) for part, column in columns.items() if column is not None}
        check_parts(self.columns)
        for key in heldout or {}:
            if key not in ("path", "name", "split"):
                raise ValueError(f"task.heldout.{key} is unknown{nearest(key, ('path', 'name', 'split'))}")
        if heldout is not None and "path" not in heldout:
            raise ValueError("task.heldout.path is missing; set it to the held-out rows, or task.heldout=null.")
        for key, value in (("n_train", n_train), ("n_eval", n_eval), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise ValueError(f"task.{key}={value} must be at least 1.")
        least = getattr(verifier, "seconds", 0)  # a verifier with its own limit returns its own verdict on it
        if verify_seconds is not None and not least < verify_seconds <= 86400:
            raise ValueError(f"task.verify_seconds={verify_seconds} must exceed {least}, up to a day (86400); null waits.")
        self.verify_seconds = verify_seconds
        self.verifier, self.system, self.prepare = verifier, system, prepare
        self.verifies = verifier is not None
        self.reads_example = getattr(verifier, "reads_example", False)
        self.partial_scores = getattr(verifier, "partial_scores", False)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.contexts = contexts or {}
        self.notes: dict[str, Any] = {"repeated_prompts": 0}
        self.unused: Counter[str] = Counter()
        self.splits = self._split(path, name, split, heldout, n_train, n_eval, max_rows)
        self._count_bad()
        warnings = [*self.repeats]
        warnings += [
            f"the column {column!r} has something in {n} rows and plays no part, so no model reads it; {UNUSED[column]}."
            for column, n in self.unused.items()
        ]
        if self.marked:
            warnings.append(
                f"{self.marked} rows mark turns before the last reply for training (weight, train); only the last is "
                "trained: set task.train_on=all where all are meant."
            )
        if warnings:
            self.notes["warnings"] = warnings

    def _count_bad(self) -> None:
        if self.bad:
            self.notes |= {"skipped_rows": len(self.bad), "skipped_list": self.bad[:100]}

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Remove examples from all splits.

        Args:
            reasons: the reason by example id, a sentence each.

        Raises:
            ValueError: bad rows are refused, or no training example is left.
        """
        if not reasons:
            return
        first = next(iter(reasons.values()))
        if self.bad is None:
            raise ValueError(f"{first} task.bad_rows=skip leaves such rows out ({len(reasons)} here).")
        self.splits = {name: without(examples, reasons) for name, examples in self.splits.items()}
        if not self.splits["train"]:
            raise ValueError(f"task.bad_rows=skip leaves no training example, the first for this: {first}")
        self.bad += reasons.values()
        self._count_bad()

    def _split(self, path, name, split, heldout, n_train, n_eval, max_rows) -> dict[str, Sequence[Example]]:
        """The three splits, from one pass over the rows; of unused rows only a digest of the prompt is kept."""
        heldout_rows, bad = FirstExamples(n_eval), None if self.bad is None else list[str]()
        if heldout is not None:
            self._read(heldout_rows, **{"name": None, "split": "test", **heldout}, bad=bad, lenient=True)
        test = examples_of(heldout_rows.parts([n_eval])[0], partial(self._example, lenient=True))
        rows = FirstExamples(None if n_train is None else 2 * n_eval + n_train, without=heldout_rows.keys)
        ids = {e.id for e in test}  # two files may have the same name, which is in ids
        shared_ids = self._read(rows, path, name, split, bad=self.bad, max_rows=max_rows, ids=ids)
        if self.bad is not None and bad:
            self.bad.extend(bad)
        n_distinct = rows.distinct
        self.notes["repeated_prompts"] = rows.read - n_distinct
        self.repeats = [*heldout_rows.repeats("held-out rows"), *rows.repeats("rows")]
        test = [replace(e, id=f"heldout/{e.id}") if e.id in shared_ids else e for e in test]
        n_heldout = min(n_eval, max(1, n_distinct // 10))
        if heldout is not None:
            rows.check_left(f"task.path={path}", f"task.heldout.path={heldout['path']}")
            validation, train = (examples_of(part, self._example) for part in rows.parts([n_heldout, n_train]))
            return {"train": train, "validation": validation, "test": test}
        if n_distinct < 3:
            raise ValueError(f"task.path={path} has {n_distinct} distinct prompt{'s' * (n_distinct != 1)}; the splits need 3.")
        test, validation, train = (examples_of(part, self._example) for part in rows.parts([n_heldout, n_heldout, n_train]))
        return {"train": train, "validation": validation, "test": test}

    def _read(
        self,
        selection: FirstExamples,
        path: str,
        name: str | None,
        split: str,
        bad: list[str] | None,
        lenient: bool = False,
        max_rows: int | None = None,
        ids: Set[str] = frozenset(),
    ) -> set[str]:
        """Add all rows to a selection; returns those of `ids` that a row has whose prompt is new."""
        digest_of_plain = plain_digest(self.columns, self.system, self.verifies and not self.reads_example)
        columns = needed(self.columns, self.reads_example)
        places: dict[str, str] = {}
        errors: list[str] = []  # rows that give no example
        numbers: dict[str, int] = {}
        described = lenient  # a line on the columns of the training rows is enough
        unusual, before, id_column = frozenset(UNUSED), selection.read, self.columns.get("id")
        for place, row in iter_rows(path, name, split, bad, max_rows):
            try:
                prepared = row if self.prepare is None else self._prepare(place, row)
                if prepared is None:
                    continue
                if not described:
                    described, sentence = True, mapping(prepared, self.columns, place)
                    self.notes |= {} if sentence is None else {"columns": sentence}
                example, digest = None, digest_of_plain(prepared)
                if digest is None:
                    example = self._example(place, prepared, lenient)
                    digest = digest_of(example)
                    self.marked += self.train_on == "last" and marked(example.messages)
                if id_column is not None or ids:
                    own = example.id if example else place if id_column is None else str(prepared[id_column])
                    check_id(own, place, id_column, places)
                    if own in ids:
                        numbers[own] = selection.number(digest)
                if not unusual.isdisjoint(prepared):
                    self.unused.update(unread(prepared, self.columns))
            except ValueError as error:
                if bad is None:
                    raise
                errors.append(str(error))
                continue
            if selection.add(digest):
                selection.keep(packed(place, prepared, columns) or example or self._example(place, prepared, lenient))
        if bad is not None:
            bad.extend(errors)
        if selection.read == before:
            raise ValueError(f"task.path={path}: {no_rows(bad)}")
        return selection.new_ones(numbers)

    def _prepare(self, place: str, row: Row) -> Row | None:
        try:
            return self.prepare(row)  # type: ignore[misc]
        except Exception as error:
            columns = ", ".join(row)
            raise ValueError(
                f"{place}: task.prepare raised {type(error).__name__} ({error}); columns are {columns}. It must take every "
                "row, or return None to leave one out."
            ) from error

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of "train", "validation" or "test"."""
        return self.splits[split]

    def verify(self, example: Example, completion: str) -> Verdict:
        """The verifier's verdict; wrong without a verifier, or after the time limit."""
        if self.verifier is None:
            return Verdict(0.0)
        try:
            with time_limit(self.verify_seconds):
                if self.reads_example:
                    return self.verifier(example, completion)  # type: ignore[arg-type]
                return self.verifier(completion, example.extra["answer"])
        except VerifierTimeout:
            return Verdict(0.0)

    def _example(self, place: str, row: Row, lenient: bool = False) -> Example:
        # Held-out rows of public data sets often lack what only training needs.
        optional = ("completion", "demonstration", "solution") if lenient else ()
        columns = all_columns(row, self.columns, place)
        parts = {
            part: check_utf8(part_of(row, part, column, place, part in optional), f"{place}: task.columns.{part}={column}")
            for part, column in columns.items()
        }
        turns = chat(parts["prompt"], place)
        answers = replies(parts.get("completion"), "completion", place)
        messages, reference = learning(turns, answers, self.train_on, place)
        row_system = text(parts.get("system"), "system", place)
        if messages[0]["role"] != "system" and (system := row_system or self.system):
            messages = [{"role": "system", "content": system}, *messages]
        elif row_system and row_system != messages[0]["content"]:
            raise ValueError(f"{place}: task.columns.system and the chat give two system prompts; leave one out.")
        completion = reference[0]["content"] if is_text(reference) else None
        demonstration, solution = (transcript(replies(parts.get(part), part, place)) for part in ("demonstration", "solution"))
        answer = text(parts.get("answer"), "answer", place)
        if self.verifies and not self.reads_example and answer is None:
            raise ValueError(
                f"{place}: has no answer for task.verifier to compare with; map it (task.columns.answer=<column>)."
            )
        return Example(
            id=text(parts.get("id"), "id", place) or place,
            messages=messages,
            completion=completion,
            demonstration=demonstration or transcript(reference),
            solution=solution or transcript(reference),
            skill=text(parts.get("skill"), "skill", place) or "new",
            extra=(cells(row) if self.reads_example else {}) | ({} if answer is None else {"answer": answer}),
            turns=None if completion is not None or not reference else reference,
            tools=tools_of(parts.get("tools", row.get("tools")), place),
        )
