"""Compiled rows: a position's bits depend on its own text alone, whatever it is computed with, and however it is asked for."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from shuffled import shuffled

from longreach.errors import ShapeError
from longreach.model.cache import ContiguousCache
from longreach.model.config import ModelConfig
from longreach.model.native_pass import NativeRows, product
from longreach.model.native_runs import PASS_ROWS
from longreach.model.paged import Arena, PagedSequence, Segment, replay_start
from longreach.model.transformer import Transformer
from longreach.native import library, status
from longreach.ops.linear import linear_reference

pytestmark = pytest.mark.skipif(library() is None, reason=f"no compiled functions here: {status()}")


def small(**changes) -> ModelConfig:
    fields = dict(
        vocab_size=97, hidden_size=48, num_hidden_layers=5, compress_ratios=(0, 4, 8, 4, 16, 0), num_attention_heads=6,
        head_dim=24, qk_rope_head_dim=8, q_lora_rank=20, o_groups=2, o_lora_rank=12, sliding_window=8,
        moe_intermediate_size=20, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1, num_hash_layers=1,
        index_n_heads=6, index_head_dim=16, index_topk=5, num_nextn_predict_layers=1, numerics="transformers", hc_mult=4,
        max_position_embeddings=4096, arithmetic="invariant",
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return shuffled(small())


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plain_twin(model: Transformer) -> Transformer:
    """The same weights in float64, through PyTorch's operators."""
    twin = Transformer(model.config.replace(arithmetic="fast"), dtype=torch.float64)
    twin.load_state_dict({name: t.double() if t.is_floating_point() else t for name, t in model.state_dict().items()})
    return twin


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("inner", [1, 15, 16, 17, 48, 130, 512, 1030])
def test_a_row_times_a_matrix_has_the_same_bits_in_every_company(inner, count):
    generator = torch.Generator().manual_seed(inner)
    for out in (1, 3, 4, 7, 16, 33, 600):
        x = torch.randn(70, inner, generator=generator)
        w = torch.randn(out, inner, generator=generator)
        alone = torch.cat([product(x[i : i + 1], w) for i in range(70)])
        expected = linear_reference(x.double(), w.double())
        assert float((alone - expected).abs().max() / expected.abs().max()) < 2e-6
        with threads(count):
            for rows in (2, 3, 4, 5, 8, 33, 70):
                shifted = torch.empty(rows * inner + 1)[1:].view(rows, inner).copy_(x[-rows:])  # another alignment
                assert torch.equal(product(x[:rows], w), alone[:rows])
                assert torch.equal(product(shifted, w), alone[-rows:])


