"""The checks of `opd_lightning.check` on a run's components; each function yields results."""

from collections.abc import Iterator
from statistics import quantiles

import torch
from omegaconf import DictConfig, OmegaConf

from opd_lightning.config.trainer_arguments import epochs_of, processes_of
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.evaluation import TeacherAccuracy
from opd_lightning.models import Student
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.rendering import as_played
from opd_lightning.preflight.results import CheckResult
from opd_lightning.teachers.base import all_parts
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example
from opd_lightning.utils.vocabulary import Overlap, ValidIds, differences, overlap


def models(parts: Components) -> Iterator[CheckResult]:
    """Check results on the tokenizers of student and teachers: vocabulary, EOS, special tokens and chat template."""
    model, tokenizer = parts.model, parts.tokenizer
    state, text = rows(parts.renderer.valid_ids, model.vocab_size())
    yield CheckResult("tokenizer", state, f"{model.path}: {text}; EOS {tokenizer.eos_token!r}, PAD {tokenizer.pad_token!r}")
    for name, teacher in all_parts(parts.teachers):
        source = teacher.source
        if teacher.aligned:
            yield CheckResult(f"{name}'s tokenizer", "warn", teacher.describe())
            continue
        if source is None:
            yield CheckResult(f"{name}'s tokenizer", "pass", "the student's own")
            continue
        try:
            teacher_tokenizer = source.tokenizer()
        except ValueError as error:  # the teacher's prompt is rendered with the student's tokenizer
            yield CheckResult(f"{name}'s tokenizer", "warn", f"{error} The student's is used.")
            continue
        comparison = overlap(tokenizer.get_vocab(), teacher_tokenizer.get_vocab())
        differing = [
            part
            for part, same in (
                ("vocabulary", comparison.same),
                ("EOS", teacher_tokenizer.eos_token_id == tokenizer.eos_token_id),
                ("special tokens", set(teacher_tokenizer.all_special_ids) == set(tokenizer.all_special_ids)),
                ("chat template", teacher_tokenizer.chat_template == tokenizer.chat_template),
            )
            if not same
        ]
        fatal = bool(comparison.conflicts) or source.vocab_size() < comparison.shared.size
        text = f"{source.path}: {source.vocab_size()} logits"
        if "EOS" in differing:
            text += (
                "; another EOS: completions may never end as the teacher would end them, choose its instruction-tuned sibling"
            )
        text += (
            f"; differs in {', '.join(differing)}"
            if differing
            else "; the same vocabulary, EOS, special tokens and chat template"
        )
        if excluded := comparison.describe("the student", f"the {name}"):
            text += f"; compared on {comparison.shared.count} tokens, left out: {excluded}"
        if fatal:
            text += f"; {differences(comparison)}" if comparison.conflicts else ""
            text += f"; choose a teacher that has the student's {comparison.shared.count} tokens"
        yield CheckResult(f"{name}'s tokenizer", "fail" if fatal else "warn" if differing else "pass", text)
        if comparison.student_only and not fatal:
            yield from missing_tokens(name, teacher.context, comparison, parts)


PADDING = (1024, 0.1)
"""Rows of an output layer without a token, and their share, of which the padding of published models does not exceed both."""


def rows(valid_ids: ValidIds, size: int) -> tuple[str, str]:
    """The state and text of a result on the rows of an output layer against the tokens of a tokenizer."""
    text = f"{valid_ids.count} tokens"
    if size < valid_ids.size:
        last_id = f", the last with the id {valid_ids.size - 1}" if valid_ids.absent else ""
        text += f"{last_id}, and the model has {size}; give the model's own tokenizer, or a model for all of its tokens"
        return "fail", text
    if size > valid_ids.size:
        text += f", padded to {size}: rows from {valid_ids.size} on are neither sampled nor compared"
    state = "pass"
    if size - valid_ids.size > max(PADDING[0], PADDING[1] * size):
        state = "warn"
        text += "; so few tokens do not fit the model: give the model's own tokenizer, unless it is padded so far"
    if not valid_ids.absent:
        return state, text
    first = ", ".join(map(str, valid_ids.absent[:3]))
    return "warn", f"{text}; {len(valid_ids.absent)} ids in between have no token ({first} first) and are left out as well"


