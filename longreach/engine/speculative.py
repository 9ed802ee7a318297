"""Guessing tokens that one pass of the model then checks: several for the price of little more than one.

A guess is right exactly when it is the token the model would have drawn there (`sampler`: a drawn token is a function of
logits, seed and place), so the text is the same with and without guessing, greedy or sampled. A wrong guess costs its share
of the pass; the sequence is cut back by it (`PagedSequence.truncate`), which is what the cache's rewinding is for.

`PromptLookup` copies what followed the same few tokens earlier in the text. `MTPDrafter` asks the model's own draft block
(`model.mtp`), again and again on its own output for more than one token; its extra memory is one window per sequence.
Source: DeepSeek-V4 report, section 2.5 (MTP); prompt look-up decoding is common practice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longreach.engine.request import Request
from longreach.engine.sampler import Sampler, SampleRow
from longreach.engine.sampling import SamplingParams
from longreach.model.native_pass import NativeRows
from longreach.model.paged import PagedSequence, Segment
from longreach.model.transformer import Transformer
from longreach.ops.linear import linear

LONGEST, SHORTEST = 4, 2
"""Tokens of context that prompt look-up matches: the longest that occurred before."""


GUESSABLE, LEAST_GUESSABLE = 4, 1024
"""The MTP block guesses among the first quarter of the vocabulary (at least so many tokens): byte-pair merges are numbered by how
often they occur, and reading a whole head for a guess costs as much as the block itself."""


class Suffixes:
    """Where every run of a few tokens last ended in a growing text."""

    def __init__(self) -> None:
        self.last: dict[tuple[int, ...], int] = {}
        self.seen = 0

    def find(self, tokens: Sequence[int]) -> int | None:
        """The place just after the latest earlier occurrence of the text's own ending, or None."""
        for end in range(max(self.seen, SHORTEST), len(tokens)):  # all but the text's own end
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self.last[tuple(tokens[end - size : end])] = end
        self.seen = max(self.seen, len(tokens))
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            if (place := self.last.get(tuple(tokens[len(tokens) - size :]))) is not None:
                return place
        return None


class PromptLookup:
    """Drafts copied from the text itself."""

    def __init__(self, count: int) -> None:
        self.count = count

    def propose(self, requests: Sequence[Request]) -> None:
        """Set `drafts` of each request whose text has been here before."""
        for request in requests:
            room = min(self.count, request.limit - len(request.tokens) - 1)
            if room < 1:
                continue
            if request.work.lookup is None:
                request.work.lookup = Suffixes()
            place = request.work.lookup.find(request.tokens)
            if place is not None:
                # A text that repeats itself goes round: after its end comes what came after its last time round.
                again = request.tokens[place:]
                request.drafts = [again[i % len(again)] for i in range(room)]


class MTPDrafter:
    """Drafts of the model's own MTP block, drawn with the noise the model's tokens will be drawn with."""

    def __init__(self, model: Transformer, sampler: Sampler, vocab_size: int, count: int) -> None:
        self.model, self.sampler, self.count = model, sampler, count
        self.head = model.head.weight[: max(LEAST_GUESSABLE, vocab_size // GUESSABLE)][:vocab_size].detach()

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request]) -> None:
        """Set `drafts` of each request, from the streams of the tokens it has just read."""
        asking, segments, streams = [], [], []
        for request in requests:
            read: Tensor = request.work.streams
            sequence: PagedSequence = request.work.place.sequence
            first = sequence.length - self._kept(request, len(read))
            extent, window = sequence.extent, self.model.config.sliding_window
            start = max(first, sequence.length - window)
            if extent.mtp_hi != start:  # something was read without this block: it begins anew
                extent.mtp_lo = extent.mtp_hi = start
            segments.append(Segment(sequence, request.tokens[start + 1 : sequence.length + 1]))
            streams.append(read[start - first : sequence.length - first])
            asking.append(request)
        hidden, out = self._draft(segments, streams[0] if len(streams) == 1 else torch.cat(streams))
        for i in range(self.count):
            for request, token in zip(asking, self._drawn(hidden, asking, i), strict=True):
                if token >= 0 and i < request.limit - len(request.tokens) - 1:
                    request.drafts.append(token)
            on = [n for n, request in enumerate(asking) if len(request.drafts) == i + 1]
            if i + 1 == self.count or not on:
                break
            asking = [asking[n] for n in on]
            segments = [
                Segment(segments[n].sequence, request.drafts[-1:]) for n, request in zip(on, asking, strict=True)
            ]
            hidden, out = self._draft(segments, out if len(on) == len(out) else out[on])
        for request in requests:  # guesses were only tried
            request.work.place.sequence.truncate_mtp(request.work.place.sequence.length)

    def _draft(self, segments: Sequence[Segment], streams: Tensor) -> tuple[Tensor, Tensor]:
        """What the block makes of each segment's last token: hidden states `[segments, D]`, streams `[segments, n, D]`."""
        rows = NativeRows.of(self.model, looked=True)  # by `extend`, which made the streams
        if rows is not None and rows.suits_segments(segments):
            tokens = torch.tensor([t for segment in segments for t in segment.tokens])
            return rows.draft(tokens, segments, streams, last_only=True)
        hidden, out = self.model.draft(segments, streams.unsqueeze(0))
        last = torch.tensor([len(segment.tokens) for segment in segments]).cumsum(0) - 1
        return hidden[0, last], out[0, last]

    def _drawn(self, hidden: Tensor, asking: Sequence[Request], ahead: int) -> list[int]:
        """A token for each, `ahead` places after the next; -1 where there is none."""
        logits = linear(hidden.to(self.head.dtype), self.head).float()
        if all(_is_largest(request.params, request.num_generated + ahead) for request in asking):
            return logits.argmax(dim=-1).tolist()
        rows = [SampleRow(_plain(r.params), r.seed, r.num_generated + ahead) for r in asking]
        return [drawn.token_id for drawn in self.sampler.sample(logits, rows)]

    @staticmethod
    def _kept(request: Request, read: int) -> int:
        """How many of the rows just read are still true: wrong drafts came last."""
        return read - request.work.dropped


def _is_largest(params: SamplingParams, position: int) -> bool:
    """Whether the token drawn there is the one with the largest logit, history apart."""
    return params.temperature == 0 and not params.logit_bias and position >= params.min_tokens


def _plain(params: SamplingParams) -> SamplingParams:
    """The same draw without what looks at other tokens: a guess may be wrong."""
    if params.needs_history or params.logprobs is not None or params.grammar is not None:
        return replace(
            params, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, logprobs=None, grammar=None
        )
    return params