def test_a_number_that_is_none_stays_with_its_row():
    x, w = torch.randn(9, 50), torch.randn(20, 50)
    clean = product(x, w)
    x[4, 49] = float("nan")
    got = product(x, w)
    assert bool(got[4].isnan().all()) and torch.equal(got[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(16))
def test_compiled_rows_equal_the_operators_on_random_shapes(seed):
    rng = random.Random(seed)
    kinds = [rng.choice((0, 4, 4, 8, 16)) for _ in range(rng.randint(1, 5))]
    config = small(
        num_hidden_layers=len(kinds), compress_ratios=(*kinds, 0), num_attention_heads=rng.choice((2, 4, 6, 10)),
        head_dim=rng.choice((16, 24, 80)), hidden_size=rng.choice((32, 72, 130)), hc_mult=rng.choice((2, 4, 5)),
        residual=rng.choice(("mhc", "mhc", "hc")), num_hash_layers=rng.choice((0, 1)), swiglu_limit=rng.choice((0.0, 1.0)),
        scoring_func=rng.choice(("sqrtsoftplus", "sigmoid", "softmax")), sliding_window=rng.choice((4, 8, 24)),
        index_topk=rng.choice((1, 5, 1000)), index_n_heads=32, attention=rng.choice(("hybrid", "hybrid", "dense", "sliding")),
    )  # fmt: skip
    model = shuffled(config, seed)
    assert NativeRows.of(model) is not None
    tokens = tokens_of(2, rng.randint(2, 190), seed)
    keep = ("routing", "router_scores", "selection", "streams", "mtp")
    ask = dict(attention=rng.choice(("sparse", "dense")), keep=keep)
    operators = Transformer(config.replace(arithmetic="fast"))
    operators.load_state_dict(model.state_dict())
    with torch.no_grad():
        got, expected, theirs = (m.features(tokens, **ask) for m in (model, plain_twin(model), operators))
    for name in ("hidden", "streams", "mtp"):
        exact = getattr(expected, name)[:, :-1] if name == "mtp" else getattr(expected, name)
        error, usual = (
            float((getattr(features, name)[:, : exact.shape[1]] - exact).abs().max()) for features in (got, theirs)
        )
        assert error <= max(2e-5 * float(exact.abs().max()), 2 * usual), name
    for name in ("routing", "selection", "router_scores"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        assert mine.keys() == theirs.keys()
        for layer in mine:
            a, b = (t[layer][:, :-1] if layer == len(kinds) else t[layer] for t in (mine, theirs))  # MTP: as above
            assert torch.equal(a, b) if name != "router_scores" else torch.allclose(a.double(), b, atol=1e-3), (
                name,
                layer,
            )


# ---- the same bits ---------------------------------------------------------------------------------------------------


def reference_rows(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states one token and one row at a time."""
    rows = []
    for row in tokens:
        cache = model.new_cache(1)
        rows.append(torch.cat([model.features(t.view(1, 1), cache).hidden for t in row], dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("count", [1, 2])
def test_bits_do_not_depend_on_chunks_neighbours_caches_or_threads(model, count):
    tokens = tokens_of(3, 150)
    expected = reference_rows(model, tokens)
    with threads(count), torch.no_grad():
        assert torch.equal(model.features(tokens).hidden, expected)
        for row in range(3):
            assert torch.equal(model.features(tokens[row : row + 1]).hidden, expected[row : row + 1])
        for cut in (1, 7, 63, 64, 65, 128, 149):
            cache = model.new_cache(3)
            parts = [model.features(tokens[:, :cut], cache), model.features(tokens[:, cut:], cache)]
            assert torch.equal(torch.cat([part.hidden for part in parts], dim=1), expected)


def test_bits_do_not_depend_on_padding_or_packing(model):
    tokens, lengths = tokens_of(3, 100), [100, 37, 64]
    expected = reference_rows(model, tokens)
    with torch.no_grad():
        padded = model.features(tokens, lengths=lengths).hidden
        for row, length in enumerate(lengths):
            assert torch.equal(padded[row, :length], expected[row, :length])
            assert not padded[row, length:].any()
        last = model(tokens, logits_to_keep=3, lengths=lengths)
        for row, length in enumerate(lengths):
            assert torch.equal(last[row], model.head(expected[row, length - 3 : length]))
        packed = torch.cat([tokens[0, :61], tokens[1, :90], tokens[2, :5]]).unsqueeze(0)
        documents = torch.tensor([0] * 61 + [1] * 90 + [2] * 5).unsqueeze(0)
        hidden = model.features(packed, documents=documents).hidden
        assert torch.equal(hidden[0], torch.cat([expected[0, :61], expected[1, :90], expected[2, :5]]))


def test_bits_do_not_depend_on_forking_and_rewinding(model):
    tokens = tokens_of(1, 140)
    expected = reference_rows(model, tokens)
    cache = model.new_cache(1)
    for cut in range(0, 120, 20):
        assert torch.equal(model.features(tokens[:, cut : cut + 20], cache).hidden, expected[:, cut : cut + 20])
        branch = cache.fork()
        model.features(tokens_of(1, 30, seed=cut), branch)
        model.features(tokens_of(1, 11, seed=cut), cache)
        cache.truncate(cut + 20)
    twin = ContiguousCache.stack([cache.fork(), cache])
    hidden = model.features(tokens[:, 120:].expand(2, -1), twin).hidden
    assert torch.equal(hidden, expected[:, 120:].expand(2, -1, -1))


@pytest.mark.parametrize("length", [PASS_ROWS - 1, PASS_ROWS, 2 * PASS_ROWS + 3])
def test_bits_do_not_depend_on_where_a_pass_ends(model, length):
    tokens = tokens_of(1, length)
    cache = model.new_cache(1)
    with torch.no_grad():
        parts = [model.features(tokens[:, i : i + 50], cache).hidden for i in range(0, length, 50)]
        assert torch.equal(torch.cat(parts, dim=1), model.features(tokens).hidden)


def test_logits_of_a_position_do_not_depend_on_the_others(model):
    hidden = torch.randn(2, 9, 48)
    with torch.no_grad():
        together = model.head(hidden)
        assert torch.equal(together[1, 4], model.head(hidden[1, 4]))
    assert torch.equal(model.head(hidden), together)


def test_given_experts_and_entries_are_used_as_they_are(model):
    tokens = tokens_of(2, 120)
    with torch.no_grad():
        own = model.features(tokens, keep=("routing", "selection"))
        replayed = model.features(tokens, routing=own.routing, selection=own.selection, keep=("routing", "selection"))
        assert torch.equal(replayed.hidden, own.hidden)
        other = {layer: (chosen + 1) % 6 for layer, chosen in own.routing.items()}
        moved = model.features(tokens, routing=other, keep=("routing",))
        assert not torch.equal(moved.hidden, own.hidden)
        assert all(torch.equal(moved.routing[layer], other[layer]) for layer in other)
        expected = plain_twin(model).features(tokens, routing=other).hidden
        assert float((moved.hidden - expected).abs().max() / expected.abs().max()) < 5e-5
        with pytest.raises(ShapeError, match="give int64"):
            model.features(tokens, routing={0: own.routing[0] + 9})


# ---- an engine's sequences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["invariant", "fast"])
@pytest.mark.parametrize("seed", range(4))
def test_paged_sequences_have_the_bits_of_a_row_alone(model, seed, arithmetic):
    rng = random.Random(seed)
    tokens = tokens_of(4, 330, seed)
    expected = torch.cat([reference_rows(model, tokens[:1]), model.features(tokens[1:], model.new_cache(3)).hidden])
    streams = model.features(tokens, keep=("streams",)).streams
    if arithmetic == "fast":  # the same functions
        twin = Transformer(model.config.replace(arithmetic="fast"))
        twin.load_state_dict(model.state_dict())
        model = twin
    rows = NativeRows.of(model)
    assert rows is not None
    arena = Arena(model.config, num_slots=6, num_pages=30)
    pages = rng.sample(range(30), 12)
    sequences = []
    for i in range(4):
        sequence = PagedSequence(arena, slot=i + 1)
        sequence.pages = pages[3 * i : 3 * i + 3]
        sequences.append(sequence)
    while any(sequence.length < 330 for sequence in sequences):
        segments, wanted, wanted_streams = [], [], []
        for i in rng.sample(range(4), rng.randint(1, 4)):
            a = sequences[i].length
            b = min(330, a + rng.choice((1, 1, 1, 5, 64, 100)))
            if a < b:
                segments.append(Segment(sequences[i], tokens[i, a:b].tolist()))
                wanted.append(expected[i, a:b])
                wanted_streams.append(streams[i, a:b])
        if segments:
            assert rows.suits_segments(segments)
            flat = torch.tensor([t for segment in segments for t in segment.tokens])
            hidden, after = rows.advance(flat, segments, streams=True)
            assert torch.equal(hidden, torch.cat(wanted)) and torch.equal(after, torch.cat(wanted_streams))
            if rng.random() < 0.3:
                sequence = segments[0].sequence
                sequence.truncate(max(sequence.rewind_limit, sequence.length - 3))


def test_a_window_rebuilt_over_cached_entries_gives_the_same_bits(model):
    tokens = tokens_of(1, 300)
    expected = model.features(tokens, model.new_cache(1)).hidden
    rows, arena = NativeRows.of(model), Arena(model.config, num_slots=2, num_pages=3)
    assert rows is not None
    first, second = PagedSequence(arena, 0), PagedSequence(arena, 1)
    first.pages = second.pages = [2, 0, 1]
    rows.advance(tokens[0, :260], [Segment(first, tokens[0, :260].tolist())])
    held = arena.layers[1].entries.clone()
    start = replay_start(model.config, 256)
    second.replay(256, start)
    assert start > 0
    rows.advance(tokens[0, start:256], [Segment(second, tokens[0, start:256].tolist())])
    assert torch.equal(arena.layers[1].entries, held)
    hidden, _ = rows.advance(tokens[0, 256:], [Segment(second, tokens[0, 256:].tolist())])
    assert torch.equal(hidden, expected[0, 256:])


def test_drafts_of_paged_sequences_have_the_bits_of_a_whole_pass(model):
    tokens = tokens_of(2, 170)
    with torch.no_grad():
        whole = model.features(tokens, keep=("streams", "mtp"))
    rows, arena = NativeRows.of(model), Arena(model.config, num_slots=2, num_pages=1)
    assert rows is not None
    sequences = [PagedSequence(arena, slot) for slot in (1, 0)]
    at = [0, 0]
    for counts in ([3, 100], [1, 1], [64, 5], [2, 1], [90, 40]):
        parts = [(i, at[i], at[i] + n) for i, n in enumerate(counts)]
        following = [tokens[i, a + 1 : b + 1] for i, a, b in parts]
        segments = [Segment(sequence, t.tolist()) for sequence, t in zip(sequences, following, strict=True)]
        streams = torch.cat([whole.streams[i, a:b] for i, a, b in parts])
        hidden, after = rows.draft(torch.cat(following), segments, streams)
        assert torch.equal(hidden, torch.cat([whole.mtp[i, a:b] for i, a, b in parts]))
        assert after.shape == streams.shape
        at = [b for _, _, b in parts]


def test_a_draft_of_last_tokens_alone_has_their_bits(model):
    tokens = tokens_of(3, 200)
    with torch.no_grad():
        whole = model.features(tokens, keep=("streams", "mtp"))
    rows, arena = NativeRows.of(model), Arena(model.config, num_slots=6, num_pages=1)
    assert rows is not None
    alone, together = ([PagedSequence(arena, slot) for slot in range(first, first + 3)] for first in (0, 3))
    at = [0, 0, 0]
    for counts in ([3, 100, 1], [1, 2, 1], [2, 1, 65], [64, 5, 2], [2, 2, 129], [90, 40, 1]):
        parts = [(i, at[i], at[i] + n) for i, n in enumerate(counts)]
        following = [tokens[i, a + 1 : b + 1] for i, a, b in parts]
        streams, flat = torch.cat([whole.streams[i, a:b] for i, a, b in parts]), torch.cat(following)
        mine, theirs = (
            rows.draft(
                flat, [Segment(s, t.tolist()) for s, t in zip(sequences, following, strict=True)], streams, **how
            )
            for sequences, how in ((alone, {"last_only": True}), (together, {}))
        )
        last = torch.tensor(counts).cumsum(0) - 1
        assert torch.equal(mine[0], torch.stack([whole.mtp[i, b - 1] for i, _, b in parts]))
        assert torch.equal(mine[0], theirs[0][last]) and torch.equal(mine[1], theirs[1][last])
        at = [b for _, _, b in parts]
        assert [s.extent.mtp_hi for s in alone] == [s.extent.mtp_hi for s in together] == at


def test_a_token_the_model_does_not_have_is_refused_and_nothing_moves(model):
    rows, arena = NativeRows.of(model), Arena(model.config, num_slots=1, num_pages=1)
    assert rows is not None
    sequence = PagedSequence(arena, 0)
    sequence.pages = [0]
    for token in (-1, 97):
        with pytest.raises(IndexError, match="outside the model's vocabulary"):
            model.extend([Segment(sequence, [5, token])])
        with pytest.raises(IndexError, match="outside the model's vocabulary"):
            rows.draft(torch.tensor([token]), [Segment(sequence, [token])], torch.zeros(1, 4, 48))
    assert sequence.length == sequence.extent.mtp_hi == 0


def test_a_forked_process_and_several_threads_at_once_compute_the_same():
    x, w = torch.randn(64, 512), torch.randn(2048, 512)
    with threads(2):
        expected = product(x, w)
        with ThreadPoolExecutor(3) as pool:
            assert all(torch.equal(y, expected) for y in pool.map(lambda _: product(x, w), range(30)))
        child = os.fork()
        if child == 0:  # the parent's helpers do not exist here, nor do the threads of PyTorch's own operators
            os._exit(0 if bool((product(x, w).numpy() == expected.numpy()).all()) else 1)
        assert os.waitpid(child, 0)[1] == 0


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_training_computes_the_engines_bits_and_the_operators_gradients(model):
    tokens = tokens_of(2, 150)
    documents = torch.tensor([[0] * 60 + [1] * 90, [0] * 150])
    expected = reference_rows(model, tokens[1:])
    keep = ("routing", "selection", "router_scores", "mtp", "streams")
    got = model.features(tokens, documents=documents, keep=keep)
    assert got.hidden.requires_grad and torch.equal(got.hidden[1:], expected)
    with torch.no_grad():
        without = model.features(tokens, documents=documents, keep=keep)
    assert torch.equal(got.hidden, without.hidden) and torch.equal(got.mtp, without.mtp)
    assert torch.equal(got.streams, without.streams)
    assert all(torch.equal(got.routing[layer], without.routing[layer]) for layer in without.routing)
    assert all(torch.equal(got.selection[layer], without.selection[layer]) for layer in without.selection)
    twin = plain_twin(model)
    theirs = twin.features(tokens, documents=documents, keep=keep)
    probe = torch.randn(got.hidden.shape, generator=torch.Generator().manual_seed(3))
    (
        (got.hidden * probe).sum() + (got.mtp[:, :-1] * probe[:, :-1]).sum() + model.head(got.hidden).square().mean()
    ).backward()
    loss = (theirs.hidden * probe).sum() + (theirs.mtp[:, :-1] * probe[:, :-1]).sum()
    (loss + twin.head(theirs.hidden).square().mean()).backward()
    for (name, mine), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            largest = float(other.grad.abs().max())
            assert float((mine.grad - other.grad).abs().max()) <= 1e-4 * largest + 1e-7, name
    model.zero_grad()


def test_padded_rows_train_on_their_real_tokens(model):
    tokens, lengths = tokens_of(2, 70), [70, 33]
    got = model.features(tokens, lengths=lengths).hidden
    with torch.no_grad():
        expected = model.features(tokens, lengths=lengths).hidden
    assert torch.equal(got, expected)
    (got[0].sum() + got[1, :33].sum()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_a_weight_that_is_no_number_reaches_every_position():
    model = shuffled(small())
    with torch.no_grad():
        model.layers[0].attn.wkv.weight[0, 0] = float("nan")
    with torch.no_grad():
        assert bool(model.features(tokens_of(1, 40)).hidden.isnan().all())
