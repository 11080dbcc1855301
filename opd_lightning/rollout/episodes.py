"""Episodes: turns of the student and an environment, for all episodes of a batch at once."""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from opd_lightning.contracts import Environment, Generator
from opd_lightning.rollout.stepping import begun, checked_turns, closed, judged, stepped, tried
from opd_lightning.types import Completion, Example, Messages, Rendered, Sample, SamplingParams, Verdict
from opd_lightning.utils.dtypes import real_dtype
from opd_lightning.utils.seeds import derive_seed
from opd_lightning.utils.threads import Failed

log = logging.getLogger(__name__)

MAX_TURNS = 1000
"""An environment that never ends is stopped after so many replies, if neither the limit of tokens nor the window does it."""
FAILED = "the environment failed: "
"""Begins the feedback of an episode whose environment has failed."""


@dataclass
class Episode:
    """One running conversation; lists are of the tokens after the prompt."""

    example: Example
    group: int
    environment: Environment
    messages: Messages
    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    trainable: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    finish_reason: str | None = None
    policy_version: int | None = None
    tools: list[dict[str, Any]] | None = None
    failure: str | None = None
    begun: bool = True
    turn_verdicts: list[Verdict | None] = field(default_factory=list)
    exchanges: list[Messages] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], trainable: bool, logprobs: Sequence[float] | None = None) -> None:
        """Add tokens of the student, with their log-probabilities, or of the environment."""
        self.token_ids += token_ids
        self.trainable += [trainable] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids) if logprobs is None else list(logprobs)

    @property
    def last_reply(self) -> list[int]:
        """Token ids of the student's last reply."""
        gaps = [i for i, own in enumerate(self.trainable) if not own]
        return self.token_ids[gaps[-1] + 1 if gaps else 0 :]

    def replies(self, length: int) -> int:
        """The number of replies in so many tokens."""
        own = self.trainable[:length]
        return sum(now and not before for now, before in zip(own, [False, *own], strict=False))

    def fail(self, text: str) -> None:
        """End the episode with a verdict of failure, which keeps the text."""
        self.failure, self.finish_reason = text, "environment"
        self.verdict = Verdict(0.0, feedback=f"{FAILED}{text}")
        log.warning(f"warning: an episode of example {self.example.id} failed in its environment: {text}")

    def metrics(self, length: int) -> dict[str, float]:
        """Numbers of the episode: turns, tokens of the environment, whether it failed, and the environment's own."""
        own = self.trainable[:length]
        numbers = {
            "turns": self.replies(length),
            "environment_tokens": length - sum(own),
            "failed": float(self.failure is not None),
        }
        return numbers | dict(getattr(self.environment, "metrics", {}))


