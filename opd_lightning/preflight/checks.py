"""What `opd_lightning.check` finds out, one function per question; each yields findings."""

from collections.abc import Iterator
from statistics import quantiles

import torch
from omegaconf import DictConfig, OmegaConf

from opd_lightning.config.trainer_arguments import epochs_of
from opd_lightning.evaluation import TeacherAccuracy
from opd_lightning.models import Student
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.findings import Finding
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example
from opd_lightning.utils.vocabulary import Overlap, Words, differences, overlap


def models(parts: Components) -> Iterator[Finding]:
    """Do student and teacher mean the same by a token, and end where the other would?"""
    mine, tokenizer = parts.model, parts.tokenizer
    state, text = rows(parts.renderer.words, mine.words())
    yield Finding("tokenizer", state, f"{mine.path}: {text}; EOS {tokenizer.eos_token!r}, PAD {tokenizer.pad_token!r}")
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
        found = overlap(tokenizer.get_vocab(), other.get_vocab())
        unlike = [
            what
            for what, same in (
                ("vocabulary", found.same),
                ("EOS", other.eos_token_id == tokenizer.eos_token_id),
                ("special tokens", set(other.all_special_ids) == set(tokenizer.all_special_ids)),
                ("chat template", other.chat_template == tokenizer.chat_template),
            )
            if not same
        ]
        fatal = bool(found.unlike) or source.words() < found.shared.size
        text = f"{source.path}: {source.words()} logits"
        if "EOS" in unlike:
            text += (
                "; another EOS: completions may never end as the teacher would end them, choose its instruction-tuned sibling"
            )
        text += (
            f"; differs in {', '.join(unlike)}" if unlike else "; the same vocabulary, EOS, special tokens and chat template"
        )
        if left_out := found.describe("the student", name):
            text += f"; compared on {found.shared.count} words, left out: {left_out}"
        if fatal:
            text += f"; {differences(found)}" if found.unlike else ""
            text += f"; choose a teacher that knows the student's {found.shared.count} words"
        yield Finding(f"{name}'s tokenizer", "fail" if fatal else "warn" if unlike else "pass", text)
        if found.mine and not fatal:
            yield from unreadable(name, teacher.context, found, parts)


def rows(words: Words, size: int) -> tuple[str, str]:
    """Do the rows of an output layer fit the words of a tokenizer? The state of a finding, and its text."""
    text = f"{words.count} words"
    if size < words.size:
        more = f", the last with the id {words.size - 1}" if words.absent else ""
        text += f"{more}, and the model knows {size}; give the model's own tokenizer, or a model for all of its words"
        return "fail", text
    if size > words.size:
        text += f", padded to {size}: rows from {words.size} on are neither sampled nor compared"
    if not words.absent:
        return "pass", text
    first = ", ".join(map(str, words.absent[:3]))
    return "warn", f"{text}; {len(words.absent)} ids in between have no word ({first} first) and are left out as well"


def unreadable(name: str, context: NoContext, found: Overlap, parts: Components) -> Iterator[Finding]:
    """Can a teacher that lacks some of the student's words read its prompts, and the end of a completion?"""
    chat = context(parts.examples[0])
    ids = [] if chat is None else parts.renderer.with_options(context.template_options).render(chat).token_ids
    missing = [
        i for i, known in zip(ids, found.shared.known(torch.tensor(ids, dtype=torch.long)).tolist(), strict=True) if not known
    ]
    if missing:
        tokens = ", ".join(sorted({repr(parts.tokenizer.convert_ids_to_tokens(i)) for i in missing}))
        text = f"they hold {tokens}, which {name} lacks, so it can say nothing behind; choose another teacher or chat template"
        yield Finding(f"{name}'s words", "fail", text)
    elif not found.shared.known(torch.tensor([parts.tokenizer.eos_token_id])).all():
        text = (
            f"{name} lacks the end token {parts.tokenizer.eos_token!r}: it cannot teach where to end; choose its chat sibling"
        )
        yield Finding(f"{name}'s words", "warn", text)


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


def probe(parts: Components, student: Student, n: int = 10) -> Iterator[Finding]:
    """Ten held-out prompts: is the teacher, with what it is shown, better than the student?"""
    teacher = parts.teachers.get("teacher")
    if teacher is None or not parts.task.verifies or not teacher.writes or teacher.context.reads_attempts:
        yield Finding("teacher", "pass", "not probed: there is none that could write and be judged before training")
        return
    parts.generator.update_weights(student, 0)
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
