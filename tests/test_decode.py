"""One token at a time through the compiled functions equals the same token through PyTorch's operators."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from shuffled import shuffled

from longreach.model.config import ModelConfig
from longreach.model.decode import NativeStep
from longreach.model.native_pass import NativeRows
from longreach.model.transformer import Transformer
from longreach.native import build, library, status
from longreach.ops.index import select_top
from longreach.ops.linear import linear, linear_reference

needs_library = pytest.mark.skipif(library() is None, reason=f"no compiled functions here: {status()}")


def small(**changes) -> ModelConfig:
    fields = dict(
        vocab_size=97, hidden_size=48, num_hidden_layers=5, compress_ratios=(0, 4, 8, 4, 16), num_attention_heads=4,
        head_dim=24, qk_rope_head_dim=8, q_lora_rank=20, o_groups=2, o_lora_rank=12, sliding_window=8,
        moe_intermediate_size=20, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1, num_hash_layers=1,
        index_n_heads=32, index_head_dim=16, index_topk=5, num_nextn_predict_layers=0, numerics="transformers", hc_mult=4,
        max_position_embeddings=4096,
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


def both_ways(model: Transformer, prompt: torch.Tensor, new: torch.Tensor, precision="float32", exact=True, **ask):
    """Features token by token, compiled; and by the operators, in float64 if `exact`."""
    assert NativeStep.of(model) is not None
    with without_native():
        plain = copy.deepcopy(model).double() if exact else model
    results = []
    for way in (nullcontext, without_native):
        which = model if way is nullcontext else plain
        cache = which.new_cache(prompt.shape[0], precision)
        which(prompt, cache, logits_to_keep=1)
        with way(), counted() as advanced:
            results.append([which.features(new[:, i : i + 1], cache, **ask) for i in range(new.shape[1])])
        assert len(advanced) == (new.shape[1] if way is nullcontext else 0)
    return results


@contextmanager
def without_native():
    """PyTorch's operators only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeStep, "of", classmethod(lambda cls, model: None))
        patch.setattr(NativeRows, "of", classmethod(lambda cls, model: None))
        patch.setattr("longreach.ops.linear.library", lambda: None)
        yield


@contextmanager
def counted():
    """How often the compiled step was taken."""
    taken, by_step, by_rows = [], NativeStep.advance, NativeRows.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeStep, "advance", lambda *arguments: (taken.append(1), by_step(*arguments))[1])
        patch.setattr(NativeRows, "decode", lambda *arguments: (taken.append(1), by_rows(*arguments))[1])
        yield taken


def assert_close(got: list, expected: list, tolerance: float = 3e-5) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        largest = theirs.hidden.abs().max()
        assert float((mine.hidden - theirs.hidden).abs().max() / largest) < tolerance
        assert mine.routing.keys() == theirs.routing.keys()
        for layer in mine.routing:
            assert torch.equal(mine.routing[layer].sort().values, theirs.routing[layer].sort().values)
        assert mine.selection.keys() == theirs.selection.keys()
        for layer in mine.selection:
            assert torch.equal(mine.selection[layer], theirs.selection[layer])


def assert_mostly_close(got: list, expected: list) -> None:
    """A value within float32's rounding of an FP8 step goes to the other side now and then, which moves its token."""
    pairs = zip(got, expected, strict=True)
    errors = [float((a.hidden - b.hidden).abs().max() / b.hidden.abs().max()) for a, b in pairs]
    assert errors[0] < 3e-5 and max(errors) < 0.1