class Episodes:
    """Plays a batch of episodes.

    Args:
        environment: makes a new environment for each sample.
        renderer: the student's.
        sampling: of each reply; max_new_tokens is the limit of all replies of an episode together.
        mask_truncated: leave episodes that ran into the limit out of the loss.
        window: of the model; an episode ends with reason "length" where the next reply would begin behind it.
    """

    def __init__(
        self,
        environment: Callable[[], Environment],
        renderer: Any,
        sampling: SamplingParams,
        mask_truncated: bool,
        window: int | None = None,
    ):
        self.environment, self.renderer, self.sampling, self.mask_truncated = environment, renderer, sampling, mask_truncated
        self.window = sys.maxsize if window is None else window

    def play(self, examples: Sequence[Example], seed: int, generator: Generator) -> list[Sample]:
        """`sampling.n` samples of each example, those of one example adjacent.

        Raises:
            ValueError: every episode failed.
        """
        return refuse_failures(self.play_some(examples, seed, generator))

    def play_some(self, examples: Sequence[Example], seed: int, generator: Generator) -> list[Sample]:
        """The samples of `play`, which may all have failed."""
        episodes = self.begin([(e, group) for group, e in enumerate(examples) for _ in range(self.sampling.n)])
        try:
            self.play_all(episodes, seed, generator)
        finally:
            closed([episode.environment for episode in episodes])
        return [self.sample(episode) for episode in episodes]

    def play_all(self, episodes: Sequence[Episode], seed: int, generator: Generator) -> None:
        """Take turns until every episode has ended."""
        for turn in range(MAX_TURNS):
            active = [episode for episode in episodes if episode.finish_reason is None]
            if not active:
                break
            # The largest remaining limit is that of the batch; replies of the other episodes are truncated to theirs.
            limits = [self.limit(episode) for episode in active]
            prompts = [Rendered([*episode.prompt, *episode.token_ids]) for episode in active]
            sampling = replace(self.sampling, max_new_tokens=max(limits), n=1)
            drawn = seed if turn == 0 else derive_seed(seed, "turn", turn)
            done = generator.generate(prompts, sampling, drawn)
            going = [
                pair
                for episode, limit, reply in zip(active, limits, done, strict=True)
                if (pair := self.reply(episode, truncate(reply, limit))) is not None
            ]
            self.answer(going, derive_seed(seed, "answers", turn))

    def limit(self, episode: Episode) -> int:
        """The tokens that the next reply may have."""
        room = self.window - len(episode.prompt) - len(episode.token_ids)
        return min(self.sampling.max_new_tokens - sum(episode.trainable), room)

    def begin(self, rows: Sequence[tuple[Example, int]]) -> list[Episode]:
        """New episodes with their environments' first messages, one for each example and group.

        Where an environment cannot begin, the student replies to the example's own chat once, and does not learn from it.
        """
        environments = [self.environment() for _ in rows]
        found = begun(environments, [example for example, _ in rows])
        return [self.first(*row, one, messages) for row, one, messages in zip(rows, environments, found, strict=True)]

    def first(self, example: Example, group: int, environment: Environment, messages: Messages | Failed) -> Episode:
        """A new episode with its first messages, or with the example's own where the environment has failed."""
        tools, failed = getattr(environment, "tools", None) or example.tools, isinstance(messages, Failed)
        chat = example.messages if isinstance(messages, Failed) else messages
        shown = replace(example, messages=chat, tools=tools)  # teachers add their context to these messages
        prompt = self.renderer.render(chat, *([tools] if tools else [])).token_ids
        episode = Episode(shown, group, environment, chat, prompt, tools=tools, begun=not failed)
        if isinstance(messages, Failed):
            episode.failure = messages.text
        elif self.limit(episode) < 1:
            text = f"its first messages are {len(prompt)} tokens of the model's window of {self.window}, so no reply fits"
            return self.first(example, group, environment, Failed(text))
        return episode

    def reply(self, episode: Episode, completion: Completion) -> tuple[Episode, str] | None:
        """Add the student's reply; returns its text where the environment answers it."""
        episode.add(completion.token_ids, True, completion.logprobs)
        episode.policy_version = completion.policy_version
        if episode.failure is not None:
            episode.fail(episode.failure)
            return None
        if completion.finish_reason == "length":
            episode.finish_reason = "length"
            return None
        if not getattr(episode.environment, "keeps_special_tokens", False):
            return episode, self.renderer.decode(completion.token_ids)
        own = [token for token in completion.token_ids if token not in self.renderer.end_ids]
        return episode, str(self.renderer.tokenizer.decode(own, skip_special_tokens=False))

    def answer(self, replies: Sequence[tuple[Episode, str]], seed: int) -> None:
        """Add the environments' answers to replies, where these are drawn from the seed."""
        found = stepped([episode.environment for episode, _ in replies], [text for _, text in replies], seed)
        for (episode, text), result in zip(replies, found, strict=True):
            if isinstance(result, Failed):
                episode.fail(result.text)
                continue
            answers, verdict = result
            episode.turn_verdicts.append(verdict)
            if answers:
                self.go_on(episode, text, answers)
            elif isinstance(whole := judged(episode.environment, self.renderer.decode(episode.last_reply)), Failed):
                episode.fail(whole.text)
            else:
                episode.finish_reason, episode.verdict = "stop", verdict if whole is None else whole

    def go_on(self, episode: Episode, text: str, answers: Messages) -> None:
        """Add the environment's messages, up to where the next reply begins."""
        message = getattr(episode.environment, "message", None)
        turn = {"role": "assistant", "content": text} if message is None else tried(lambda: checked_turns([message(text)])[0])
        if isinstance(turn, Failed):
            episode.fail(turn.text)
            return
        more = [episode.tools] if episode.tools else []
        episode.add(self.renderer.between(episode.messages, text if message is None else turn, answers, *more), False)
        episode.messages = [*episode.messages, turn, *answers]
        episode.exchanges.append([turn, *answers])
        if self.limit(episode) < 1:
            episode.finish_reason = "length"

    def sample(self, episode: Episode) -> Sample:
        """The episode as one sequence; a last answer without a reply is left out."""
        last = max(i for i, own in enumerate(episode.trainable) if own) + 1
        n = len(episode.prompt)
        sampled = self.sampling.temperature > 0
        reason = episode.finish_reason or "environment"
        if episode.verdict is None and getattr(episode.environment, "judges", False):
            episode.verdict = Verdict(0.0, feedback="the episode did not end")
        return Sample(
            example=episode.example,
            group=episode.group,
            token_ids=torch.tensor([*episode.prompt, *episode.token_ids[:last]], dtype=torch.long),
            loss_mask=torch.tensor([False] * n + episode.trainable[:last]),
            prompt_length=n,
            source="student",
            finish_reason=reason,  # type: ignore[arg-type]
            logprobs=torch.tensor([0.0] * n + episode.logprobs[:last], dtype=real_dtype()) if sampled else None,
            verdict=episode.verdict,
            policy_version=episode.policy_version,
            include_in_loss=episode.begun and (not self.mask_truncated or reason != "length"),
            metrics=episode.metrics(last),
            turns=[turn for exchange in episode.exchanges[: episode.replies(last) - 1] for turn in exchange],
            turn_verdicts=tuple(episode.turn_verdicts) if any(episode.turn_verdicts) else (),
            environment_flops=int(getattr(episode.environment, "flops", 0)),
        )


def refuse_failures(samples: list[Sample]) -> list[Sample]:
    """The samples of episodes; raises ValueError if all of them failed in their environments."""
    if samples and all(sample.metrics.get("failed") for sample in samples):
        first = str(samples[0].verdict.feedback if samples[0].verdict else "").removeprefix(FAILED)
        raise ValueError(f"every episode failed in its environment, the first for this: {first}; mend it.")
    return samples


def truncate(completion: Completion, limit: int) -> Completion:
    """The completion, truncated to at most `limit` tokens."""
    if len(completion.token_ids) <= limit:
        return completion
    logprobs = None if completion.logprobs is None else completion.logprobs[:limit]
    return Completion(completion.token_ids[:limit], "length", logprobs, completion.policy_version)
