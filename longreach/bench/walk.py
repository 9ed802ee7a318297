"""A random walk over an engine, checked against the bare model: does the prefix cache ever lie?

Texts branch off earlier ones, two tenants use the same texts, memory is too small, the process restarts, files are damaged.
Every finished request is computed again from its first token by the model alone, without any cache. In the invariant
arithmetic its log-probabilities must have the same bits and its tokens must be drawn again; in the fast one they may differ
by rounding. What a request reports as cached must be exactly the prompt tokens that never went through the model for it.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from longreach.engine.engine import Engine, EngineOptions, Output
from longreach.engine.memory import POLICIES
from longreach.engine.request import Request
from longreach.engine.sampler import Sampler, SampleRow, token_logprobs
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.model.config import ModelConfig
from longreach.model.features import Features
from longreach.model.paged import Segment, page_nbytes, slot_nbytes
from longreach.model.transformer import Transformer

FAST_TOLERANCE = 1e-5
"""By which log-probabilities after a hit may differ from a cold run's in the fast arithmetic, in nats."""

VOCABULARY = 61


def micro(arithmetic: Literal["fast", "invariant"]) -> ModelConfig:
    """Every mechanism in the fewest numbers, with pages of 128 tokens and a window of 16."""
    return ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, head_dim=16,
        qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=16, sliding_window=16,
        compress_ratios=(0, 4, 32, 4, 0), index_n_heads=2, index_head_dim=16, index_topk=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_hash_layers=1,
        num_nextn_predict_layers=1, max_position_embeddings=2048, numerics="transformers", arithmetic=arithmetic,
    )  # fmt: skip


@dataclass
class WalkResult:
    """What a walk found.

    Attributes:
        wrong_hits: finished requests whose tokens or log-probabilities are not the bare model's.
        wrong_reports: requests whose reported hit is not what was reused.
        crossed: requests that reused more than their own tenant had ever sent.
        difference: largest difference of a log-probability, in nats.
    """

    operations: int = 0
    finished: int = 0
    hits: int = 0
    hit_tokens: int = 0
    wrong_hits: int = 0
    wrong_reports: int = 0
    crossed: int = 0
    restarts: int = 0
    disk_pages: int = 0
    disk_states: int = 0
    preemptions: int = 0
    evictions: int = 0
    damaged: int = 0
    difference: float = 0.0
    kinds: Counter = field(default_factory=Counter)


