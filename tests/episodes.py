"""Small tasks, a source that says what it is told, and a journal in memory: for tests of everything that plays episodes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from longreach.chat.messages import Conversation, Message, Tool, ToolCall
from longreach.engine.sampling import FinishReason
from longreach.evaluate.episode import Job, Partial, Piece, Sample, Turn
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, Verdict, final_message, wrong
from longreach.tokenizer.bpe import Tokenizer


class Sums(GeneratedTask):
    """`a+b`, answered by a number."""

    kind, domain, summary, all_levels = "sums", "mathematics", "sums of two numbers", (1, 2)

    def make(self, rng: random.Random, level: int) -> Problem:
        a, b = rng.randrange(10**level), rng.randrange(10**level)
        return Problem(self.name, Conversation((Message("user", f"{a}+{b}"),)), a + b, level)

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        final = final_message(reply)
        said = final.content.strip() if final is not None else "nothing"
        return RIGHT if said == str(problem.answer) else wrong(f"{said} is not {problem.answer}")


class SumsApart(Sums):
    """The same, judged in a process of its own."""

    judged_apart = True


class Shelf:
    """The world of `Boxes`: a counter that tools change."""

    def __init__(self) -> None:
        self.count = 0

    def call(self, call: ToolCall) -> str:
        try:
            self.count += int(json.loads(call.arguments)["by"])
        except (ValueError, KeyError, TypeError):
            return f"error: {call.arguments}"
        return str(self.count)


class Boxes(Sums):
    """Put boxes on a shelf by calls of `put`, then say how many there are."""

    kind, domain, summary, all_levels = "boxes", "agentic", "count boxes on a shelf", (1,)
    tools = (Tool({"name": "put", "parameters": {"type": "object", "properties": {"by": {"type": "integer"}}}}),)

    def make(self, rng: random.Random, level: int) -> Problem:
        a, b = rng.randrange(50), rng.randrange(50)
        return Problem(self.name, Conversation((Message("user", f"put {a} and {b}"),), self.tools), a + b, level)

    def environment(self, problem: Problem) -> Shelf:
        return Shelf()


class ScriptedSource:
    """Says what `say` makes of the text of a prompt, special tokens spelled out; an end mark is added.

    Args:
        pace: tokens of every turn in a step.
        tells: whether it gives log-probabilities: of a token, minus its place in the turn plus one, over 100.

    Attributes:
        prompts: text of every turn's prompt.
        widest: turns that were under way at once, at most.
        fail_at: step in which it ends a turn with an error.
    """

    def __init__(self, tokenizer: Tokenizer, say: Callable[[str], str], pace: int = 3, tells: bool = True) -> None:
        self.tokenizer, self.say, self.pace, self.tells = tokenizer, say, pace, tells
        self.prompts: list[str] = []
        self.widest = self.steps = 0
        self.fail_at: int | None = None
        self._turns: dict[int, tuple[list[int], int, int]] = {}
        self._count = 0

    def submit(self, turn: Turn) -> int:
        text = self.tokenizer.decode(turn.prompt)
        self.prompts.append(text)
        ids = [*self.tokenizer.encode(self.say(text), allow_special=True), self.tokenizer.eos_id]
        stops = {self.tokenizer.eos_id, *turn.params.stop_token_ids}
        end = next(place for place, token in enumerate(ids) if token in stops)
        ids = ids[: end + 1]
        assert tuple(ids[: len(turn.begun)]) == turn.begun and len(turn.begun) < min(len(ids), turn.params.max_tokens)
        self._count += 1
        self._turns[self._count] = (ids, len(turn.begun), turn.params.max_tokens)
        self.widest = max(self.widest, len(self._turns))
        return self._count

    def step(self) -> list[Piece]:
        self.steps += 1
        pieces = []
        for handle, (ids, at, most) in list(self._turns.items()):
            if self.steps == self.fail_at:
                pieces.append(Piece(handle, (), (), FinishReason.ERROR, "the pass failed: no memory"))
                continue
            end = min(at + self.pace, len(ids), most)
            finish = FinishReason.STOP if end == len(ids) else FinishReason.LENGTH if end == most else None
            logprobs = tuple(-(place + 1) / 100 for place in range(at, end)) if self.tells else None
            pieces.append(Piece(handle, tuple(ids[at:end]), logprobs, finish))
            self._turns[handle] = (ids, end, most)
            if finish is not None:
                del self._turns[handle]
        return pieces


class MemoryJournal:
    """Keeps records in a list.

    Attributes:
        records: ("wrote" or "inserted", key, tokens, logprobs) and ("ended", key, sample), as they came.
    """

    def __init__(self, records: Sequence[tuple[Any, ...]] = ()) -> None:
        self.records: list[tuple[Any, ...]] = list(records)

    def cut(self, count: int) -> MemoryJournal:
        """What is left where the process was killed after so many records."""
        return MemoryJournal(self.records[:count])

    def finished(self, job: Job) -> Sample | None:
        return next((r[2] for r in self.records if r[0] == "ended" and r[1] == job.key), None)

    def partial(self, job: Job) -> Partial | None:
        known = Partial([], [], [], [])
        for kind, key, *rest in self.records:
            if key == job.key and kind in ("wrote", "inserted"):
                if kind == "wrote" and (not known.written or not known.written[-1]):
                    known.turn_starts.append(len(known.tokens))
                known.tokens.extend(rest[0])
                known.written.extend([kind == "wrote"] * len(rest[0]))
                known.logprobs.extend(rest[1])
        return known if known.tokens else None

    def wrote(self, pieces: Sequence[tuple[Job, Sequence[int], Sequence[float]]]) -> None:
        self.records += [("wrote", job.key, tuple(tokens), tuple(logprobs)) for job, tokens, logprobs in pieces]

    def inserted(self, job: Job, tokens: Sequence[int]) -> None:
        self.records.append(("inserted", job.key, tuple(tokens), (0.0,) * len(tokens)))

    def ended(self, sample: Sample) -> None:
        assert self.finished(sample.job) is None, "an episode ended twice"
        self.records.append(("ended", sample.job.key, sample))
