"""Episodes beside each other: every turn in one source, answers judged while others still decode.

    with Judging() as judging:
        samples = play(EngineSource(model, tokenizer), jobs, tokenizer, judging=judging)

A turn's tokens are kept as they were drawn. What stands between two turns, the tools' results and the marks around them, is
found by rendering the conversation so far and encoding what follows the last end mark: it begins with a special token, so it
is encoded apart from what precedes it, and nothing the model wrote is ever encoded again.

With a journal, an interrupted call goes on from the very token. Messages are read again from the tokens, the environment
answers the same calls again (it must answer the same), and the turn that was under way is continued (`Turn.begun`). In the
invariant arithmetic the result is that of a call that was never interrupted, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from longreach.chat.messages import Message, Tool
from longreach.chat.modes import EffortTexts, in_mode
from longreach.chat.parser import parse
from longreach.chat.renderer import Prompt, render
from longreach.engine.sampling import FinishReason
from longreach.errors import RequestError
from longreach.evaluate.episode import Job, Journal, Partial, Piece, Sample, Source, Turn
from longreach.evaluate.judging import Judging, was_judged
from longreach.runtime import log
from longreach.tasks.base import Environment, Verdict, wrong
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import ASSISTANT, BOS, EOS, LATEST_REMINDER, USER

AT_ONCE = 512
"""Episodes under way at most. How many of them decode in one pass is the source's affair."""


def play(
    source: Source,
    jobs: Iterable[Job],
    tokenizer: Tokenizer,
    *,
    judging: Judging,
    texts: EffortTexts = "preview",
    journal: Journal | None = None,
    weights: int = 0,
    on_sample: Callable[[Sample], None] | None = None,
    at_once: int = AT_ONCE,
) -> list[Sample]:
    """Make every attempt; returns the samples in the order of the jobs.

    A full window ends an episode with FinishReason.LENGTH and no reward, without a look at what there is; so does a prompt
    that leaves no room. An answer that is malformed goes to its judge as it was read.

    Args:
        jobs: read as places come free, so they may be drawn lazily.
        texts: revision of the effort paragraphs in the prompts.
        journal: written ahead of everything, and asked first what it knows of each job.
        weights: version of the weights, for `Sample.weights`.
        on_sample: called with every sample as soon as it is judged, also with those the journal had.

    Raises:
        RequestError: the source failed, a prompt is beyond the model's context, two jobs have one key, a job sets what is not
            its to set, or an environment answered otherwise than before the interruption.
    """
    return _Playing(source, tokenizer, judging, texts, journal, weights, on_sample).run(iter(jobs), at_once)