def missing_tokens(name: str, context: NoContext, comparison: Overlap, parts: Components) -> Iterator[CheckResult]:
    """Check results on a teacher's prompts and end token, where it lacks some of the student's tokens."""
    example, renderer = parts.examples[0], parts.renderer.with_options(context.template_options)
    chat = context(example)
    ids = [] if chat is None else renderer.render(chat, example.tools).token_ids
    missing = [
        i
        for i, has in zip(ids, comparison.shared.contains(torch.tensor(ids, dtype=torch.long)).tolist(), strict=True)
        if not has
    ]
    if missing:
        tokens = ", ".join(sorted({repr(parts.tokenizer.convert_ids_to_tokens(i)) for i in missing}))
        text = f"they hold {tokens}, which {name} lacks, so it has no target there; choose another teacher or chat template"
        yield CheckResult(f"{name}'s tokens", "fail", text)
    elif not comparison.shared.contains(torch.tensor([parts.tokenizer.eos_token_id])).all():
        text = (
            f"{name} lacks the end token {parts.tokenizer.eos_token!r}: it cannot teach where to end; choose its chat sibling"
        )
        yield CheckResult(f"{name}'s tokens", "warn", text)


def lengths(examples: list[Example], renderer: ChatRenderer, context: NoContext) -> list[int]:
    """The lengths of up to 512 prompts, in tokens."""
    chats = [(context(example), example.tools) for example in examples[:512]]
    renderer = renderer.with_options(context.template_options)
    return [len(renderer.render(chat, tools).token_ids) for chat, tools in chats if chat is not None]