class Walk:
    """One walk; `run` does all of it."""

    def __init__(
        self, seed: int, arithmetic: Literal["fast", "invariant"] = "invariant", directory: Path | None = None
    ) -> None:
        self.random = random.Random(seed)
        self.arithmetic = arithmetic
        self.model = Transformer(micro(arithmetic), seed=seed).eval()
        self.directory = directory
        self.result = WalkResult()
        self.texts: dict[str, list[list[int]]] = {"a": [[]], "b": [[]]}
        self.live: dict[str, Request] = {}
        self.ran: dict[str, set[int]] = {}
        self.own: dict[str, list[int]] = {}
        self.reports: list[str] = []
        self.engine = self._new_engine()

    def _new_engine(self) -> Engine:
        choose = self.random.choice
        slots, pages = choose([1, 3, 6]), choose([9, 14, 60])
        memory = slots * slot_nbytes(self.model.config, "float32") + pages * page_nbytes(self.model.config, "float32")
        engine = Engine(
            self.model,
            None,
            EngineOptions(
                max_running=slots,
                memory_gib=(memory + 100) / 2**30,
                checkpoint_gib=choose([0.0, 0.0003, 0.01]),
                swap_gib=choose([0.0, 0.01]),
                step_tokens=choose([16, 100]),
                checkpoints=choose(POLICIES),
                period=choose([32, 96, 128, 200]),
                disk_cache=self.directory,
                disk_gib=choose([0.0005, 0.01]),
                speculation=choose(["off", "lookup", "mtp"]),
            ),
        )
        self.result.kinds[f"{engine.options.checkpoints}, {engine.options.speculation}"] += 1
        extend = engine.model.extend
        watched = self

        def counted(segments: Sequence[Segment], *, streams: bool = False) -> Features:
            for segment in segments:
                for request in engine.scheduler.running:
                    if request.work.place is not None and request.work.place.sequence is segment.sequence:
                        first = segment.sequence.length
                        watched.ran[request.id] |= set(range(first, first + len(segment.tokens)))
            return extend(segments, streams=streams)

        engine.runner.extend = counted
        return engine

    def run(self, operations: int, progress: Callable[[int], None] | None = None) -> WalkResult:
        """Do so many operations, then let everything finish."""
        for count in range(operations):
            if progress is not None:
                progress(count)
            draw = self.random.random()
            if draw < 0.18 and len(self.live) < 8:
                self._submit()
            elif draw < 0.19 and self.live:
                self.engine.cancel(self.random.choice(list(self.live)))
            elif draw < 0.20:
                self.result.evictions += self.engine.memory.index.evict_page()
            elif draw < 0.203 and self.directory is not None:
                self._restart()
            elif draw < 0.205 and self.directory is not None:
                self._damage()
            else:
                self._step()
            self.result.operations += 1
        self._drain()
        self.engine.close()
        return self.result

    def _submit(self) -> None:
        tenant = self.random.choice("ab")
        known = self.random.choice(self.texts[self.random.choice([tenant, tenant, "a", "b"])][-12:])
        text = known[: self.random.choice([len(known), self.random.randint(0, len(known))])]
        text = text + [self.random.randrange(VOCABULARY) for _ in range(self.random.choice([0, 1, 5, 40, 150, 300]))]
        text = text[:900] or [self.random.randrange(VOCABULARY)]
        params = SamplingParams(
            max_tokens=self.random.choice([1, 3, 12, 40]), temperature=self.random.choice([0.0, 1.0]), logprobs=0,
            seed=self.random.randrange(1000), top_p=self.random.choice([1.0, 0.9]),
        )  # fmt: skip
        if len(text) >= self.engine.memory.capacity:
            return
        request = self.engine.submit(text, params, tenant=tenant, user=tenant, priority=self.random.choice([0, 0, 1]))
        self.live[request.id] = request
        self.ran[request.id] = set()
        self.own[request.id] = text
        self.texts[tenant].append(text)

    def _step(self) -> None:
        for output in self.engine.step():
            self._look(output)

    def _look(self, output: Output) -> None:
        request = output.request
        if output.finish_reason is None:
            return
        del self.live[request.id]
        ran, own = self.ran.pop(request.id), self.own.pop(request.id)
        self.result.preemptions += request.preemptions
        others = [text for text in self.texts[request.tenant] if text is not own]
        others += [other.tokens for other in self.live.values() if other.tenant == request.tenant]
        most = max(_common(request.tokens, text) for text in others)
        if request.num_generated:
            self.texts[request.tenant].append(list(request.tokens))
        if output.finish_reason is FinishReason.ERROR:
            self.result.wrong_hits += 1
            self.reports.append(f"{request.id}: {request.error}")
            return
        if not request.num_generated:
            return
        self.result.finished += 1
        self.result.hits += request.cached > 0
        self.result.hit_tokens += request.cached
        reused = request.num_prompt - len(ran & set(range(request.num_prompt)))
        if request.preemptions == 0 and reused != request.cached:
            self.result.wrong_reports += 1
            self.reports.append(f"{request.id}: {request.cached} tokens reported, {reused} reused")
        if request.cached > most:
            self.result.crossed += 1
            self.reports.append(f"{request.id}: {request.cached} tokens cached, its tenant never sent more than {most}")
        self._compare(request)

    @torch.no_grad()
    def _compare(self, request: Request) -> None:
        """The same tokens through the bare model, drawn again."""
        tokens = torch.tensor([request.tokens])
        logits = self.model(tokens[:, :-1])[0, request.num_prompt - 1 :]
        expected = token_logprobs(logits, tokens[0, request.num_prompt :])
        found = torch.tensor([s.logprob for s in request.work.logprobs])
        difference = float((expected.float() - found).abs().max())
        self.result.difference = max(self.result.difference, difference)
        rows = [SampleRow(request.params, request.seed, i) for i in range(request.num_generated)]
        drawn = [s.token_id for s in Sampler(()).sample(logits, rows)]
        exact = self.arithmetic == "invariant"
        if difference > (0.0 if exact else FAST_TOLERANCE) or (exact and drawn != request.tokens[request.num_prompt :]):
            self.result.wrong_hits += 1
            self.reports.append(f"{request.id}: {request.cached} cached, differs by {difference:.2g}")

    def _drain(self) -> None:
        while self.live:
            self._step()

    def _restart(self) -> None:
        """A new process would find only the disk: the engine is closed and another one opened on the same directory."""
        self._drain()
        self._count_disk()
        self.engine.close()
        self.engine = self._new_engine()
        self.result.restarts += 1

    def _count_disk(self) -> None:
        self.result.disk_pages += self.engine.memory.stats.disk_pages
        self.result.disk_states += self.engine.memory.stats.disk_states

    def _damage(self) -> None:
        """Flip a bit of a stored file."""
        assert self.directory is not None
        if self.engine.memory.writer is not None:
            self.engine.memory.writer.flush(5)
        files = sorted(self.directory.rglob("*.rec"))
        if files:
            path = self.random.choice(files)
            with path.open("r+b") as file:
                place = self.random.randrange(path.stat().st_size)
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << self.random.randrange(8)]))
            self.result.damaged += 1


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def walk(
    operations: int, seed: int = 0, arithmetic: Literal["fast", "invariant"] = "invariant", disk: bool = True
) -> tuple[WalkResult, list[str]]:
    """One walk in a directory of its own. Returns what it found, and a line per lie."""
    with tempfile.TemporaryDirectory(prefix="longreach-walk-") as folder:
        one = Walk(seed, arithmetic, Path(folder) if disk else None)
        result = one.run(operations)
        return result, one.reports
