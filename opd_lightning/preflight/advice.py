"""Advice: what each teacher and context would tell this student, measured on a few of its own completions before training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from opd_lightning.config import build
from opd_lightning.data.batching import collate, pack
from opd_lightning.losses.advantages import leave_one_out, reinforce
from opd_lightning.losses.diagnostics import diagnose_views
from opd_lightning.losses.divergences import reverse_kl, total_variation
from opd_lightning.losses.head import head_loss
from opd_lightning.losses.policy_gradient import PolicyGradient
from opd_lightning.losses.shared import view
from opd_lightning.losses.vocab_support import FullVocabulary, SampledToken, TopK
from opd_lightning.models import Student
from opd_lightning.preflight.components import Components
from opd_lightning.rollout import StudentRollout
from opd_lightning.teachers import frozen
from opd_lightning.teachers.reading import prompts_of
from opd_lightning.types import Example, Prompts, Rendered, Sample, SamplingParams, Tokens, Verdict

SAMPLES = 4
"""Completions per prompt, whose verdicts are compared."""


@dataclass(frozen=True)
class Advice:
    """What one candidate would tell the student.

    Attributes:
        candidate: "teacher", or "context=solution".
        shown: share of the completions that it has a target for.
        accuracy, student_accuracy: of greedy answers to the same prompts; None if it cannot write, or nothing judges.
        reverse_kl, forward_kl: mean KL(S || T) and KL(T || S), nats per token; of a server's top k, and over the outcomes that
            are compared with another tokenizer, a lower bound; None where single tokens or ranks are compared.
        changed: share of tokens where its first choice is another than the student's; None if it does not say.
        alignment: cosine of its gradient to the verdicts' policy gradient, with respect to the student's last hidden states;
            None where the verdicts are all alike.
        interval: of the alignment, 95 % of resamples of the prompts; see `interval_of`.
        sentence: what this means.
    """

    candidate: str
    sentence: str
    shown: float = 0.0
    accuracy: float | None = None
    student_accuracy: float | None = None
    reverse_kl: float | None = None
    forward_kl: float | None = None
    changed: float | None = None
    alignment: float | None = None
    interval: tuple[float, float] = (-1.0, 1.0)


def advise(parts: Components, student: Student, contexts: Mapping[str, DictConfig], prompts: int = 12) -> list[Advice]:
    """Advice on the configured teacher, on each of its parts, and on its weights behind each of the contexts.

    Without a teacher the start model is asked, behind the contexts.

    Args:
        contexts: nodes of the configuration by option, such as "solution".
        prompts: training prompts to complete, `SAMPLES` times each.
    """
    parts.generator.update_weights(student, 0)
    examples = list(parts.examples[:prompts])
    samples = judged(parts, written(parts, examples, SAMPLES, 1.0))
    own = greedy(parts, examples)
    return [weigh(parts, student, samples, own, name, make) for name, make in candidates(parts, student, contexts)]


def candidates(
    parts: Components, student: Student, contexts: Mapping[str, DictConfig]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of the candidates, and functions that make them, which raise ValueError where one cannot be made."""
    teacher = parts.teachers.get("teacher")
    if teacher is not None:
        parts_of = list(teacher.parts)
        for i, part in enumerate([teacher, *(parts_of if len(parts_of) > 1 else ())]):
            yield f"teacher {i}" if i else "teacher", partial(lambda one: one, part)
    else:
        teacher = frozen()
        teacher.setup(student, parts.renderer)
    for name, node in contexts.items():

        def behind(node: DictConfig = node) -> Any:
            """The teacher's weights behind a context."""
            reader = teacher.behind(build(node))
            reader.setup(student, parts.renderer)
            return reader

        yield f"context={name}", behind


def weigh(
    parts: Components, student: Student, samples: list[Sample], own: Mapping[str, float], name: str, make: Callable[[], Any]
) -> Advice:
    """The advice on one candidate."""
    try:
        teacher = make()
        reads = prompts_of(teacher, samples) if teacher.reads_context else [[]] * len(samples)
        numbers = compare(parts, student, samples, teacher)
    except ValueError as error:
        return Advice(name, f"it cannot be asked: {error}")
    shown = [ids is not None for ids in reads]
    if not any(shown):
        return Advice(name, "this context has nothing to show on these completions.")
    accuracy = student_accuracy = None
    if parts.task.verifies:
        first = {samples[b].example.id: b for b in reversed(range(len(samples))) if shown[b]}
        rendered = [Rendered(reads[b] or samples[b].token_ids[: samples[b].prompt_length].tolist()) for b in first.values()]
        texts = answers_of(parts, teacher, rendered)
        if texts is not None:
            right = [right_of(parts.task.verify(samples[b].example, t)) for b, t in zip(first.values(), texts, strict=True)]
            accuracy, student_accuracy = mean(right), mean([own[example] for example in first])
    found = Advice(name, "", mean(map(float, shown)), accuracy, student_accuracy, **numbers)
    return replace(found, sentence=sentence(found))


