"""What `opd_lightning.check` finds out, one function per question; each yields findings."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import quantiles

import torch
from omegaconf import DictConfig, OmegaConf

from opd_lightning.config.trainer_arguments import epochs_of
from opd_lightning.evaluation import TeacherAccuracy
from opd_lightning.models import Student
from opd_lightning.preflight.components import Components
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        state: "pass", "warn" or "fail".
        text: what was found; for warn and fail with the remedy.
    """

    name: str
    state: str
    text: str


def settled(found: Iterable[Finding]) -> list[str]:
    """What findings warn of, a sentence each.

    Raises:
        ValueError: all that fails.
    """
    told = [(finding.state, f"{finding.name}: {finding.text}") for finding in found]
    if failed := [text for state, text in told if state == "fail"]:
        raise ValueError(" ".join(failed))
    return [text for state, text in told if state == "warn"]


def models(parts: Components) -> Iterator[Finding]:
    """Do student and teacher mean the same by a token, and end where the other would?"""
    mine, tokenizer = parts.model, parts.tokenizer
    words, size = len(tokenizer), mine.words()
    state = "fail" if size < words else "pass"
    padded = f", padded to {size}" if size > words else f", and the model knows {size}" if size < words else ""
    remedy = "; give the model's own tokenizer, or a model for all of its words" if size < words else ""
    yield Finding(
        "tokenizer",
        state,
        f"{mine.path}: {words} words{padded}, EOS {tokenizer.eos_token!r}, PAD {tokenizer.pad_token!r}{remedy}",
    )
    for name, teacher in all_parts(parts.teachers):
        source = teacher.source
        if source is None:
            yield Finding(f"{name}'s tokenizer", "pass", "the student's own")
            continue
        try:
            other = source.tokenizer()
        except ValueError as error:  # what the teacher is asked behind its own prompt is rendered with the student's tokenizer
            yield Finding(f"{name}'s tokenizer", "warn", f"{error} The student's is used.")
            continue
        unlike = [
            what
            for what, same in (
                ("vocabulary", other.get_vocab() == tokenizer.get_vocab()),
                ("EOS", other.eos_token_id == tokenizer.eos_token_id),
                ("special tokens", set(other.all_special_ids) == set(tokenizer.all_special_ids)),
                ("chat template", other.chat_template == tokenizer.chat_template),
            )
            if not same
        ]
        fatal = "vocabulary" in unlike or source.words() < words
        text = f"{source.path}: {source.words()} logits"
        if "EOS" in unlike:
            text += (
                "; another EOS: completions may never end as the teacher would end them, choose its instruction-tuned sibling"
            )
        text += (
            f"; differs in {', '.join(unlike)}" if unlike else "; the same vocabulary, EOS, special tokens and chat template"
        )
        text += f"; choose a teacher that knows the student's {words} words" if fatal else ""
        yield Finding(f"{name}'s tokenizer", "fail" if fatal else "warn" if unlike else "pass", text)


def lengths(examples: list[Example], parts: Components, context: NoContext) -> list[int]:
    """Tokens of up to 512 prompts."""
    chats = [context(example) for example in examples[:512]]
    words = parts.renderer.with_options(context.template_options)
    return [len(words.render(chat).token_ids) for chat in chats if chat is not None]


def data(parts: Components, cfg: DictConfig) -> Iterator[Finding]:
    """What training would check itself; percentiles of lengths against the windows; and the arithmetic of a batch."""
    found = parts.preflight()
    near = found["near_duplicates"]
    text = f"{found['train']} training and {found['heldout']} held-out examples, none on both sides"
    text += f", {found['dropped']} dropped for their length" if found.get("dropped") else ""
    yield Finding("data", "pass", text)
    if near:
        first = found["near_duplicates_first"][0]
        yield Finding("data", "warn", f"{near} training prompts nearly repeat a held-out one, such as {first}; remove them.")
    for name, (model, context) in parts.readers().items():
        tokens = lengths(list(parts.examples), parts, context)
        if not tokens:
            yield Finding(f"{name}'s prompts", "pass", "are worded from attempts, so their length is known in training only")
            continue
        cut = quantiles(tokens, n=20) if len(tokens) > 1 else tokens * 19
        need, window = max(tokens) + parts.rollout.sampling.max_new_tokens, model.window()
        text = f"median {cut[9]:.0f}, 95 % {cut[18]:.0f}, longest {max(tokens)} tokens; with the new ones {need} of {window}"
        yield Finding(f"{name}'s prompts", "pass" if need <= window else "fail", text)
    samples, iterations = parts.rollout.sampling.n, parts.rollout.num_iterations
    batch, devices = cfg.data.batch_size, cfg.trainer.devices
    text = f"{batch} prompts x {samples} completions per rollout, {iterations} update{'s' * (iterations > 1)} on each"
    if (steps := parts.bounded(cfg).trainer.max_steps) > 0:
        epochs = batch * steps / iterations / len(parts.examples)
        text += f"; {steps} updates read the data {epochs:.2g} times"
    if isinstance(devices, int) and devices > 1:
        text += f"; {batch / devices:g} prompts per device"
        if batch % devices:
            yield Finding("batch", "fail", f"data.batch_size={batch} is no multiple of trainer.devices={devices}; make it one.")
            return
    yield Finding("batch", "pass", text)


