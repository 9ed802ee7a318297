"""Memory grows with the length of the text, not with its square: in inference and in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_cache import shape, text

from longreach.bench.memory import measure_in_process
from longreach.checkpoint.save import save_model
from longreach.model.cache import expected_nbytes
from longreach.model.transformer import Transformer

MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_one_long_call_needs_its_cache_and_one_chunk(tmp_path):
    config = shape(sliding_window=64, compress_ratios=(0, 4, 128, 4), index_topk=64)
    save_model(Transformer(config), tmp_path / "m", layout="official")
    extra = {n: measure_in_process(tmp_path / "m", n, "float32", 1, "cpu")["extra_bytes"] for n in (16_384, 65_536)}
    grown = extra[65_536] - extra[16_384]
    arithmetic = expected_nbytes(config, 65_536) - expected_nbytes(config, 16_384)
    # Token ids, logits and the allocator's slack come on top; a queries × keys tensor would be 16 GiB.
    assert grown < 2 * arithmetic + 32 * MIB, {n: round(b / MIB) for n, b in extra.items()}


def saved_bytes(model: Transformer, length: int) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.features(text(length)).hidden
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_what_training_keeps_for_the_backward_pass_is_linear_in_length(attention):
    model = Transformer(shape(sliding_window=32, compress_ratios=(0, 4, 24, 4)))
    model.features = lambda tokens, f=model.features: f(tokens, attention=attention)  # type: ignore[method-assign]
    short, long = saved_bytes(model, 1024), saved_bytes(model, 4096)
    assert long < 4.2 * short, (short, long)