def answers_of(parts: Components, teacher: Any, prompts: Sequence[Rendered]) -> list[str] | None:
    """The teacher's greedy answers as text; None if it cannot write. With another tokenizer it writes tokens of its own."""
    greedily = SamplingParams(parts.task.max_new_tokens, temperature=0.0)
    if hasattr(teacher, "answers"):
        texts: list[str] | None = teacher.answers(prompts, greedily)
        return texts
    if not teacher.writes:
        return None
    answers, _ = teacher.write(prompts, greedily, 0, parts.generator)
    return parts.renderer.decode_all([answer.token_ids for answer in answers])


def sentence(found: Advice) -> str:
    """What the numbers mean, the gravest first."""
    in_context = found.candidate.startswith("context=")
    teacher = "with this context the teacher" if in_context else "this teacher"
    if found.reverse_kl is not None and abs(found.reverse_kl) < 1e-3 and (found.changed or 0.0) < 0.01:
        return f"{'this context' if in_context else 'this teacher'} leaves the distribution as it is."
    gap = None if found.accuracy is None or found.student_accuracy is None else found.accuracy - found.student_accuracy
    if gap is not None and gap < 0:
        return f"{teacher} is wrong more often than the student."
    quality = {None: "was not judged", True: "is right more often than the student", False: "is right as often as the student"}
    if found.alignment is None:
        direction = "the verdicts are all alike, so nothing says whether its gradient improves them"
    elif found.interval[0] <= 0 <= found.interval[1]:
        direction = "whether its gradient goes where the verdicts do cannot be told from these prompts"
    else:
        direction = (
            f"its gradient {'goes where the verdicts do' if found.alignment > 0 else 'points away from what they reward'}"
        )
    return f"{teacher} {quality[None if gap is None else gap > 0]}; {direction}."