def data(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """Check results on the data: training's own checks, prompt lengths against the windows, and batch sizes."""
    counts = parts.preflight()
    near = counts["near_duplicates"]
    text = f"{counts['train']} training and {counts['heldout']} held-out examples, none on both sides"
    text += f", {counts['dropped']} dropped for their length" if counts.get("dropped") else ""
    yield CheckResult("data", "pass", text)
    if near:
        first = counts["near_duplicates_first"][0]
        yield CheckResult(
            "data", "warn", f"{near} training prompts nearly repeat a held-out one, such as {first}; remove them."
        )
    shown = as_played(parts.examples[:512], parts.environment)
    for name, (model, context, renderer) in parts.readers().items():
        tokens = lengths(shown, renderer, context)
        if not tokens:
            yield CheckResult(f"{name}'s prompts", "pass", "are made from attempts, so their length is known in training only")
            continue
        cut = quantiles(tokens, n=20) if len(tokens) > 1 else tokens * 19
        need, window = max(tokens) + parts.rollout.sampling.max_new_tokens, model.window()
        text = f"median {cut[9]:.0f}, 95 % {cut[18]:.0f}, longest {max(tokens)} tokens; with the new ones {need} of {window}"
        yield CheckResult(f"{name}'s prompts", "pass" if need <= window else "fail", text)
    samples, iterations = parts.rollout.sampling.n, parts.rollout.num_iterations
    batch, processes = cfg.data.batch_size, processes_of(cfg.trainer) or 1
    text = f"{batch} prompts x {samples} completions per rollout, {iterations} update{'s' * (iterations > 1)} on each"
    if (steps := parts.bounded(cfg).trainer.max_steps) > 0:
        epochs = batch * steps / iterations / len(parts.examples)
        text += f"; {steps} updates read the data {epochs:.2g} times"
    if processes > 1:
        text += f"; {batch / processes:g} prompts per device"
        if batch % processes:
            nodes = f" x trainer.num_nodes={cfg.trainer.num_nodes}" if cfg.trainer.num_nodes > 1 else ""
            devices = f"trainer.devices={cfg.trainer.devices}{nodes}"
            yield CheckResult("batch", "fail", f"data.batch_size={batch} is no multiple of {devices}; make it one.")
            return
    yield CheckResult("batch", "pass", text)


def updates(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """Check results on the end of the run, where max_steps and max_epochs are both set."""
    steps, epochs, last = cfg.trainer.max_steps, epochs_of(cfg.trainer), parts.bounded(cfg).trainer.max_steps
    if epochs is not None and steps == last:
        without = OmegaConf.merge(cfg, {"trainer": {"max_steps": -1}})
        passes = parts.bounded(without).trainer.max_steps  # type: ignore[arg-type]
        if passes > steps:
            text = f"trainer.max_steps={steps} ends the run before trainer.max_epochs={epochs}, which is {passes} updates"
            yield CheckResult("updates", "warn", f"{text}; trainer.max_steps=-1 leaves it to max_epochs.")
    elif epochs is not None:
        yield CheckResult("updates", "pass", f"trainer.max_epochs={epochs} ends the run at update {last}")


def warmup(parts: Components, cfg: DictConfig) -> Iterator[CheckResult]:
    """Check results on the warm-up, which may outlast the run."""
    steps, last = cfg.optim.warmup_steps, parts.bounded(cfg).trainer.max_steps
    if 0 < last <= steps:
        text = f"optim.warmup_steps={steps} outlasts the run of {last} updates, so the rate never"
        yield CheckResult("warm-up", "warn", f"{text} reaches optim.lr={cfg.optim.lr:g}; lower it, or train longer.")


def verifier(parts: Components, n: int = 64) -> Iterator[CheckResult]:
    """Check results on the verifier, on the first `n` examples: references must be right and empty completions wrong."""
    if not parts.task.verifies:
        yield CheckResult("verifier", "pass", "none; nothing is judged")
        return
    references = [(e, str(e.reference[-1]["content"])) for e in parts.examples if e.reference is not None][:n]
    wrong = [e.id for e, text in references if parts.task.verify(e, text).content < 1]
    empty = [e.id for e in parts.examples[:n] if parts.task.verify(e, "").content > 0]
    if empty:
        yield CheckResult(
            "verifier", "fail", f"an empty completion of example {empty[0]} scores; choose another task.verifier."
        )
    elif wrong and len(wrong) == len(references):
        yield CheckResult(
            "verifier", "fail", f"no reference completion scores 1, example {wrong[0]} first; choose another task.verifier."
        )
    elif wrong:
        text = (
            f"{len(wrong)} of {len(references)} reference completions do not score 1, example {wrong[0]} first; look at them."
        )
        yield CheckResult("verifier", "warn", text)
    else:
        checked = f"{len(references)} references score 1, " if references else "there are no references to judge; "
        yield CheckResult("verifier", "pass", f"{checked}empty completions score 0")


def prompts(parts: Components) -> Iterator[CheckResult]:
    """Check results with the first example's prompt, as text, for student and teachers."""
    example = as_played(parts.examples[:1], parts.environment)[0]
    for name, (_, context, renderer) in parts.readers().items():
        chat = context(example)
        if chat is None:
            yield CheckResult(f"{name} reads", "pass", "a prompt made from attempts, in training")
            continue
        ids = renderer.with_options(context.template_options).render(chat, example.tools).token_ids
        yield CheckResult(f"{name} reads", "pass", str(renderer.tokenizer.decode(ids)))


def probe(parts: Components, student: Student, n: int = 10) -> Iterator[CheckResult]:
    """Check results on the accuracy of the teacher, with its context, and of the student on `n` held-out prompts."""
    teacher = parts.teachers.get("teacher")
    if teacher is None or not parts.task.verifies or not teacher.writes or teacher.context.needs_rollouts:
        yield CheckResult("teacher", "pass", "not probed: no teacher can write and be judged before training")
        return
    parts.generator.update_weights(student, 0)
    accuracy = TeacherAccuracy(parts.task, parts.renderer, parts.task.max_new_tokens, "validation", n)
    estimates = accuracy(student, {"teacher": teacher}, parts.generator)
    if not estimates:
        yield CheckResult("teacher", "pass", "not probed: its context cannot be made for held-out prompts")
        return
    teacher_accuracy, student_accuracy = (
        estimates["teacher/shown/accuracy"].value,
        estimates["teacher/shown/student_accuracy"].value,
    )
    state = "pass" if teacher_accuracy > student_accuracy else "warn"
    remedy = "" if state == "pass" else "; it has little to teach: choose another teacher, or show it more (context)"
    count = estimates["teacher/shown/accuracy"].prompts
    yield CheckResult(
        "teacher",
        state,
        f"right on {teacher_accuracy:.2f} of {count} held-out prompts, the student on {student_accuracy:.2f}{remedy}",
    )
