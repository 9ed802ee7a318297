"""transformers as the opponent: the same weights from the same files, at its best setting.

Its one-pass prefill is quadratic in memory, so the fair opponent at length is chunked prefill; which chunk and which of
its expert implementations are fastest here is measured, not assumed. Training knows no chunks; where its memory does not
suffice it can recompute each layer on the way back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreach.errors import RequestError

CHUNKS = (512, 1024, 2048)
EXPERTS = ("grouped_mm", "eager", "batched_mm")


class TransformersPeer:
    """`DeepseekV4ForCausalLM` behind the calls the bench makes of both sides."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        try:
            import transformers
            from transformers import DeepseekV4ForCausalLM
        except ImportError:
            raise RequestError(
                "--against transformers needs transformers 5.23; install it with pip install 'longreach[dev]'"
            ) from None
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.name = f"transformers {transformers.__version__}"
        self.device = device
        self.model: Any = DeepseekV4ForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
        self.model.to(device)
        self.model.eval()
        self.chunk, self.experts = 1024, "eager"

    def new_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, chunk: int | None = None, cache=None) -> Tensor:
        """Logits after the last token; in one call, or chunk by chunk over a cache."""
        cache = self.new_cache() if cache is None else cache
        logits = None
        for part in tokens.split(chunk or tokens.shape[1], dim=1):
            logits = self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        assert logits is not None
        return logits

    @torch.no_grad()
    def step(self, token: Tensor, cache) -> Tensor:
        return self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def generate(self, tokens: Tensor, new: int) -> list[float]:
        """Generate `new` greedy tokens after each row, as its own users would; the prompt goes through in chunks.

        Returns:
            Seconds from each token to the next, `new - 1` of them.
        """
        from transformers import StoppingCriteriaList

        at: list[float] = []

        def clock(ids: Tensor, scores: object, **kwargs: object) -> Tensor:
            at.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            use_cache=True, pad_token_id=0, prefill_chunk_size=min(self.chunk, tokens.shape[1]),
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return [b - a for a, b in pairwise(at)]

    def tune_generation(self, tokens: Tensor, new: int = 6) -> str:
        """The fastest expert implementation for decoding rows like `tokens`."""
        return self._fastest_experts(lambda: statistics.median(self.generate(tokens, new)))

    def _fastest_experts(self, seconds: Callable[[], float]) -> str:
        """Try each expert implementation, keep the one for which `seconds` returns least."""
        fastest = float("inf")
        for experts in EXPERTS:
            try:
                self.model.set_experts_implementation(experts)
                took = seconds()
            except (RuntimeError, NotImplementedError, ValueError):
                continue  # not offered for this type or device
            if took < fastest:
                fastest, self.experts = took, experts
        self.model.set_experts_implementation(self.experts)
        return self.experts

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss, with gradient; as its own users call it."""
        return self.model(tokens, labels=tokens, use_cache=False).loss

    def train(self, experts: str, recompute: bool) -> None:
        """Be trained from now on, with this implementation of the experts and with or without gradient checkpointing."""
        self.model.train()
        self.model.set_experts_implementation(experts)
        self.experts = experts
        if recompute:
            self.model.gradient_checkpointing_enable()

    def tune_training(self, tokens: Tensor) -> str:
        """The fastest expert implementation for training on texts like `tokens`. Weights and gradients stay as they are."""
        self.model.train()
        weights = list(self.model.parameters())

        def seconds() -> float:
            for _ in range(2):  # the first is slower whoever it is
                began = time.perf_counter()
                torch.autograd.grad(self.loss(tokens), weights, allow_unused=True)
            return time.perf_counter() - began

        return self._fastest_experts(seconds)

    def tune(self, tokens: Tensor) -> None:
        """Choose the fastest expert implementation and chunk for prompts like `tokens`."""

        def seconds() -> float:
            self.prefill(tokens[:, :256], 256)
            began = time.perf_counter()
            self.prefill(tokens[:, :2048], 1024)
            return time.perf_counter() - began

        self._fastest_experts(seconds)
        fastest = float("inf")
        for chunk in CHUNKS:
            began = time.perf_counter()
            self.prefill(tokens, chunk)
            if (took := time.perf_counter() - began) < fastest:
                fastest, self.chunk = took, chunk