def updates(parts: Components, cfg: DictConfig) -> Iterator[Finding]:
    """Which of two horizons ends the run, where both are given."""
    steps, epochs, last = cfg.trainer.max_steps, epochs_of(cfg.trainer), parts.bounded(cfg).trainer.max_steps
    if epochs is not None and steps == last:
        without = OmegaConf.merge(cfg, {"trainer": {"max_steps": -1}})
        passes = parts.bounded(without).trainer.max_steps  # type: ignore[arg-type]
        if passes > steps:
            text = f"trainer.max_steps={steps} ends the run before trainer.max_epochs={epochs}, which is {passes} updates"
            yield Finding("updates", "warn", f"{text}; trainer.max_steps=-1 leaves it to max_epochs.")
    elif epochs is not None:
        yield Finding("updates", "pass", f"trainer.max_epochs={epochs} ends the run at update {last}")


def verifier(parts: Components, n: int = 64) -> Iterator[Finding]:
    """A reference must be right and an empty completion wrong, of the first `n` examples."""
    if not parts.task.verifies:
        yield Finding("verifier", "pass", "none; nothing is judged")
        return
    written = [(e, e.completion) for e in parts.examples if e.completion is not None][:n]
    wrong = [e.id for e, text in written if parts.task.verify(e, text).content < 1]
    empty = [e.id for e in parts.examples[:n] if parts.task.verify(e, "").content > 0]
    if empty:
        yield Finding("verifier", "fail", f"an empty completion of example {empty[0]} scores; choose another task.verifier.")
    elif wrong and len(wrong) == len(written):
        yield Finding(
            "verifier", "fail", f"no reference completion scores 1, example {wrong[0]} first; choose another task.verifier."
        )
    elif wrong:
        text = f"{len(wrong)} of {len(written)} reference completions do not score 1, example {wrong[0]} first; look at them."
        yield Finding("verifier", "warn", text)
    else:
        told = f"{len(written)} references score 1, " if written else "there are no references to judge; "
        yield Finding("verifier", "pass", f"{told}empty completions score 0")


def prompts(parts: Components) -> Iterator[Finding]:
    """The first example as student and teacher would read it."""
    example = parts.examples[0]
    for name, (_, context) in parts.readers().items():
        chat = context(example)
        if chat is None:
            yield Finding(f"{name} reads", "pass", "what attempts tell, worded in training")
            continue
        ids = parts.renderer.with_options(context.template_options).render(chat).token_ids
        yield Finding(f"{name} reads", "pass", str(parts.tokenizer.decode(ids)))


def probe(parts: Components, cfg: DictConfig, n: int = 10) -> Iterator[Finding]:
    """Ten held-out prompts: is the teacher, with what it is shown, better than the student?"""
    teacher = parts.teachers.get("teacher")
    if teacher is None or not parts.task.verifies or not teacher.writes or teacher.context.reads_attempts:
        yield Finding("teacher", "pass", "not probed: there is none that could write and be judged before training")
        return
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    student = Student(parts.model.model(), cfg.logits_chunk_size).to(device)
    student.verify_head(f"model.path={parts.model.path}")
    parts.generator.update_weights(student, 0)
    teacher.setup(student, parts.renderer)
    asked = TeacherAccuracy(parts.task, parts.renderer, parts.task.max_new_tokens, "validation", n)
    found = asked(student, {"teacher": teacher}, parts.generator)
    if not found:
        yield Finding("teacher", "pass", "not probed: its context cannot be worded for held-out prompts")
        return
    told, own = found["teacher/shown/accuracy"].value, found["teacher/shown/student_accuracy"].value
    state = "pass" if told > own else "warn"
    more = "" if state == "pass" else "; it has little to teach: choose another teacher, or show it more (context)"
    asked_n = found["teacher/shown/accuracy"].prompts
    yield Finding("teacher", state, f"right on {told:.2f} of {asked_n} held-out prompts, the student on {own:.2f}{more}")