def turn_seed(seed: int, number: int) -> int:
    """The seed of an episode's turn `number`: independent of all others, the same at every attempt to play it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8], "big") >> 1


def reply_text(reply: Iterable[Message]) -> str:
    """A reply as one reads it in a list of samples: reasoning in its marks, calls and results on lines of their own."""
    lines: list[str] = []
    for message in reply:
        if message.role == "tool":
            lines.append(f"=> {message.content}")
            continue
        if message.reasoning is not None:
            lines.append(f"<think>{message.reasoning}</think>")
        if message.content:
            lines.append(message.content)
        lines += [f"{call.name}({call.arguments})" for call in message.tool_calls]
    return "\n".join(lines)


class _Playing:
    """One call of `play`.

    Attributes:
        ends: tokens that end a turn of the model: the end mark, and the marks of other turns.
        samples, turns, judged: what is over, by place; what decodes, by the source's handle; what is judged, by ticket.
        asked, failed: by task, how many answers were given to judges, and why some could not be judged.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        judging: Judging,
        texts: EffortTexts,
        journal: Journal | None,
        weights: int,
        on_sample: Callable[[Sample], None] | None,
    ) -> None:
        self.source, self.tokenizer, self.judging = source, tokenizer, judging
        self.texts: EffortTexts = texts
        self.journal, self.weights, self.on_sample = journal, weights, on_sample
        marks = (BOS, USER, ASSISTANT, LATEST_REMINDER)
        self.marks = tuple(tokenizer.special_ids[mark] for mark in marks if mark in tokenizer.special_ids)
        self.ends = frozenset((tokenizer.eos_id, *self.marks))
        self.samples: dict[int, Sample] = {}
        self.turns: dict[Any, _Episode] = {}
        self.judged: dict[int, _Episode] = {}
        self.asked: Counter[str] = Counter()
        self.failed: dict[str, list[str]] = {}
        self.keys: set[str] = set()

    def run(self, jobs: Iterator[Job], at_once: int) -> list[Sample]:
        try:
            self._run(enumerate(jobs), at_once)
        except BaseException:
            self.judging.clear()
            raise
        for name, reasons in sorted(self.failed.items()):
            if len(reasons) == self.asked[name]:
                log.warning("task %s: not one of %d answers could be judged; %s", name, len(reasons), reasons[-1])
        return [self.samples[place] for place in range(len(self.samples))]

    def _run(self, jobs: Iterator[tuple[int, Job]], at_once: int) -> None:
        while True:
            while len(self.turns) < at_once and (following := next(jobs, None)) is not None:
                self._begin(*following)
            if self.turns:
                self._step()
                verdicts = self.judging.ready()
            elif self.judged:
                verdicts = self.judging.wait()
            else:
                return
            for ticket, verdict in verdicts:
                if (episode := self.judged.pop(ticket, None)) is not None:
                    if not was_judged(verdict):
                        self.failed.setdefault(episode.job.task.name, []).append(verdict.why)
                    self._end(episode, verdict)

    def _begin(self, place: int, job: Job) -> None:
        if job.key in self.keys:
            raise RequestError(f"two jobs have the key {job.key!r}; give each its own")
        self.keys.add(job.key)
        if self.journal is not None and (sample := self.journal.finished(job)) is not None:
            self._keep(place, sample)
            return
        episode = _Episode(place, job, self.tokenizer, self.texts, self.ends)
        if self.journal is not None and (known := self.journal.partial(job)) is not None:
            episode.take_up(known)
        self._go_on(episode)

    def _step(self) -> None:
        pieces = [(self.turns[piece.turn], piece) for piece in self.source.step() if piece.turn in self.turns]
        wrote = [(episode.job, piece.tokens, _told(piece)) for episode, piece in pieces if piece.tokens]
        if self.journal is not None and wrote:
            self.journal.wrote(wrote)
        for episode, piece in pieces:
            episode.write(piece.tokens, _told(piece))
            if piece.finish is None:
                continue
            if piece.finish not in (FinishReason.STOP, FinishReason.LENGTH):
                why = piece.error or f"the source ended it ({piece.finish})"
                raise RequestError(f"episode {episode.job.key} cannot go on: {why}")
            del self.turns[piece.turn]
            episode.finish = piece.finish
            self._go_on(episode)

    def _go_on(self, episode: _Episode) -> None:
        """Ask for the rest of the turn that is under way, or for the next one; or have the episode judged."""
        job = episode.job
        if episode.finish is FinishReason.STOP and (between := episode.answer_calls()):
            if self.journal is not None:
                self.journal.inserted(job, between)
            episode.insert(between)
        if episode.finish is None and episode.room > 0:
            self.turns[self.source.submit(episode.turn(self.marks))] = episode
        elif episode.finish is FinishReason.STOP:
            self.asked[job.task.name] += 1
            self.judged[self.judging.submit(job.task, job.problem, tuple(episode.reply))] = episode
        else:
            self._end(episode, wrong(episode.cut_off()))

    def _end(self, episode: _Episode, verdict: Verdict) -> None:
        sample = episode.sample(verdict, self.weights)
        if self.journal is not None:
            self.journal.ended(sample)
        self._keep(episode.place, sample)

    def _keep(self, place: int, sample: Sample) -> None:
        self.samples[place] = sample
        if self.on_sample is not None:
            self.on_sample(sample)


