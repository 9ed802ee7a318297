"""What one forward pass carries past the layers: positions, spans, tables, and what is asked in and out.

A *span* is a run of consecutive tokens of one sequence (or of several rows that stand at the same position), with the
stores its layers read and write. A plain batch is one span; packed documents and rows of different lengths are several.
Token-wise work runs on the whole batch at once, attention span by span.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longreach.model.config import ModelConfig
from longreach.model.stores import LayerStore
from longreach.ops.index_loss import IndexLoss
from longreach.ops.rope import rope_frequencies, rope_table


@dataclass(frozen=True)
class Span:
    """Consecutive tokens `[rows, cols]` of the batch that stand at positions `first`, `first + 1`, …

    Attributes:
        real: which of the span's tokens are new text. In the invariant arithmetic a span is a whole aligned tile, and
            the others are padding or tokens already in the stores.
        stores: one per layer.
    """

    rows: slice
    cols: slice
    first: int
    real: slice
    stores: list[LayerStore]

    @property
    def stop(self) -> int:
        """The position after the span's last token."""
        return self.first + self.cols.stop - self.cols.start

    @property
    def real_first(self) -> int:
        return self.first + self.real.start

    @property
    def real_stop(self) -> int:
        return self.first + self.real.stop


@dataclass
class Pass:
    """One forward pass over `tokens`. Layers read it; the `keep_*` methods collect what the caller wants back."""

    config: ModelConfig
    tokens: Tensor
    spans: list[Span]
    dense: bool = False
    invariant: bool = False
    routing_in: Mapping[int, Tensor] | None = None
    selection_in: Mapping[int, Tensor] | None = None
    wants_routing: bool = False
    wants_selection: bool = False
    wants_scores: bool = False
    wants_index_loss: bool = False
    wants_index_recall: bool = False
    routing: dict[int, Tensor] = field(default_factory=dict)
    router_scores: dict[int, Tensor] = field(default_factory=dict)
    selection: dict[int, Tensor] = field(default_factory=dict)
    index_loss: dict[int, IndexLoss] = field(default_factory=dict)
    _tables: dict[bool, Tensor] = field(default_factory=dict)
    _frequencies: dict[bool, Tensor] = field(default_factory=dict)
    _positions: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def positions(self) -> Tensor:
        """Position of every token, int64 `[1, T]` or `[B, T]`."""
        if self._positions is None:
            B, T = self.tokens.shape
            if len(self.spans) == 1 and self.spans[0].cols == slice(0, T):
                first = self.spans[0].first
                self._positions = torch.arange(first, first + T, device=self.device).unsqueeze(0)
            else:
                self._positions = torch.zeros(B, T, dtype=torch.int64, device=self.device)
                for span in self.spans:
                    self._positions[span.rows, span.cols] = torch.arange(span.first, span.stop, device=self.device)
        return self._positions

    @property
    def real_rows(self) -> slice:
        """The new tokens of an invariant tile."""
        return self.spans[0].real

    def frequencies(self, compressed: bool) -> Tensor:
        """RoPE frequencies of sliding layers, or of layers with compressed entries."""
        if compressed not in self._frequencies:
            self._frequencies[compressed] = frequencies(self.config, compressed, self.device)
        return self._frequencies[compressed]

    def table(self, compressed: bool) -> Tensor:
        """RoPE table of every token, complex64 `[1 or B, T, rope_dim / 2]`."""
        if compressed not in self._tables:
            self._tables[compressed] = rope_table(self.positions, self.frequencies(compressed))
        return self._tables[compressed]

    def routing_for(self, layer: int) -> Tensor | None:
        return self.routing_in.get(layer) if self.routing_in is not None else None

    def selection_for(self, layer: int, span: Span) -> Tensor | None:
        """Entries this layer was told to select for the span's tokens, or None."""
        if self.selection_in is None or layer not in self.selection_in:
            return None
        return self.selection_in[layer][span.rows, span.cols]

    def keep_routing(self, layer: int, chosen: Tensor, scores: Tensor) -> None:
        if self.wants_routing:
            self.routing[layer] = chosen.detach()
        if self.wants_scores:
            self.router_scores[layer] = scores

    def index_graph(self) -> torch.set_grad_enabled:
        """The context indexers run in: their outputs carry a gradient into their own loss and nowhere else."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.wants_index_loss)

    def keep_index_loss(self, layer: int, loss: IndexLoss) -> None:
        """Add one span's loss to its layer's."""
        self.index_loss[layer] = self.index_loss[layer] + loss if layer in self.index_loss else loss

    def keep_selection(self, layer: int, span: Span, chosen: Tensor) -> None:
        """Record int `[b, t, k]` entries (-1 for none) of one span."""
        if not self.wants_selection:
            return
        B, T = self.tokens.shape
        kept = self.selection.get(layer)
        width = chosen.shape[-1]
        if kept is None or kept.shape[-1] < width:
            wider = torch.full((B, T, width), -1, dtype=torch.int32, device=self.device)
            if kept is not None:
                wider[..., : kept.shape[-1]] = kept
            kept = self.selection[layer] = wider
        kept[span.rows, span.cols, :width] = chosen.to(torch.int32)


def frequencies(config: ModelConfig, compressed: bool, device: torch.device | None = None) -> Tensor:
    """RoPE frequencies: base `rope_theta` plain, or `compress_rope_theta` with YaRN for a layer with entries.

    V3.2 has one kind of layer: base `rope_theta`, with YaRN.
    """
    theta = config.compress_rope_theta if compressed else config.rope_theta
    if not compressed and config.attention != "mla":
        return rope_frequencies(config.qk_rope_head_dim, theta, device=device)
    return rope_frequencies(
        config.qk_rope_head_dim,
        theta,
        factor=config.rope_factor,
        original_length=config.rope_original_length,
        beta_fast=config.rope_beta_fast,
        beta_slow=config.rope_beta_slow,
        device=device,
    )
