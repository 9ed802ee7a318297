"""The model's public face: features in and out, packed documents, MTP, switches, presets, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from test_cache import shape, text
from torch import nn

import longreach
from longreach.errors import ConfigError, RequestError, ShapeError
from longreach.model.config import PRESETS, ModelConfig
from longreach.model.feedforward import spread_table
from longreach.model.hyper_connection import HyperConnection, HyperWrapped, StreamCollapse, expand_streams
from longreach.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(shape(), seed=2)


def test_the_public_names_are_there():
    assert longreach.ModelConfig is ModelConfig and longreach.Transformer is Transformer
    assert callable(longreach.load_model) and callable(longreach.load_cache)


def test_logits_are_float32_and_only_those_asked_for(model):
    tokens = text(30, batch=2)
    logits = model(tokens)
    assert logits.shape == (2, 30, 64) and logits.dtype == torch.float32
    torch.testing.assert_close(model(tokens, logits_to_keep=3), logits[:, -3:])
    half = Transformer(shape(), dtype=torch.bfloat16)
    assert half(tokens).dtype == torch.float32 and half.layers[0].attn_hc.fn.dtype == torch.float32


def test_head_of_features_is_the_logits(model):
    tokens = text(40)
    torch.testing.assert_close(model.head(model.features(tokens).hidden), model(tokens))


def test_packed_documents_see_nothing_of_each_other_and_count_from_zero(model):
    lengths = [37, 1, 80, 12]
    documents = torch.repeat_interleave(torch.tensor([4, 2, 9, 4]), torch.tensor(lengths)).unsqueeze(0)
    tokens = text(130)
    packed = model.features(tokens, documents=documents, keep=("selection", "routing"))
    at = 0
    for n in lengths:
        alone = model.features(tokens[:, at : at + n], keep=("selection", "routing"))
        torch.testing.assert_close(packed.hidden[:, at : at + n], alone.hidden, atol=2e-5, rtol=0)
        for layer, chosen in alone.selection.items():
            width = chosen.shape[-1]
            assert torch.equal(packed.selection[layer][:, at : at + n, :width], chosen)
            assert (packed.selection[layer][:, at : at + n, width:] == -1).all()
        at += n
    positions = torch.cat([torch.arange(n) for n in lengths])
    torch.testing.assert_close(model.features(tokens, positions=positions).hidden, packed.hidden)


def test_gradients_of_packed_documents_are_the_sum_of_those_alone(model):
    tokens, documents = text(90), torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor([41, 49])).unsqueeze(0)
    weight = torch.randn(1, 90, 32, generator=torch.Generator().manual_seed(0))

    def gradient(pairs):
        model.zero_grad()
        for hidden, w in pairs:
            (hidden * w).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    packed = gradient([(model.features(tokens, documents=documents).hidden, weight)])
    alone = gradient([(model.features(tokens[:, s]).hidden, weight[:, s]) for s in (slice(0, 41), slice(41, 90))])
    assert packed.keys() == alone.keys()
    for name in packed:
        torch.testing.assert_close(packed[name], alone[name], atol=2e-5, rtol=1e-3, msg=name)


def test_gradients_are_the_same_in_both_arithmetics():
    tokens = text(75)
    grads = []
    for arithmetic in ("fast", "invariant"):
        m = Transformer(shape(arithmetic=arithmetic), seed=2)
        m(tokens).square().mean().backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    for name, g in grads[0].items():
        if g is None:
            assert grads[1][name] is None
            continue
        torch.testing.assert_close(grads[1][name], g, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("arithmetic", ["fast", "invariant"])
def test_replaying_routing_and_selection_reproduces_a_pass(arithmetic):
    m = Transformer(shape(arithmetic=arithmetic), seed=2)
    tokens = text(100, batch=2)
    first = m.features(tokens, keep=("routing", "selection"))
    again = m.features(tokens, routing=first.routing, selection=first.selection, keep=("routing", "selection"))
    torch.testing.assert_close(again.hidden, first.hidden, atol=1e-5, rtol=0)
    moved = {k: (v + 1) % 6 for k, v in first.routing.items()}
    assert not torch.allclose(m.features(tokens, routing=moved).hidden, first.hidden, atol=1e-3)
    fewer = {k: torch.where(torch.arange(v.shape[-1]) > 0, -1, v) for k, v in first.selection.items()}
    changed = m.features(tokens, selection=fewer, keep=("selection",))
    assert not torch.allclose(changed.hidden, first.hidden, atol=1e-3)
    for layer, chosen in changed.selection.items():
        assert (chosen[..., 1:] == -1).all() and torch.equal(chosen[..., 0], first.selection[layer][..., 0])


def test_dense_attention_is_a_selection_large_enough_to_hold_everything(model):
    tokens = text(120)
    wide = Transformer(shape(index_topk=500), seed=2)
    torch.testing.assert_close(model.features(tokens, attention="dense").hidden, wide.features(tokens).hidden)
    assert not torch.allclose(model.features(tokens).hidden, wide.features(tokens).hidden, atol=1e-3)


def test_the_future_never_reaches_the_past(model):
    tokens = text(150)
    changed = tokens.clone()
    changed[:, 97:] = (changed[:, 97:] + 1) % 64
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :97], b[:, :97], atol=1e-5, rtol=0)
    assert not torch.allclose(a[:, 97], b[:, 97], atol=1e-3)


def test_long_passes_without_gradients_equal_the_same_pass_with(model):
    tokens = text(500)

    class Small(Transformer):
        chunk_tokens = 64

    chunked = Small(shape(), seed=2)
    with torch.no_grad():
        torch.testing.assert_close(chunked(tokens), model(tokens), atol=1e-5, rtol=0)
        torch.testing.assert_close(chunked(tokens, logits_to_keep=70), model(tokens)[:, -70:], atol=1e-5, rtol=0)


# ---- MTP


def test_mtp_equals_the_published_equations_around_an_independent_block():
    """X⁰ from the module's equations, the block itself run by transformers' sliding-window layer."""
    pytest.importorskip("transformers")
    from hf import ours_from, randomise, reference_model

    main = shape(num_hidden_layers=1, compress_ratios=(0,), num_hash_layers=0)
    reference = reference_model(main)
    randomise(reference, 5)
    block_weights = {
        k.removeprefix("layers.0."): v
        for k, v in ours_from(reference, main).state_dict().items()
        if k.startswith("layers.0.")
    }
    model = Transformer(main.replace(num_nextn_predict_layers=1, compress_ratios=(0, 0)), seed=3)
    mtp = model.mtp[0]
    mtp.load_state_dict(block_weights, strict=False)
    tokens = text(50)
    with torch.no_grad():
        features = model.features(tokens, keep=("streams", "mtp"))

        def rms(x, w):
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w

        following = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
        e = rms(model.embed.weight[following], mtp.enorm.weight) @ mtp.e_proj.weight.T
        x = e.unsqueeze(2) + rms(features.streams, mtp.hnorm.weight) @ mtp.h_proj.weight.T
        layer, rotary = reference.model.layers[0], reference.model.rotary_emb
        t = torch.arange(50)
        hidden = (t[None] > t[:, None]) | (t[None] <= t[:, None] - main.sliding_window)
        mask = torch.zeros(50, 50).masked_fill(hidden, float("-inf"))[None, None]
        tables = {k: rotary(e, position_ids=t[None], layer_type=k) for k in ("main", "compress")}
        x = layer(x, input_ids=following, position_embeddings=tables, position_ids=t[None], attention_mask=mask)
        flat = x.flatten(2)
        z = (flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ mtp.collapse.fn.T
        gate = torch.sigmoid(z * mtp.collapse.scale + mtp.collapse.base) + 1e-6
        expected = rms((gate.unsqueeze(-1) * x).sum(2), mtp.norm.weight)
    torch.testing.assert_close(features.mtp, expected, atol=2e-5, rtol=1e-4)


def test_mtp_learns_from_the_same_embedding_and_head():
    m = Transformer(shape(num_nextn_predict_layers=1, compress_ratios=(0, 4, 24, 4, 0)), seed=1)
    out = m.features(text(40), keep=("mtp",))
    m.head(out.mtp).logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in m.mtp.parameters())
    assert m.embed.weight.grad.abs().sum() > 0 and m.head.weight.grad.abs().sum() > 0
    assert "mtp.0.embed.weight" not in m.state_dict()


# ---- what each idea replaces


@pytest.mark.parametrize("changes", [
    dict(residual="plain"), dict(residual="hc"), dict(feed_forward="dense", intermediate_size=48),
    dict(attention="sliding"), dict(attention="dense"), dict(scoring_func="sigmoid"), dict(scoring_func="softmax"),
    dict(residual="plain", num_nextn_predict_layers=1, compress_ratios=(0, 4, 24, 4, 0)),
])  # fmt: skip
@pytest.mark.parametrize("arithmetic", ["fast", "invariant"])
def test_every_switch_runs_cached_and_uncached_alike_and_trains(changes, arithmetic):
    m = Transformer(shape(arithmetic=arithmetic, **changes), seed=4)
    tokens = text(90)
    full = m(tokens)
    with torch.no_grad():
        cache = m.new_cache(1)
        pieces = torch.cat([m(tokens[:, :33], cache), m(tokens[:, 33:34], cache), m(tokens[:, 34:], cache)], dim=1)
        cache.truncate(60)
        again = m(tokens[:, 60:], cache)
    compare = torch.equal if arithmetic == "invariant" else lambda a, b: torch.allclose(a, b, atol=1e-5)
    assert compare(pieces, full) and compare(again, full[:, 60:])
    full.logsumexp(-1).sum().backward()
    untrained = {n for n, p in m.named_parameters() if p.grad is None}
    assert all("indexer" in n or n.startswith("mtp") for n in untrained)


def test_sliding_only_forgets_and_dense_remembers():
    tokens = text(200)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 64
    for attention, remembers in (("sliding", False), ("dense", True), ("hybrid", True)):
        m = Transformer(shape(attention=attention), seed=4)
        moved = (m(tokens) - m(other))[:, -1].abs().max()
        assert (moved > 1e-6) == remembers


def test_mhc_starts_as_the_plain_residual():
    torch.manual_seed(0)
    connection, sublayer = HyperConnection(16, 4), nn.Linear(16, 16)
    x = torch.randn(2, 5, 16)
    out = connection(expand_streams(x, 4), sublayer)
    torch.testing.assert_close(out, expand_streams(x + sublayer(x), 4), atol=0.05, rtol=0.05)
    torch.testing.assert_close(StreamCollapse(16, 4)(expand_streams(x, 4)), x, atol=0.05, rtol=0.05)


def test_mhc_wraps_any_torch_block_with_a_residual_of_its_own():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    wrapped = HyperWrapped(block, dim=16, streams=3)
    x = torch.randn(2, 7, 16)
    out = wrapped(expand_streams(x, 3))
    assert out.shape == (2, 7, 3, 16)
    torch.testing.assert_close(out.mean(2), block(x), atol=0.1, rtol=0.1)
    out.sum().backward()
    assert wrapped.connection.fn.grad is not None and wrapped.connection.fn.grad.abs().sum() > 0


def test_hash_tables_of_models_made_here_spread_tokens_evenly():
    table = spread_table(vocab_size=1000, experts=8, k=2, seed=7)
    assert table.shape == (1000, 2) and (table[:, 0] != table[:, 1]).all()
    for run in range(1000 // 8):
        assert torch.bincount(table[run * 8 : run * 8 + 8].flatten(), minlength=8).tolist() == [2] * 8
    pairs = {tuple(sorted(p)) for p in table.tolist()}
    assert len(pairs) > 20  # of 28: which experts meet differs from token to token
    m = Transformer(ModelConfig.preset("tiny"))
    tables = [m.layers[i].ffn.gate.tid2eid for i in range(2)]
    assert not torch.equal(*tables)


# ---- presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_on_the_meta_device(name):
    m = Transformer(ModelConfig.preset(name), device="meta")
    assert next(m.parameters()).device.type == "meta"


def test_the_bench_preset_has_40_9_million_parameters():
    m = Transformer(ModelConfig.preset("bench"), device="meta")
    biases = sum(b.numel() for n, b in m.named_buffers() if n.endswith("bias"))
    assert sum(p.numel() for p in m.parameters()) + biases == 40_943_077


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    a, b, c = (Transformer(shape(), seed=s) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)


# ---- refusals


@pytest.mark.parametrize(("changes", "words"), [
    (dict(num_attention_heads=4, o_groups=3), "not divisible by o_groups=3; choose o_groups among 1, 2, 4"),
    (dict(compress_ratios=(0, 4, -1, 4)), "must not be negative"),
    (dict(compress_ratios=(0, 4, 1, 4)), "compresses nothing"),
    (dict(csa_ratio=0), "csa_ratio=0 must be at least 1"),
    (dict(compress_ratios=(0, 4, 24)), "compress_ratios has 3 entries"),
    (dict(num_experts_per_tok=7), "more than n_routed_experts=6"),
    (dict(qk_rope_head_dim=7), "must be even"),
    (dict(index_topk=0), "index_topk=0"),
    (dict(num_hash_layers=9), "between 0 and 4"),
    (dict(hidden_size=32.5), "must be a whole number"),
    (dict(numerics="bogus"), "is not one of 'official', 'transformers'"),
    (dict(index_head_dim=24, numerics="official"), "power of two"),
    (dict(bos_token_id=64), "inside the vocabulary of 64"),
    (dict(n_heads=4), "unknown config field 'n_heads'"),
])  # fmt: skip
def test_impossible_configurations_are_refused_with_value_and_remedy(changes, words):
    with pytest.raises(ConfigError) as error:
        shape(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_impossible_requests_are_refused_in_one_line(model):
    with pytest.raises(RequestError, match="token id 64 is outside the vocabulary of 64"):
        model(torch.tensor([[1, 64]]))
    with pytest.raises(RequestError, match="more than this model's context of 50"):
        Transformer(shape(max_position_embeddings=50))(text(51))
    short = Transformer(shape(max_position_embeddings=50))
    cache = short.new_cache(1)
    short(text(50), cache)
    with pytest.raises(RequestError, match="51 tokens"):
        short(text(1), cache)
    assert cache.length == 50
    with pytest.raises(ShapeError, match="neither empty"):
        model(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ShapeError, match="give int64"):
        model(torch.zeros(1, 4))
    with pytest.raises(ShapeError, match="2 rows but the cache has 1"):
        model(text(4, batch=2), model.new_cache(1))
    with pytest.raises(ShapeError, match="no MTP block"):
        model.features(text(4), keep=("mtp",))
    with pytest.raises(ShapeError, match="choose among"):
        model.features(text(4), keep=("nothing",))
    with pytest.raises(ShapeError, match="count up by one"):
        model.features(text(4), positions=torch.tensor([0, 1, 3, 4]))
    with pytest.raises(ShapeError, match="do not continue the cache"):
        model.features(text(4), model.new_cache(1), positions=torch.arange(1, 5))
