"""Runs a step's plan through the model: tokens in, rows of logits out.

Decoding requests form one pass (a token each, and their drafts), prompts another, so that the arithmetic of a decoded token
is the same whether or not somebody's prompt is being read beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longreach.engine.request import Request
from longreach.engine.scheduler import Plan
from longreach.model.paged import Segment
from longreach.model.transformer import Transformer

DECODE_ROWS = 64
"""Tokens of decoding requests per pass."""


@dataclass
class Rows:
    """What one request gets out of a pass.

    Attributes:
        logits: float32 `[k, V]`: for a decoding request after its newest token and after each draft, for a prompt after its
            last token, and none before the prompt is read to its end.
    """

    request: Request
    logits: Tensor | None
    is_prefill: bool


class Runner:
    """The model's side of a step. Advances the requests' sequences; decides nothing.

    Attributes:
        tokens_run: tokens that went through the model; forward_s: seconds it took, the head included.
    """

    def __init__(self, model: Transformer, vocab_size: int, drafter: bool = False) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.extend = model.extend
        self.keeps_streams = drafter
        self.tokens_run = 0
        self.forward_s = 0.0

    def passes(self, plan: Plan) -> Iterator[tuple[list[Request], Callable[[], list[Rows]]]]:
        """The passes of a plan, one after the other: whom it is for, and the call that makes it."""
        for batch in _batches([(r, 1 + len(r.drafts)) for r in plan.decode], DECODE_ROWS):
            work = [(r, [r.tokens[-1], *r.drafts]) for r, _ in batch]
            yield [r for r, _ in batch], partial(self._pass, work, is_prefill=False)
        for batch in _batches(plan.prefill, self.model.chunk_tokens):
            work = [(r, r.tokens[r.computed : r.computed + n]) for r, n in batch]
            yield [r for r, _ in batch], partial(self._pass, work, is_prefill=True)

    def _pass(self, work: Sequence[tuple[Request, list[int]]], is_prefill: bool) -> list[Rows]:
        segments = [Segment(request.work.place.sequence, tokens) for request, tokens in work]
        began = time.perf_counter()
        features = self.extend(segments, streams=self.keeps_streams)
        self.forward_s += time.perf_counter() - began
        self.tokens_run += sum(len(tokens) for _, tokens in work)
        hidden, at, last, counts = features.hidden[0], 0, [], []
        for request, tokens in work:
            request.computed += len(tokens)
            if self.keeps_streams and features.streams is not None:
                request.work.streams = features.streams[0, at : at + len(tokens)]
            at += len(tokens)
            is_read = request.computed == len(request.tokens)
            last += [at - 1] if is_prefill and is_read else []
            counts.append(int(is_read) if is_prefill else len(tokens))
        rows = hidden[torch.tensor(last, dtype=torch.int64, device=hidden.device)] if is_prefill else hidden
        began = time.perf_counter()
        with torch.inference_mode():
            logits = self.model.head(rows)[:, : self.vocab_size] if len(rows) else rows
        self.forward_s += time.perf_counter() - began
        pieces = logits.split(counts)
        return [
            Rows(request, piece if count else None, is_prefill)
            for (request, _), piece, count in zip(work, pieces, counts, strict=True)
        ]


def _batches(items: Sequence[tuple[Request, int]], limit: int) -> Iterator[list[tuple[Request, int]]]:
    """Items in runs whose counts add up to at most `limit` (or one item alone)."""
    batch, total = [], 0
    for item in items:
        if batch and total + item[1] > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += item[1]
    if batch:
        yield batch