@needs_library
@pytest.mark.parametrize("seed", range(24))
def test_a_decoded_token_equals_the_operators_on_random_shapes(seed):
    rng = random.Random(seed)
    kinds = [rng.choice((0, 4, 4, 8, 16)) for _ in range(rng.randint(1, 5))]
    heads = rng.choice((2, 4, 6))
    config = small(
        num_hidden_layers=len(kinds), compress_ratios=tuple(kinds), num_attention_heads=heads, o_groups=rng.choice((1, 2)),
        head_dim=rng.choice((16, 24, 80)), hidden_size=rng.choice((32, 72, 130)), hc_mult=rng.choice((2, 4, 5)),
        residual=rng.choice(("mhc", "mhc", "hc")), num_hash_layers=rng.choice((0, 1)), swiglu_limit=rng.choice((0.0, 1.0)),
        scoring_func=rng.choice(("sqrtsoftplus", "sigmoid", "softmax")), sliding_window=rng.choice((4, 8, 24)),
        index_topk=rng.choice((1, 5, 1000)), numerics="transformers",
    )  # fmt: skip
    model = shuffled(config, seed)
    batch, length = rng.choice((1, 1, 3)), rng.randint(1, 90)
    tokens = torch.randint(0, 97, (batch, length + 20), generator=torch.Generator().manual_seed(seed))
    got, expected = both_ways(
        model, tokens[:, :length], tokens[:, length:], keep=("routing", "selection"),
        attention=rng.choice(("sparse", "sparse", "dense")),
    )  # fmt: skip
    assert_close(got, expected)


@needs_library
@pytest.mark.parametrize("seed", range(4))
def test_the_released_rounding_is_made_at_the_same_places(seed):
    model = shuffled(small(numerics="official", head_dim=72, index_head_dim=32), seed)
    tokens = torch.randint(0, 97, (1, 60), generator=torch.Generator().manual_seed(seed))
    got, expected = both_ways(model, tokens[:, :40], tokens[:, 40:], exact=False)
    assert_mostly_close(got, expected)


@needs_library
@pytest.mark.parametrize("precision", ["bfloat16", "released"])
def test_storage_in_fewer_bits_is_read_the_same_way(precision):
    model = shuffled(small(head_dim=72, index_head_dim=32))
    tokens = torch.randint(0, 97, (2, 90), generator=torch.Generator().manual_seed(1))
    got, expected = both_ways(model, tokens[:, :70], tokens[:, 70:], precision, exact=False)
    assert_mostly_close(got, expected)


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        dict(attention="dense"),
        dict(attention="sliding"),
        dict(feed_forward="dense", intermediate_size=40, num_hash_layers=0),
    ],
    ids=["dense attention", "sliding window alone", "dense feed-forward"],
)
def test_what_the_switches_put_in_place_of_an_idea_decodes_too(change):
    model = shuffled(small(**change))
    tokens = torch.randint(0, 97, (1, 60), generator=torch.Generator().manual_seed(2))
    got, expected = both_ways(model, tokens[:, :40], tokens[:, 40:])
    assert_close(got, expected)


@needs_library
def test_rows_that_stand_at_different_lengths_decode_together():
    model = shuffled(small())
    tokens = torch.randint(0, 97, (3, 80), generator=torch.Generator().manual_seed(3))
    lengths = [33, 70, 5]
    together = model.new_cache(3)
    model(tokens[:, :70], together, lengths=lengths)
    new = tokens[:, 70:]
    with counted() as advanced:
        got = [model(new[:, i : i + 1], together) for i in range(10)]
    assert len(advanced) == 10
    with without_native():
        for row, length in enumerate(lengths):
            cache = model.new_cache(1)
            model(tokens[row : row + 1, :length], cache)
            for i in range(10):
                expected = model(new[row : row + 1, i : i + 1], cache)
                assert float((got[i][row] - expected[0]).detach().abs().max() / expected.detach().abs().max()) < 2e-5


@needs_library
def test_a_forked_cache_is_read_piece_by_piece():
    model = shuffled(small())
    tokens = torch.randint(0, 97, (1, 80), generator=torch.Generator().manual_seed(4))
    cache = model.new_cache(1)
    for cut in range(0, 60, 20):
        model(tokens[:, cut : cut + 20], cache)
        cache = cache.fork()
    twin = cache.fork()
    got = [model(tokens[:, i : i + 1], cache) for i in range(60, 80)]
    with without_native():
        expected = [model(tokens[:, i : i + 1], twin) for i in range(60, 80)]
    for mine, theirs in zip(got, expected, strict=True):
        assert float((mine - theirs).detach().abs().max() / theirs.detach().abs().max()) < 2e-5


