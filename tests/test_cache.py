"""The cache: any cut, any chunking, any rewind gives what one pass gives; bit for bit in the invariant arithmetic."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from longreach.errors import CacheError
from longreach.model.cache import ContiguousCache, expected_nbytes, load_cache
from longreach.model.config import ModelConfig
from longreach.model.stores import REWIND
from longreach.model.transformer import Transformer


def shape(**changes) -> ModelConfig:
    """All layer kinds, small rates that do not divide the tile, a window that moves, a selection that bites."""
    base = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8,
        q_lora_rank=16, o_groups=2, o_lora_rank=8, sliding_window=20, compress_ratios=(0, 4, 24, 4),
        index_n_heads=32, index_head_dim=16, index_topk=6, n_routed_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=16, num_hash_layers=1, hc_mult=3, hc_sinkhorn_iters=5, initializer_range=0.2,
        numerics="transformers",
    )  # fmt: skip
    return base.replace(**changes)


@pytest.fixture(scope="module", params=["fast", "invariant"])
def model(request) -> Transformer:
    return Transformer(shape(arithmetic=request.param), seed=1).eval()


def text(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: Transformer, tokens: torch.Tensor, cuts: list[int], cache: ContiguousCache | None = None):
    """Logits and selections of `tokens` read in pieces that end at `cuts` (and at the end)."""
    cache = cache or model.new_cache(tokens.shape[0])
    hidden, selections = [], []
    edges = [0, *cuts, tokens.shape[1]]
    for start, stop in pairwise(edges):
        out = model.features(tokens[:, start:stop], cache, keep=("selection",))
        hidden.append(out.hidden)
        selections.append(out.selection)
    return model.head(torch.cat(hidden, dim=1)), selections, cache


def selected_sets(selections) -> list[list[list[int]]]:
    """Per layer and position, the chosen entries."""
    out = []
    for layer in selections[0]:
        rows = [row.tolist() for part in selections for row in part[layer][0]]
        out.append([sorted(i for i in row if i >= 0) for row in rows])
    return out


def assert_equal_logits(model: Transformer, got: torch.Tensor, expected: torch.Tensor) -> None:
    if model.config.arithmetic == "invariant":
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_wherever_a_sequence_of_300_is_cut_the_two_halves_give_the_whole(model):
    tokens = text(300)
    whole, selections, _ = run(model, tokens, [])
    sets = selected_sets(selections)
    # Continuing from every cut: forking a cache at the cut saves reading the first half 299 times.
    cache = model.new_cache(1)
    first: list[torch.Tensor] = []
    for cut in range(1, 300):
        with torch.no_grad():
            first.append(model(tokens[:, cut - 1 : cut], cache))
        if model.config.arithmetic == "invariant" and cut % 5 and cut % 32 > 1:
            continue  # slower: a fifth of the cuts and those around every tile's edge
        rest, after, _ = run(model, tokens[:, cut:], [], cache.fork())
        assert_equal_logits(model, torch.cat([*first, rest], dim=1), whole)
        assert [layer[cut:] for layer in sets] == selected_sets(after)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["fast", "invariant"])
def test_every_cut_of_300_read_afresh_gives_the_whole(arithmetic):
    model = Transformer(shape(arithmetic=arithmetic), seed=1).eval()
    tokens = text(300)
    whole, selections, _ = run(model, tokens, [])
    for cut in range(1, 300):
        halves, after, _ = run(model, tokens, [cut])
        assert_equal_logits(model, halves, whole)
        assert selected_sets(after) == selected_sets(selections)


@pytest.mark.parametrize("seed", range(3))
def test_any_chunking_of_3000_tokens_gives_one_pass(model, seed):
    tokens = text(3000, seed=seed)
    r = random.Random(seed)
    cuts = sorted(r.sample(range(1, 3000), r.choice([3, 12, 40])))
    whole, selections, _ = run(model, tokens, [])
    pieces, after, _ = run(model, tokens, cuts)
    assert_equal_logits(model, pieces, whole)
    assert selected_sets(after) == selected_sets(selections)


def test_a_pass_without_a_cache_equals_one_with(model):
    tokens = text(300, batch=2)
    cached, _, _ = run(model, tokens, [])
    assert_equal_logits(model, model(tokens).detach(), cached)
    with torch.no_grad():
        assert_equal_logits(model, model(tokens), cached)


def test_batch_neighbours_change_nothing(model):
    tokens = text(130, batch=3)
    together, _, _ = run(model, tokens, [50, 51])
    for row in range(3):
        alone, _, _ = run(model, tokens[row : row + 1], [99])
        assert_equal_logits(model, together[row : row + 1], alone)


@pytest.mark.parametrize("back", [1, 7, 31, 32, 33, REWIND])
@pytest.mark.parametrize("precision", ["float32", "released"])
def test_truncating_and_going_on_equals_never_having_gone_on(model, back, precision):
    tokens = text(200, seed=3)
    _, _, straight = run(model, tokens[:, :150], [], model.new_cache(1, precision))
    _, _, strayed = run(
        model, torch.cat([tokens[:, :150], text(back, seed=9)], dim=1), [40, 150], model.new_cache(1, precision)
    )
    strayed.truncate(150)
    assert strayed.length == 150
    expected, _, _ = run(model, tokens[:, 150:], [3], straight)
    got, _, _ = run(model, tokens[:, 150:], [3], strayed)
    assert_equal_logits(model, got, expected)


def test_a_cache_can_always_go_back_64_tokens_and_says_when_it_cannot(model):
    cache = model.new_cache(1)
    lengths = [1, 60, 100, 3, 200]
    for n in lengths:
        run(model, text(n), [], cache)
        assert cache.rewind_limit <= max(0, cache.length - REWIND)
    with pytest.raises(CacheError, match="can go back to"):
        cache.truncate(cache.rewind_limit - 1)
    assert cache.length == sum(lengths)  # a refused truncation changes nothing
    cache.truncate(0)
    again, _, _ = run(model, text(50), [], cache)
    assert_equal_logits(model, again, run(model, text(50), [])[0])


def test_repeated_short_rewinds_as_in_speculative_decoding_lose_nothing(model):
    tokens, r = text(400, seed=5), random.Random(0)
    whole, _, _ = run(model, tokens, [])
    cache, at, out = model.new_cache(1), 0, []
    while at < 400:
        draft = min(r.randint(1, 9), 400 - at)
        wrong = torch.cat([tokens[:, at : at + draft], text(r.randint(1, 6), seed=at)], dim=1)
        with torch.no_grad():
            out.append(model(wrong, cache)[:, :draft])
        cache.truncate(at + draft)
        at += draft
    assert_equal_logits(model, torch.cat(out, dim=1), whole)


def test_a_fork_shares_entries_and_neither_branch_sees_the_other(model):
    tokens = text(200)
    _, _, trunk = run(model, tokens, [])
    branch = trunk.fork()
    assert branch.shared_nbytes == trunk.shared_nbytes > 0
    pieces = {p.data_ptr() for s in trunk.groups[0].stores if s.entries for p in s.entries.frozen}
    assert pieces == {p.data_ptr() for s in branch.groups[0].stores if s.entries for p in s.entries.frozen}
    a, _, _ = run(model, text(60, seed=1), [], trunk)
    b, _, _ = run(model, text(60, seed=2), [17], branch)
    for seed, got in ((1, a), (2, b)):
        expected, _, _ = run(model, torch.cat([tokens, text(60, seed=seed)], dim=1), [200])
        assert_equal_logits(model, got, expected[:, 200:])


def test_a_fork_that_rewinds_and_overwrites_leaves_the_trunk_alone(model):
    tokens = text(200)
    _, _, trunk = run(model, tokens, [])
    branch = trunk.fork()
    branch.truncate(150)
    run(model, text(80, seed=4), [], branch)
    got, _, _ = run(model, text(40, seed=1), [], trunk)
    expected, _, _ = run(model, torch.cat([tokens, text(40, seed=1)], dim=1), [200])
    assert_equal_logits(model, got, expected[:, 200:])


def test_many_generations_of_forks_still_read_right(model):
    tokens = text(240, seed=8)
    whole, _, _ = run(model, tokens, [])
    cache, out = model.new_cache(1), []
    for start in range(0, 240, 20):
        cache = cache.fork()
        out.append(run(model, tokens[:, start : start + 20], [], cache)[0])
    assert_equal_logits(model, torch.cat(out, dim=1), whole)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "released"])
def test_a_saved_and_reloaded_cache_continues_bit_identically(model, precision, tmp_path):
    _, _, cache = run(model, text(137, batch=2), [60], model.new_cache(2, precision))
    branch = cache.fork()
    branch.save(tmp_path / "state.safetensors")
    again = load_cache(tmp_path / "state.safetensors", model)
    assert again.lengths == (137, 137) and again.precision == precision
    more = text(70, batch=2, seed=2)
    assert torch.equal(run(model, more, [1, 40], again)[0], run(model, more, [1, 40], cache)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_cache_file_of_another_model_or_no_cache_at_all_is_refused_in_one_line(model, tmp_path):
    _, _, cache = run(model, text(40), [])
    cache.save(tmp_path / "c.safetensors")
    other = Transformer(shape(index_topk=7))
    with pytest.raises(CacheError, match="another configuration"):
        load_cache(tmp_path / "c.safetensors", other)
    (tmp_path / "no.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CacheError, match="cannot read a cache"):
        load_cache(tmp_path / "no.safetensors", model)
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match="cannot read a cache"):
        load_cache(tmp_path / "cut.safetensors", model)


def test_rows_of_different_lengths_run_together(model):
    rows = [text(n, seed=n) for n in (5, 90, 41)]
    alone = [run(model, row, [])[0] for row in rows]
    padded = torch.zeros(3, 90, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : row.shape[1]] = row
    cache = model.new_cache(3)
    with torch.no_grad():
        out = model(padded, cache, lengths=[5, 90, 41])
        last = model(padded, model.new_cache(3), logits_to_keep=1, lengths=[5, 90, 41])
    assert cache.lengths == (5, 90, 41)
    for i, expected in enumerate(alone):
        assert_equal_logits(model, out[i : i + 1, : expected.shape[1]], expected)
        assert_equal_logits(model, last[i], expected[0, -1:])
    more = text(12, batch=3, seed=77)
    with torch.no_grad():
        further = model(more, cache)
    for i, row in enumerate(rows):
        expected = run(model, torch.cat([row, more[i : i + 1]], dim=1), [row.shape[1]])[0]
        assert_equal_logits(model, further[i : i + 1], expected[:, row.shape[1] :])


def test_rows_can_be_picked_repeated_and_stacked(model):
    tokens = text(100, batch=3)
    _, _, cache = run(model, tokens, [])
    more = text(30, batch=4, seed=4)
    got, _, _ = run(model, more, [], cache.select([2, 0, 0, 1]))
    for i, row in enumerate([2, 0, 0, 1]):
        expected = run(model, torch.cat([tokens[row : row + 1], more[i : i + 1]], dim=1), [100])[0][:, 100:]
        assert_equal_logits(model, got[i : i + 1], expected)
    short = run(model, text(33, seed=6), [])[2]
    stacked = ContiguousCache.stack([short, cache])
    assert stacked.lengths == (33, 100, 100, 100)
    got, _, _ = run(model, more, [], stacked)
    expected = run(model, torch.cat([text(33, seed=6), more[:1]], dim=1), [33])[0][:, 33:]
    assert_equal_logits(model, got[:1], expected)
    with pytest.raises(CacheError, match="rows"):
        cache.select([3])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "released"])
def test_the_bytes_of_a_cache_are_those_of_the_arithmetic(precision):
    config = shape(sliding_window=64, compress_ratios=(0, 4, 32, 4))
    cache = ContiguousCache(config, 1, precision=precision)
    length = 4096
    cache.reserve(length)
    parts = cache.nbytes_by_part()
    entry, key = {"float32": (64, 64), "bfloat16": (32, 32), "released": (8 + 16 + 8, 8 + 1)}[precision]
    assert parts["entries"] == 2 * (length // 4) * entry + (length // 32) * entry
    assert parts["index_entries"] == 2 * (length // 4) * key
    arithmetic = parts["entries"] + parts["index_entries"] + 4 * 64 * entry
    assert expected_nbytes(config, length, precision) == arithmetic
    assert cache.nbytes == sum(parts.values())


@pytest.mark.parametrize(("preset", "per_token", "windows"), [("flash", 3514.25, 43), ("pro", 5031.4375, 61)])
def test_the_released_layout_has_the_published_bytes_per_token(preset, per_token, windows):
    config = ModelConfig.preset(preset)
    for length in (128 * 1000, 2**20):
        assert expected_nbytes(config, length, "released") == per_token * length + windows * 74_752


def test_a_million_tokens_of_the_bench_shape_are_588_mib():
    assert round(expected_nbytes(ModelConfig.preset("bench"), 2**20) / 2**20) == 588


def test_growing_leaves_at_most_a_tenth_spare():
    config = ModelConfig.preset("bench")
    cache = ContiguousCache(config, 1)
    store = cache.groups[0].stores[2]
    assert store.entries is not None
    spare = []
    for _ in range(400):
        store.entries.append(torch.zeros(1, 64, config.head_dim))
        spare.append(store.entries.nbytes / (store.entries.count * config.head_dim * 4))
    assert max(spare[4:]) <= 1.1


def test_lossy_storage_moves_the_logits_by_a_stated_amount():
    """The figures of docs/model.md: what bfloat16 and the released layout do to a model that does not round itself."""
    model = Transformer(shape(), seed=1).eval()
    tokens = text(300)
    exact, _, _ = run(model, tokens, [])
    scale = exact.abs().max()
    drift = {}
    for precision in ("bfloat16", "released"):
        got, _, _ = run(model, tokens, [], model.new_cache(1, precision))
        drift[precision] = float((got - exact).abs().mean() / scale)
    assert 0 < drift["bfloat16"] < drift["released"] < 0.05


def test_under_official_numerics_the_released_layout_changes_nothing():
    """The model rounds exactly as the layout stores: packing is then lossless (rotary channels in bfloat16 aside)."""
    model = Transformer(shape(numerics="official"), seed=1, dtype=torch.bfloat16).eval()
    tokens = text(200)
    plain, _, _ = run(model, tokens, [90], model.new_cache(1, "bfloat16"))
    packed, _, _ = run(model, tokens, [90], model.new_cache(1, "released"))
    assert torch.equal(plain, packed)


def test_impossible_requests_of_a_cache_name_the_value_and_the_choice():
    with pytest.raises(CacheError, match="'fp3' is not one of float32, bfloat16, released"):
        ContiguousCache(shape(), 1, precision="fp3")  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="at least 1"):
        ContiguousCache(shape(), 0)
    with pytest.raises(CacheError, match="-1"):
        ContiguousCache(shape(), 1).truncate(-1)