def compare(parts: Components, student: Student, samples: list[Sample], teacher: Any) -> dict[str, Any]:
    """Mean KLs, changed first choices, and the alignment of the gradients, on the tokens that have a target."""
    device = student.lm.device
    tokens, scores = pack(samples, device), teacher.score(samples)
    valid = torch.ones_like(tokens.weight) if scores.valid is None else scores.valid.to(tokens.weight)
    tokens = Tokens(tokens.ids, tokens.position, valid / valid.sum().clamp_min(1), tokens.sample)
    with student.eval_mode():
        hidden = student.hidden(collate(samples, parts.tokenizer.pad_token_id, device))
    exact = {"full": FullVocabulary(), "topk": TopK(min(teacher.top_k or 16, 16)), "sampled": SampledToken()}
    support: Any = next(exact[kind] for kind in exact if kind in teacher.provides)
    named = all(getattr(part.alignment, "names_tokens", True) for part in teacher.parts)
    divergence = reverse_kl if named else total_variation  # ranks have zeros, where a KL is infinite

    def taught(logits: Tensor, targets: Mapping[str, Any], rows: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The divergence from the candidate, with the diagnostics."""
        log_s = logits.log_softmax(-1)
        seen = {"teacher": view(logits, log_s, targets["teacher"].log_probs(1.0), rows)}
        own = seen["teacher"]
        value = support(divergence, own.log_s, own.target, own.tokens)
        value = value if own.target.valid is None else torch.where(own.target.valid, value, 0.0)
        return value, diagnose_views(log_s.detach(), seen, rows)

    def gradient(loss: Any, rows: Tokens, targets: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient [N, H] of a loss, and its statistics."""
        leaf = hidden.detach().requires_grad_()
        total, stats = head_loss(leaf, student.head, rows, targets, loss, student.chunk)
        return torch.autograd.grad(total, leaf)[0], stats

    toward, stats = gradient(taught, tokens, {"teacher": scores})
    counted = valid.bool()
    average = {key: stats[key][counted].mean().item() for key in stats if counted.any()}
    alignment, interval = None, (-1.0, 1.0)
    advantages = advantages_of(samples)
    if advantages is not None and counted.any():
        rewarded = Tokens(
            tokens.ids, tokens.position, tokens.weight, tokens.sample, advantage=advantages.to(device)[tokens.sample]
        )
        policy = PolicyGradient(leave_one_out, clip=None)
        verdicts, _ = gradient(lambda logits, _, rows: policy(logits.log_softmax(-1), rows), rewarded, {})
        groups = torch.tensor([sample.group for sample in samples], device=device)[tokens.sample]
        alignment, interval = interval_of(toward.double(), verdicts.double(), groups)
    agreed = average.get("top1_agreement")
    found = {
        kl: next((average[name] for name in (kl, f"{kl}_shared", f"{kl}_topk") if name in average), None)
        for kl in ("reverse_kl", "forward_kl")
    }
    return {
        "reverse_kl": average.get("log_ratio") if found["reverse_kl"] is None else found["reverse_kl"],
        "forward_kl": found["forward_kl"],
        "changed": None if agreed is None else 1 - agreed,
        "alignment": alignment,
        "interval": interval,
    }


def interval_of(one: Tensor, other: Tensor, groups: Tensor, resamples: int = 1000) -> tuple[float, tuple[float, float]]:
    """The cosine of two gradients [N, H], and the middle 95 % of it over resamples of the prompts.

    With fewer than three prompts whose verdicts differ nothing is known: the interval is (-1, 1).

    Args:
        groups [N]: the prompt of each token.
    """
    prompts, index = groups.unique(return_inverse=True)
    products = torch.stack([one * other, one.square(), other.square()]).sum(-1)  # [3, N]
    sums = products.new_zeros(3, len(prompts)).index_add(1, index, products).cpu()

    def cosine(total: Tensor) -> Tensor:
        return total[0] / (total[1] * total[2]).sqrt().clamp_min(1e-300)

    found = cosine(sums.sum(1)).item()
    if int((sums[2] > 0).sum()) < 3:
        return found, (-1.0, 1.0)
    drawn = torch.randint(len(prompts), (resamples, len(prompts)), generator=torch.Generator().manual_seed(0))
    low, high = cosine(sums[:, drawn].sum(-1)).quantile(torch.tensor([0.025, 0.975], dtype=sums.dtype)).tolist()
    return found, (low, high)


def advantages_of(samples: Sequence[Sample]) -> Tensor | None:
    """Advantages [B] over the prompt's other completions, else over all others; None where no verdicts differ."""
    if any(sample.verdict is None for sample in samples):
        return None
    rewards = torch.tensor([sample.verdict.content for sample in samples if sample.verdict]).view(-1, SAMPLES)
    found = leave_one_out(rewards)
    found = found if found.any() else reinforce(rewards)
    return found.flatten() if found.any() else None


def written(parts: Components, examples: Sequence[Example], n: int, temperature: float) -> list[Sample]:
    """The student's completions of training prompts, n of each."""
    rollout = StudentRollout(parts.renderer, SamplingParams(parts.task.max_new_tokens, temperature), num_generations=n)
    prompts = Prompts(examples, [parts.renderer.render(example.messages) for example in examples])
    return rollout(prompts, 0, parts.generator, {}).samples


def judged(parts: Components, samples: list[Sample]) -> list[Sample]:
    """The samples with the task's verdicts, if it gives any."""
    if not parts.task.verifies:
        return samples
    texts = parts.renderer.decode_all([sample.reply_ids for sample in samples])
    verdicts = [parts.task.verify(sample.example, text) for sample, text in zip(samples, texts, strict=True)]
    return [Sample(**{**vars(sample), "verdict": verdict}) for sample, verdict in zip(samples, verdicts, strict=True)]


def greedy(parts: Components, examples: Sequence[Example]) -> dict[str, float]:
    """Whether the student's greedy answer is right, by the example's id; empty without a verifier."""
    if not parts.task.verifies:
        return {}
    rendered = [parts.renderer.render(example.messages) for example in examples]
    answers = parts.generator.generate(rendered, SamplingParams(parts.task.max_new_tokens, temperature=0.0), 0)
    texts = parts.renderer.decode_all([answer.token_ids for answer in answers])
    return {e.id: right_of(parts.task.verify(e, text)) for e, text in zip(examples, texts, strict=True)}


def right_of(verdict: Verdict) -> float:
    """1 for a right answer, else 0."""
    return float(verdict.content >= 1.0)


def mean(values: Any) -> float:
    """The mean of numbers."""
    listed = list(values)
    return sum(listed) / max(len(listed), 1)