@needs_library
def test_weights_that_change_or_move_are_seen():
    model = shuffled(small())
    tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(5))
    before = both_ways(model, tokens[:, :30], tokens[:, 30:])[0][-1].hidden
    with torch.no_grad():
        model.layers[1].attn.wo_b.weight.mul_(3.0)  # in place
    model.layers[2].ffn.experts.w2 = torch.nn.Parameter(model.layers[2].ffn.experts.w2.detach() * 3)  # another tensor
    got, expected = both_ways(model, tokens[:, :30], tokens[:, 30:])
    assert_close(got, expected)
    assert not torch.allclose(got[-1].hidden, before, rtol=1e-3)
    assert NativeStep.of(model.to(torch.bfloat16)) is None
    assert NativeStep.of(model.to(torch.float32)) is not None


@needs_library
def test_a_decoded_model_can_be_copied_and_pickled():
    model = shuffled(small())
    tokens = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(6))
    cache = model.new_cache(1)
    expected = [model(tokens[:, i : i + 1], cache) for i in range(9)][-1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        cache = twin.new_cache(1)
        assert torch.equal([twin(tokens[:, i : i + 1], cache) for i in range(9)][-1], expected)


@needs_library
def test_what_it_does_not_know_goes_the_other_way():
    assert NativeStep.of(Transformer(small(residual="plain"))) is None
    assert NativeStep.of(Transformer(small(arithmetic="invariant"))) is None
    assert NativeStep.of(Transformer(small(), dtype=torch.float64)) is None
    assert NativeStep.of(Transformer(small())) is not None


@needs_library
def test_a_number_that_is_none_stays_none():
    model = shuffled(small())
    with torch.no_grad():
        model.layers[0].attn.wkv.weight[0, 0] = float("nan")
    cache = model.new_cache(1)
    out = [model(torch.tensor([[t]]), cache) for t in range(40)][-1]
    assert bool(out.isnan().all())


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 512, 256), (3, 700, 129), (8, 129, 700), (2, 4096, 512), (1, 20000, 1)])
def test_a_product_of_few_rows_equals_torch(shape, threads):
    rows, out, inner = shape
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, inner, generator=generator), torch.randn(out, inner, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            got = linear(x, w)
            got_back = linear(x.t().contiguous().t(), w)  # a view whose rows are not together
    finally:
        torch.set_num_threads(before)
    expected = linear_reference(x.double(), w.double())
    for y in (got, got_back):
        assert float((y - expected).abs().max() / expected.abs().max()) < 2e-6


@needs_library
@pytest.mark.parametrize("seed", range(30))
def test_the_compiled_selection_is_that_of_select_top(seed):
    native, generator = library(), torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, 3000, (1,), generator=generator))
    k = int(torch.randint(1, count, (1,), generator=generator))
    scores = torch.randn(count, generator=generator)
    if seed % 3 == 0:
        scores = (scores * 2).round()  # mostly ties
    if seed % 3 == 1:
        scores = scores.relu()  # half of them exactly zero, as the indexer makes them
    scratch, chosen = torch.empty(count), torch.empty(k, dtype=torch.int64)
    native.lr_select_top(scores.data_ptr(), count, k, scratch.data_ptr(), chosen.data_ptr())
    assert torch.equal(chosen, select_top(scores, k))


def test_without_a_compiler_everything_runs_on_pytorch(tmp_path):
    program = (
        "import torch; from longreach.native import library, status; from longreach import ModelConfig, Transformer\n"
        "assert library() is None; print(status())\n"
        "m = Transformer(ModelConfig.preset('tiny')); c = m.new_cache(1)\n"
        "print(tuple(m(torch.tensor([[5]]), c).shape))"
    )
    for environment, reason in (
        ({"LONGREACH_NATIVE": "0"}, "LONGREACH_NATIVE=0"),
        ({"CC": "", "PATH": "/nowhere", "XDG_CACHE_HOME": str(tmp_path)}, "no C compiler"),
        ({"CC": "/bin/false", "XDG_CACHE_HOME": str(tmp_path)}, "refused the source"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert reason in done.stdout and "(1, 1, " in done.stdout


@needs_library
def test_it_is_compiled_once_and_left_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, how = build.build()
    assert path is not None and path.is_file() and "compiled by" in how
    stamp = path.stat().st_mtime_ns
    assert build.build()[0] == path and path.stat().st_mtime_ns == stamp
    assert [p.name for p in path.parent.iterdir()] == [path.name]