class _Episode:
    """An attempt under way.

    Attributes:
        asked: the rendering that the turn under way answers.
        reply: messages behind the prompt, of complete turns.
        num_turns: how many of the model's are complete; turn_at: where in `tokens` the one under way begins.
        finish: why the last turn ended; None while one is under way.
    """

    def __init__(self, place: int, job: Job, tokenizer: Tokenizer, texts: EffortTexts, ends: frozenset[int]) -> None:
        _check(job)
        self.place, self.job, self.tokenizer, self.ends = place, job, tokenizer, ends
        self.texts: EffortTexts = texts
        self.conversation = in_mode(job.problem.conversation, job.mode)
        announced = (message.tools for message in self.conversation.messages)
        self.tools: tuple[Tool, ...] = sum(announced, self.conversation.tools)
        self.environment: Environment | None = None
        self.reply: list[Message] = []
        self.asked = self._render()
        self.prompt = self.asked.encode(tokenizer)
        self.tokens: list[int] = []
        self.written: list[bool] = []
        self.logprobs: list[float] = []
        self.num_turns = self.turn_at = 0
        self.finish: FinishReason | None = None

    @property
    def room(self) -> int:
        return self.job.window - len(self.prompt) - len(self.tokens)

    def write(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """More that the model wrote."""
        assert len(tokens) == len(logprobs), f"{len(tokens)} tokens came with {len(logprobs)} log-probabilities"
        self.tokens += tokens
        self.logprobs += logprobs
        self.written += [True] * len(tokens)

    def insert(self, tokens: Sequence[int]) -> None:
        """What stands between two turns; the next one is under way then."""
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.written += [False] * len(tokens)
        self.turn_at, self.finish = len(self.tokens), None

    def turn(self, marks: tuple[int, ...]) -> Turn:
        """The question for the rest of the turn that is under way."""
        begun, begun_logprobs = self.tokens[self.turn_at :], self.logprobs[self.turn_at :]
        params = dataclasses.replace(
            self.job.params, max_tokens=self.room + len(begun), seed=turn_seed(self.job.seed, self.num_turns), logprobs=0,
            stop_token_ids=marks,
        )  # fmt: skip
        return Turn(self.prompt + self.tokens[: self.turn_at], params, tuple(begun), tuple(begun_logprobs))

    def answer_calls(self) -> list[int]:
        """Read the turn that is complete and answer its calls: the tokens to be inserted, none where the episode is over.

        Where they would leave no room for an answer, `finish` is LENGTH.
        """
        message = self._read_turn()
        self.reply.append(message)
        self.num_turns += 1
        # An answer that another mark than its own has ended is malformed: it is judged as it is.
        if not message.tool_calls or self.tokens[-1] != self.tokenizer.eos_id or self.num_turns >= self.job.most_turns:
            return []
        if self.environment is None:
            self.environment = self.job.task.environment(self.job.problem)
            if self.environment is None:
                return []
        results = [Message("tool", _valid(self.environment.call(call))) for call in message.tool_calls]
        self.reply += results
        self.asked = self._render()
        pieces = self.asked.pieces
        end = max(place for place, piece in enumerate(pieces) if piece.is_special and piece.text == EOS)
        between = Prompt(pieces[end + 1 :]).encode(self.tokenizer)
        if len(between) >= self.room:
            del self.reply[-len(results) :]
            self.finish, self.turn_at = FinishReason.LENGTH, len(self.tokens)
            return []
        return between

    def take_up(self, known: Partial) -> None:
        """Stand where an interruption left the episode.

        Raises:
            RequestError: its environment does not answer as it did before.
        """
        at = 0
        for is_written, run in itertools.groupby(known.written):
            here = slice(at, at := at + len(list(run)))
            if is_written:
                self.write(known.tokens[here], known.logprobs[here])
                continue
            between = self.answer_calls()
            if between != known.tokens[here]:
                raise RequestError(
                    f"episode {self.job.key} cannot be taken up: the environment of task {self.job.task.name} answered otherwise "
                    "than before the interruption; it must be a function of the problem and the calls"
                )
            self.insert(between)
        if self.tokens[self.turn_at :] and self.tokens[-1] in self.ends:
            self.finish = FinishReason.STOP

    def cut_off(self) -> str:
        """End for want of room, with what there is of the last turn in the reply; returns why."""
        self.finish = FinishReason.LENGTH
        if not self.tokens:
            return f"the prompt of {len(self.prompt)} tokens leaves no room in the window of {self.job.window}"
        if self.turn_at < len(self.tokens):
            self.reply.append(self._read_turn())
        return f"the window of {self.job.window} tokens (or the model's context) was full before an answer"

    def sample(self, verdict: Verdict, weights: int) -> Sample:
        assert self.finish is not None
        is_told = not any(map(math.isnan, self.logprobs))
        return Sample(
            self.job, self.prompt, self.tokens, self.written, self.logprobs if is_told else None, tuple(self.reply),
            self.finish, verdict, weights,
        )  # fmt: skip

    def _render(self) -> Prompt:
        messages = (*self.conversation.messages, *self.reply)
        return render(dataclasses.replace(self.conversation, messages=messages), texts=self.texts)

    def _read_turn(self) -> Message:
        asked = self.asked
        return parse(
            self.tokens[self.turn_at :], thinking=asked.begins_thinking, tools=self.tools, must_call=asked.begins_call,
            tokenizer=self.tokenizer,
        )  # fmt: skip


def _told(piece: Piece) -> Sequence[float]:
    """Log-probabilities of a piece; NaN stands for those that the source does not tell."""
    return piece.logprobs if piece.logprobs is not None else (math.nan,) * len(piece.tokens)


def _valid(text: str) -> str:
    """Without lone surrogates, which a model can bring in as an escape in its arguments and no tokenizer can encode."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _check(job: Job) -> None:
    params = job.params
    if params.stop or params.stop_token_ids or params.ignore_eos:
        raise RequestError(
            f"job {job.key} sets stop, stop_token_ids or ignore_eos; a turn of an episode ends at the end mark alone"
        )
    if job.most_turns < 1:
        raise RequestError(f"job {job.key}: most_turns {job.most_turns} must be 1 or more")
