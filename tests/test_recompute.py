"""Recomputing layers on the way back: the same loss and the same gradients, for less memory."""

from __future__ import annotations

import pytest
import torch
from test_cache import shape, text
from test_memory import saved_bytes

from longreach.model.recompute import recompute_layers
from longreach.model.transformer import Transformer


def results(model: Transformer, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    features = model.features(text(150), keep=("routing", "selection", "index_loss"), **options)
    objective = features.hidden.square().mean() + sum(part.total for part in features.index_loss.values())
    objective.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"routing {i}": chosen for i, chosen in features.routing.items()}
    found |= {f"selection {i}": chosen for i, chosen in features.selection.items()}
    return found | {"hidden": features.hidden.detach()}


@pytest.mark.parametrize("options", [{}, {"attention": "dense"}, {"documents": torch.arange(150)[None] // 60}])
def test_recomputing_layers_changes_neither_results_nor_gradients(options):
    model = Transformer(shape(sliding_window=16, compress_ratios=(0, 4, 24, 4), index_topk=8))
    plain = results(model, **options)
    recompute_layers(model)
    again = results(model, **options)
    recompute_layers(model, False)
    off = results(model, **options)
    assert plain.keys() == again.keys() == off.keys()
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, off[name]), name


def test_recomputing_layers_keeps_the_streams_between_them_and_little_else():
    config = shape(sliding_window=16, compress_ratios=(0, 4, 24, 4), index_topk=8)
    model = Transformer(config)
    everything = saved_bytes(model, 1024)
    recompute_layers(model)
    streams = 4 * 1024 * config.hc_mult * config.hidden_size
    assert saved_bytes(model, 1024) < (config.num_hidden_layers + 3) * streams < everything / 2


def test_a_model_that_recomputes_has_the_same_weights_by_the_same_names_and_reads_as_before():
    model = Transformer(shape())
    names, logits = list(model.state_dict()), model(text(40)).detach()
    recompute_layers(model)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(model(text(40)), logits)
