"""The engine's tensors: an arena of pages and state blocks says what a contiguous cache says, shared or not."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from longreach.errors import CacheError
from longreach.model.config import ModelConfig
from longreach.model.paged import (
    Arena,
    PagedSequence,
    SavedState,
    Segment,
    from_bytes,
    page_nbytes,
    page_tokens,
    replay_start,
    slid,
    to_bytes,
)
from longreach.model.stores import REWIND, FloatCodec, Recent
from longreach.model.transformer import Transformer


def shape(**changes) -> ModelConfig:
    return replace(ModelConfig.preset("tiny"), **changes)


@pytest.fixture(scope="module", params=["fast", "invariant"])
def model(request) -> Transformer:
    return Transformer(shape(arithmetic=request.param), seed=3).eval()


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 4096, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def arena_of(model: Transformer, slots: int = 4, pages: int = 24) -> Arena:
    """With pages full of NaN: whoever reads what nobody has written will say so."""
    arena = Arena(model.config, num_slots=slots, num_pages=pages)
    for layer in arena.layers:
        for part in layer.page_parts():
            part.fill_(float("nan"))
    return arena


def sequence_of(arena: Arena, slot: int, pages: list[int]) -> PagedSequence:
    sequence = PagedSequence(arena, slot)
    sequence.pages = list(pages)
    return sequence


def expected(model: Transformer, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.features(torch.tensor([tokens])).hidden


def same(model: Transformer, a: torch.Tensor, b: torch.Tensor) -> bool:
    if model.config.arithmetic == "invariant":
        return torch.equal(a, b)
    return torch.allclose(a, b, atol=2e-5, rtol=1e-5)


def test_segments_of_several_sequences_in_one_pass_say_what_each_says_alone(model):
    arena = arena_of(model)
    a, b = text(300, 1), text(170, 2)
    first, second = sequence_of(arena, 2, [9, 4, 17]), sequence_of(arena, 0, [3, 5])
    out = model.extend([Segment(first, a[:130]), Segment(second, b[:7])]).hidden
    assert same(model, out[:, :130], expected(model, a)[:, :130])
    assert same(model, out[:, 130:], expected(model, b)[:, :7])
    out = model.extend([Segment(second, b[7:]), Segment(first, a[130:131])]).hidden
    assert same(model, out[:, :163], expected(model, b)[:, 7:])
    out = model.extend([Segment(first, a[131:])]).hidden
    assert same(model, out, expected(model, a)[:, 131:])
    assert (first.length, second.length) == (300, 170)


@pytest.mark.parametrize("cut", [1, 31, 64, 127, 128, 129, 200])
def test_a_second_sequence_goes_on_from_shared_pages_and_a_copied_state_block(model, cut):
    arena = arena_of(model)
    tokens = text(260)
    first = sequence_of(arena, 0, [0, 1, 2])
    model.extend([Segment(first, tokens[:cut])])
    full = cut // arena.page_tokens
    second = sequence_of(arena, 1, [*range(full), 10, 11, 12])
    second.load(first.save())
    other = text(60, 9)
    branch = model.extend([Segment(second, other)]).hidden
    assert same(model, branch, expected(model, tokens[:cut] + other)[:, cut:])
    onward = model.extend([Segment(first, tokens[cut:])]).hidden
    assert same(model, onward, expected(model, tokens)[:, cut:])


@pytest.mark.parametrize("cut", [1, 3, 64, 127, 128, 129, 200, 256, 300])
@pytest.mark.parametrize("slack", [0, REWIND])
def test_a_saved_state_goes_through_bytes_and_can_be_cut_back_by_its_slack(model, cut, slack):
    arena, other = arena_of(model), arena_of(model)
    tokens = text(420)
    first = sequence_of(arena, 0, [0, 1, 2, 3])
    model.extend([Segment(first, tokens[:cut])])
    saved = first.save(slack)
    again = SavedState.from_bytes(other, saved.numbers(), b"".join(to_bytes(saved.tensors)))
    assert again.nbytes == saved.nbytes and again.rewind_limit == saved.rewind_limit
    second = sequence_of(other, 3, [7, 6, 5, 4])
    for page, twin in zip(first.pages[: cut // 128], second.pages, strict=False):
        payload = b"".join(to_bytes(arena.page_tensors(page)))
        for view, tensor in zip(other.page_tensors(twin), from_bytes(other.page_tensors(twin), payload), strict=True):
            view.copy_(tensor)
    second.load(again)
    back = max(second.rewind_limit, cut - 40)
    second.truncate(back)
    assert slack == 0 or back == max(0, cut - 40)
    out = model.extend([Segment(second, tokens[back:])]).hidden
    assert same(model, out, expected(model, tokens)[:, back:])
    with pytest.raises(CacheError, match="bytes where this model needs"):
        SavedState.from_bytes(other, saved.numbers(), b"")


def test_a_window_rebuilt_over_cached_entries_says_what_a_cold_run_says():
    # Two layers suffice: the window is right after layers x (window - 1) tokens, and pages are 128.
    for arithmetic in ("fast", "invariant"):
        config = shape(arithmetic=arithmetic, compress_ratios=(0, 4, 32, 0), num_hidden_layers=3)
        model = Transformer(config, seed=5).eval()
        arena = arena_of(model)
        tokens = text(700)
        whole = expected(model, tokens)
        writer = sequence_of(arena, 0, list(range(6)))
        model.extend([Segment(writer, tokens[:640])])
        before = [part.clone() for layer in arena.layers for part in layer.page_parts()]
        reader = sequence_of(arena, 1, [0, 1, 2, 3, 4, 9])
        start = replay_start(config, 640)
        reader.replay(640, start)
        assert start == 384 and reader.length == 384, "the rebuilding skips three pages of five"
        model.extend([Segment(reader, tokens[start:640])])
        kept = [part for layer in arena.layers for part in layer.page_parts()]
        assert all(torch.equal(a[:5], b[:5]) for a, b in zip(before, kept, strict=True)), "shared pages were written"
        out = model.extend([Segment(reader, tokens[640:])]).hidden
        assert same(model, out, whole[:, 640:])
        with pytest.raises(CacheError, match="cannot truncate from 700 to 639"):
            reader.truncate(639)


def test_a_sequence_rewinds_as_far_as_its_buffers_reach_and_says_the_same_again(model):
    arena, tokens, generator = arena_of(model), text(600, 4), random.Random(0)
    whole = expected(model, tokens)
    sequence = sequence_of(arena, 0, list(range(5)))
    while sequence.length < 600:
        count = min(generator.choice([1, 1, 2, 5, 30, 64, 65, 130, 260]), 600 - sequence.length)
        at = sequence.length
        out = model.extend([Segment(sequence, tokens[at : at + count])]).hidden
        assert same(model, out, whole[:, at : at + count])
        if generator.random() < 0.5:
            assert sequence.rewind_limit <= max(0, sequence.length - REWIND)
            back = generator.randint(max(sequence.rewind_limit, sequence.length - 100), sequence.length)
            sequence.truncate(back)


def test_the_integers_of_a_sliding_buffer_follow_the_buffer():
    generator = random.Random(1)
    for keep in (7, 71, 191):
        recent = Recent(1, keep, FloatCodec(1, torch.float32), torch.device("cpu"), torch.float32)
        lo = 0
        for _ in range(300):
            count = generator.randint(1, keep + 20)
            lo = slid(lo, recent.hi, count, keep)
            recent.push(torch.zeros(1, count, 1))
            assert recent.lo == lo


def test_a_page_holds_32_entries_and_keys_of_csa_and_one_entry_of_hca_for_128_tokens():
    config = ModelConfig.preset("flash")
    assert page_tokens(config) == 128
    csa, hca = 21, 20
    assert page_nbytes(config, "released") == csa * 32 * (584 + 68) + hca * 584
    # With ratios 4 and 32 a page of 128 tokens still fills evenly; with 48 it takes 144.
    assert page_tokens(ModelConfig.preset("tiny")) == 128
    assert page_tokens(shape(compress_ratios=(0, 0, 4, 48, 4, 48, 0))) == 144


def test_a_released_precision_arena_says_what_a_released_cache_says():
    model = Transformer(ModelConfig.preset("tiny"), seed=3).eval()
    tokens = torch.tensor([text(200)])
    cache = model.new_cache(1, precision="released")
    theirs = torch.cat([model.features(tokens[:, a : a + 50], cache).hidden for a in range(0, 200, 50)], dim=1)
    arena = Arena(model.config, num_slots=1, num_pages=2, precision="released")
    sequence = sequence_of(arena, 0, [1, 0])
    ours = [model.extend([Segment(sequence, tokens[0, a : a + 50].tolist())]).hidden for a in range(0, 200, 50)]
    torch.testing.assert_close(torch.cat(ours, dim=1), theirs, atol=2e-5, rtol=1e-5)
