"""What the indexer learns from: the tiled loss against the dense one, where its gradient goes, and that it teaches."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from test_cache import shape, text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import longreach.model.attention
import longreach.ops.attention
from longreach.errors import ShapeError
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.ops.attention import Layout, TensorEntries
from longreach.ops.index import index_scores, select_top
from longreach.ops.index_loss import IndexLoss, attention_recall, index_loss, index_loss_reference


@dataclass
class Problem:
    """One layer's tensors, as `sparse_attention` and the indexer leave them."""

    q: Tensor
    local: Tensor
    entries: Tensor
    sink: Tensor | None
    layout: Layout
    index_q: Tensor
    index_weight: Tensor
    index_keys: Tensor

    def loss(self, function=index_loss, chosen: Tensor | None = None, recall_at: int = 0) -> IndexLoss:
        held = (lambda t: t) if function is index_loss_reference else TensorEntries
        return function(
            self.q, self.local, held(self.entries), self.sink, self.layout,
            self.index_q, self.index_weight, held(self.index_keys), chosen, recall_at=recall_at,
        )  # fmt: skip

    def gradients(self, function=index_loss, chosen: Tensor | None = None) -> list[Tensor]:
        learners = [t.detach().requires_grad_() for t in (self.index_q, self.index_weight, self.index_keys)]
        mine = Problem(self.q, self.local, self.entries, self.sink, self.layout, *learners)
        (mine.loss(function, chosen).total * 0.7).backward()
        return [t.grad for t in learners]

    @property
    def visible_T(self) -> Tensor:
        return (self.layout.first_query + torch.arange(self.q.shape[1]) + 1) // self.layout.ratio

    def selected(self, k: int) -> Tensor:
        """The indexer's own choice, invalid places at or beyond what a query sees."""
        scores = index_scores(self.index_q, self.index_weight, self.index_keys)
        hidden = torch.arange(scores.shape[-1]) >= self.visible_T[:, None]
        return select_top(scores.masked_fill(hidden, float("-inf")), min(k, scores.shape[-1]))


def problem(seed: int, length: int | None = None, topk: int | None = None, first: int | None = None) -> Problem:
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T = r.choice([1, 2, 3]), length or r.choice([7, 70, 150])
    N, H, heads, width = r.choice([1, 2, 5]), r.choice([4, 12]), r.choice([1, 3, 8]), r.choice([4, 8])
    ratio, window = r.choice([1, 2, 4]), r.choice([0, 1, 9, 40])
    first = r.choice([0, 0, 13]) if first is None else first
    topk = topk or r.choice([1, 3, 20, 200])
    S = (first + T) // ratio
    first_key = max(0, first - window + 1)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=g) * std

    return Problem(
        normal(B, T, N, H, std=2),
        normal(B, (first + T - first_key) if window else 0, H),
        normal(B, S, H),
        r.choice([None, normal(N, std=2)]) if window else normal(N),  # a query must attend to something
        Layout(first, first_key, window, ratio, topk, H**-0.5, H),
        normal(B, T, heads, width),
        normal(B, T, heads, std=0.3),
        normal(B, S, width),
    )


def same(a: IndexLoss, b: IndexLoss) -> None:
    # A sum over some hundred queries: a relative bound, and an absolute one for sums that cancel to nothing.
    torch.testing.assert_close(a.total, b.total, rtol=1e-5, atol=1e-5)
    assert int(a.queries) == int(b.queries) and int(a.recall.queries) == int(b.recall.queries)
    torch.testing.assert_close(a.recall.kept, b.recall.kept, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.recall.chance, b.recall.chance, rtol=1e-5, atol=1e-5)


# ---- the function against its reference


@pytest.mark.parametrize("tile_logits", [1 << 23, 1 << 9])
@pytest.mark.parametrize("seed", range(16))
def test_over_all_visible_entries_it_equals_the_dense_reference(seed, tile_logits, monkeypatch):
    monkeypatch.setattr(longreach.ops.attention, "TILE_LOGITS", tile_logits)
    p = problem(seed)
    k = p.layout.chosen_limit
    same(p.loss(recall_at=k), p.loss(index_loss_reference, recall_at=k))
    for mine, expected in zip(p.gradients(), p.gradients(index_loss_reference), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(16))
def test_over_the_selected_entries_it_equals_the_dense_reference(seed):
    p = problem(100 + seed)
    k = p.layout.chosen_limit
    chosen = p.selected(k)
    same(p.loss(chosen=chosen, recall_at=k), p.loss(index_loss_reference, chosen, k))
    for mine, expected in zip(p.gradients(chosen=chosen), p.gradients(index_loss_reference, chosen), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_a_set_from_elsewhere_may_name_fewer_entries_none_or_invisible_ones(seed):
    p = problem(200 + seed)
    p.layout = Layout(**{**vars(p.layout), "chosen_limit": 0})
    B, T, S = *p.q.shape[:2], p.entries.shape[1]
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(B, T, S, generator=g).argsort(dim=-1)[..., : max(1, S // 2)]
    chosen = torch.where(torch.rand(chosen.shape, generator=g) < 0.3, -1, chosen)
    chosen[:, ::5] = -1
    same(p.loss(chosen=chosen, recall_at=2), p.loss(index_loss_reference, chosen, 2))
    for mine, expected in zip(p.gradients(chosen=chosen), p.gradients(index_loss_reference, chosen), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_selecting_everything_is_the_dense_loss():
    p = problem(3, length=70, first=0)
    everything = torch.arange(p.entries.shape[1]).expand(*p.q.shape[:2], -1)
    p.layout = Layout(**{**vars(p.layout), "chosen_limit": 0})
    torch.testing.assert_close(p.loss(chosen=everything).total, p.loss().total)


def test_a_head_that_looks_at_its_window_says_little():
    """Two heads see two entries; the first puts e^20 on its window and would prefer entry 0, the second entry 1 by e^3."""
    window_key, entries = torch.tensor([1.0, 0, 0]), torch.tensor([[0, 1.0, 0], [0, 0, 1.0]])
    heads = torch.tensor([[20.0, 3, 0], [-20, 0, 3]])
    uniform = torch.zeros(1, 2, 1)  # index weights of zero: every entry scores the same
    p = Problem(
        heads.expand(1, 2, 2, 3), window_key.expand(1, 2, 3), entries.unsqueeze(0), torch.zeros(2),
        Layout(0, 0, 1, 1, 8, 1.0, 3), torch.ones(1, 2, 1, 4), uniform, torch.ones(1, 2, 4),
    )  # fmt: skip
    z_first = 1 + math.exp(20) + math.exp(3) + 1  # sink, window, entries
    z_second = 1 + math.exp(-20) + 1 + math.exp(3)
    mass = [math.exp(3) / z_first + 1 / z_second, 1 / z_first + math.exp(3) / z_second]
    share = [m / sum(mass) for m in mass]
    expected = sum(s * math.log(2 * s) for s in share)  # the first query sees one entry: no divergence
    loss = p.loss()
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.49  # with a full voice for each head the teacher would be even and the divergence zero
    assert int(loss.queries) == 2


def test_queries_that_see_no_entry_count_for_nothing():
    p = problem(5, length=7, first=0)
    p.layout = Layout(**{**vars(p.layout), "ratio": 9})
    p.entries, p.index_keys = p.entries[:, :0], p.index_keys[:, :0]
    assert float(p.loss().total) == 0 and int(p.loss().queries) == 0 and float(p.loss().mean) == 0
    assert not any(g.any() for g in p.gradients())


def test_attention_that_underflows_teaches_nothing_and_breaks_nothing():
    p = problem(6, length=70)
    p.sink = torch.full((p.q.shape[2],), 300.0)
    assert float(p.loss().total) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in p.gradients())


def test_half_precision_inputs_are_computed_in_float32():
    p = problem(7, length=70)
    half = Problem(*[t.bfloat16() if isinstance(t, Tensor) else t for t in vars(p).values()])
    wide = Problem(*[t.float() if isinstance(t, Tensor) else t for t in vars(half).values()])
    assert half.loss().total.dtype == torch.float32
    torch.testing.assert_close(half.loss().total, wide.loss().total)
    for mine, expected in zip(half.gradients(), wide.gradients(), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, expected.bfloat16())


# ---- recall


def test_recall_is_the_share_of_dense_attention_that_the_choice_keeps():
    """Equal keys: attention is even, so any k of v entries keep k / v of it, which is also what chance keeps."""
    p = problem(8, length=60, first=0)
    p.entries = torch.ones_like(p.entries)
    recall = p.loss(recall_at=5).recall
    counted = p.visible_T[p.visible_T > 5]
    assert int(recall.queries) == p.q.shape[0] * len(counted)
    assert float(recall.mean) == pytest.approx(float((5 / counted).mean()), rel=1e-5)
    assert float(recall.mean_chance) == pytest.approx(float(recall.mean), rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_recall_lies_between_nothing_and_everything(seed):
    p = problem(300 + seed, length=150, topk=3)
    everything = torch.arange(p.entries.shape[1]).expand(*p.q.shape[:2], -1)

    def recall(chosen: Tensor) -> float:
        held = TensorEntries(p.entries)
        return float(attention_recall(p.q, p.local, held, p.sink, p.layout, chosen, topk=3).mean)

    assert recall(everything) == pytest.approx(1, abs=1e-5)
    assert recall(torch.full_like(everything, -1)) == 0
    assert 0 < recall(everything[..., 1:]) < 1
    assert 0 < float(p.loss(recall_at=3).recall.mean) < 1
    assert float(p.loss(recall_at=3).recall.kept) == pytest.approx(
        float(p.loss(chosen=p.selected(3), recall_at=3).recall.kept), rel=1e-5
    )


def test_recall_has_no_queries_where_all_visible_entries_fit():
    p = problem(9, length=70)
    recall = p.loss(recall_at=p.entries.shape[1]).recall
    assert int(recall.queries) == 0 and math.isnan(float(recall.mean))


def test_an_indexer_that_knows_nothing_keeps_what_chance_keeps_and_the_best_choice_keeps_more():
    kept = chance = best = 0.0
    for seed in range(20):
        p = problem(400 + seed, length=150, topk=5)
        recall = p.loss(recall_at=5).recall
        kept, chance = kept + float(recall.mean) / 20, chance + float(recall.mean_chance) / 20
        logits = torch.einsum("btnh,bsh->btns", p.q, p.entries) * p.layout.scale
        hidden = torch.arange(p.entries.shape[1]) >= p.visible_T[:, None]
        likely = logits.logsumexp(dim=2).masked_fill(hidden, float("-inf"))
        chosen = select_top(likely, 5)
        best += float(p.loss(chosen=chosen, recall_at=5).recall.mean) / 20
    assert abs(kept - chance) < 0.02, (kept, chance)
    assert best > chance + 0.15, (best, chance)


# ---- memory


class Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            # An expanded view is as large as what it stands on.
            if isinstance(t, Tensor):
                self.numel = max(self.numel, sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1)
        return out


@pytest.mark.parametrize("selects", [False, True])
def test_no_tensor_of_queries_times_entries_exists(selects):
    def largest(length: int, function) -> int:
        p = problem(10, length=length, topk=16, first=0)
        chosen = p.selected(16) if selects else None
        with Largest() as mode:
            p.gradients(function, chosen)
            if function is index_loss:
                p.loss(function, chosen, recall_at=16)
        return mode.numel

    assert largest(2048, index_loss) <= 2.1 * largest(1024, index_loss)
    assert largest(1024, index_loss_reference) > 3.5 * largest(512, index_loss_reference)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_a_training_pass_with_the_loss_allocates_in_proportion_to_its_length(attention):
    model = Transformer(shape(sliding_window=32, compress_ratios=(0, 4, 24, 4), index_n_heads=4), seed=0)

    def largest(length: int) -> int:
        with Largest() as mode:
            out = model.features(text(length), attention=attention, keep=("index_recall",))
            sum(loss.total for loss in out.index_loss.values()).backward()
        return mode.numel

    assert largest(2048) <= 2.1 * largest(1024)


# ---- through the model


@pytest.fixture
def model() -> Transformer:
    return Transformer(shape(), seed=2)


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def total(losses: dict[int, IndexLoss]) -> Tensor:
    return torch.stack([loss.total for loss in losses.values()]).sum()


def packing(batch: int) -> Tensor:
    """Document ids `[batch, 130]`: several documents in a row, one of them shorter than an entry."""
    rows = [([1, 2, 3, 4], [37, 3, 80, 10]), ([7, 8], [64, 66]), ([5], [130])]
    return torch.stack([torch.repeat_interleave(torch.tensor(a), torch.tensor(b)) for a, b in rows[:batch]])


@pytest.mark.parametrize("numerics", ["transformers", "official"])
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_the_loss_reaches_every_weight_of_the_indexers_and_no_other(attention, numerics):
    model = Transformer(shape(numerics=numerics), seed=2)
    out = model.features(text(130, batch=2), attention=attention, keep=("index_loss",))
    assert sorted(out.index_loss) == [1, 3]
    reached = gradients(model, total(out.index_loss))
    assert set(reached) == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert all(g.any() for g in reached.values())


@pytest.mark.parametrize("keep", [(), ("index_loss",)])
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_the_language_loss_never_reaches_an_indexer_and_does_not_change(model, attention, keep):
    plain = model.features(text(130), attention=attention).hidden
    hidden = model.features(text(130), attention=attention, keep=keep).hidden
    torch.testing.assert_close(hidden, plain, atol=0, rtol=0)
    reached = gradients(model, hidden.square().sum())
    assert reached and not any(".indexer." in name for name in reached)
    expected = gradients(model, plain.square().sum())
    for name, gradient in reached.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_gradients_of_all_indexer_weights_equal_those_of_the_dense_reference(model, attention, packed, monkeypatch):
    def run() -> tuple[dict[int, IndexLoss], dict[str, Tensor]]:
        documents = packing(3) if packed else None
        losses = model.features(
            text(130, batch=3), documents=documents, attention=attention, keep=("index_recall",)
        ).index_loss
        queries = sum(int(loss.queries) for loss in losses.values())
        return losses, gradients(model, total(losses) / queries)

    def reference(q, local, entries, sink, layout, index_q, index_weight, index_keys, chosen, *, recall_at):
        if entries is None:
            return index_loss(q, local, None, sink, layout, index_q, index_weight, None)
        return index_loss_reference(
            q, local, entries.entries, sink, layout, index_q, index_weight, index_keys.entries, chosen,
            recall_at=recall_at,
        )  # fmt: skip

    losses, mine = run()
    monkeypatch.setattr(longreach.model.attention, "index_loss", reference)
    expected_losses, expected = run()
    assert all(loss.recall.queries > 0 and loss.total > 0 for loss in losses.values())
    for layer in losses:
        same(losses[layer], expected_losses[layer])
    assert mine.keys() == expected.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], expected[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_the_loss_of_a_batch_of_packed_documents_is_the_sum_of_theirs(model, attention):
    tokens, documents = text(130, batch=2), packing(2)

    def losses(tokens: Tensor, documents: Tensor | None = None) -> dict[int, IndexLoss]:
        return model.features(tokens, documents=documents, attention=attention, keep=("index_recall",)).index_loss

    packed = losses(tokens, documents)
    alone = [losses(tokens[row : row + 1, documents[row] == d]) for row in range(2) for d in documents[row].unique()]
    for layer, loss in packed.items():
        first, *others = [part[layer] for part in alone]
        same(loss, sum(others, start=first))
        assert int(loss.queries) == sum(n - 3 for n in (37, 3, 80, 10, 64, 66))


def test_padding_teaches_nothing(model):
    tokens = text(60, batch=2)
    padded = model.features(tokens, lengths=[60, 33], attention="dense", keep=("index_loss",)).index_loss
    rows = [
        model.features(t, attention="dense", keep=("index_loss",)).index_loss for t in (tokens[:1], tokens[1:, :33])
    ]
    for layer, loss in padded.items():
        same(loss, rows[0][layer] + rows[1][layer])


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_both_arithmetics_give_the_same_loss_and_gradient(attention):
    results = []
    for arithmetic in ("fast", "invariant"):
        model = Transformer(shape(arithmetic=arithmetic), seed=2)
        losses = model.features(text(75, batch=2), attention=attention, keep=("index_recall",)).index_loss
        results.append((losses, gradients(model, total(losses) / 100)))
    (fast, fast_gradients), (invariant, invariant_gradients) = results
    for layer in fast:
        same(invariant[layer], fast[layer])
    for name, gradient in fast_gradients.items():
        torch.testing.assert_close(invariant_gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("arithmetic", ["fast", "invariant"])
def test_measured_in_chunks_or_over_a_cache_it_is_the_same(arithmetic, attention):
    class Small(Transformer):
        chunk_tokens = 64

    model, tokens = Small(shape(arithmetic=arithmetic), seed=2), text(150, batch=2)
    whole = model.features(tokens, attention=attention, keep=("index_recall",)).index_loss
    with torch.no_grad():
        chunked = model.features(tokens, attention=attention, keep=("index_recall",)).index_loss
    cache = model.new_cache(2)
    pieces = [
        model.features(piece, cache, attention=attention, keep=("index_recall",)).index_loss
        for piece in (tokens[:, :50], tokens[:, 50:51], tokens[:, 51:])
    ]
    for layer, loss in whole.items():
        detached = loss.map(Tensor.detach)
        same(chunked[layer], detached)
        same(pieces[0][layer] + pieces[1][layer] + pieces[2][layer], detached)


def test_a_selection_from_elsewhere_is_the_set_the_loss_is_taken_over(model):
    tokens = text(100)
    first = model.features(tokens, keep=("selection", "index_recall"))
    again = model.features(tokens, selection=first.selection, keep=("index_recall",))
    fewer = {layer: torch.where(torch.arange(s.shape[-1]) > 2, -1, s) for layer, s in first.selection.items()}
    less = model.features(tokens, selection=fewer, keep=("index_recall",))
    same(again.index_loss[1], first.index_loss[1])
    assert float(less.index_loss[1].recall.kept) < float(first.index_loss[1].recall.kept)
    assert not torch.isclose(less.index_loss[1].total, first.index_loss[1].total, rtol=1e-2)


def test_the_sparse_loss_measures_recall_only_when_asked(model):
    assert int(model.features(text(100), keep=("index_loss",)).index_loss[1].recall.queries) == 0
    assert int(model.features(text(100), keep=("index_recall",)).index_loss[1].recall.queries) > 0
    assert int(model.features(text(100), attention="dense", keep=("index_loss",)).index_loss[1].recall.queries) > 0
    assert not model.features(text(100)).index_loss


def test_dense_attention_runs_no_indexer_unless_it_learns_or_a_cache_wants_its_keys(model, monkeypatch):
    tokens = text(60)
    cache = model.new_cache()
    model.features(tokens, cache, attention="dense")
    assert cache.groups[0].stores[1].index_entries.count == 15

    def refuse(*_):
        raise AssertionError("the indexer ran")

    monkeypatch.setattr(longreach.model.attention.Indexer, "project", refuse)
    model.features(tokens, attention="dense")
    for arguments in (dict(attention="dense", keep=("index_loss",)), dict()):
        with pytest.raises(AssertionError, match="the indexer ran"):
            model.features(tokens, **arguments)


def test_an_indexer_that_does_not_learn_builds_no_graph(model, monkeypatch):
    made = []
    project = longreach.model.attention.Indexer.project

    def spy(*arguments):
        made.append(project(*arguments))
        return made[-1]

    monkeypatch.setattr(longreach.model.attention.Indexer, "project", spy)
    assert model.features(text(60)).hidden.requires_grad
    assert not any(t.requires_grad for parts in made for t in parts.values())
    made.clear()
    model.features(text(60), keep=("index_loss",))
    assert all(t.requires_grad for parts in made for t in parts.values())


def test_an_mtp_block_with_an_indexer_has_a_loss_of_its_own():
    model = Transformer(shape(compress_ratios=(0, 4, 24, 4, 4), num_nextn_predict_layers=1), seed=2)
    assert sorted(model.features(text(60), keep=("index_loss",)).index_loss) == [1, 3]
    losses = model.features(text(60), keep=("index_loss", "mtp")).index_loss
    assert sorted(losses) == [1, 3, 4]
    reached = gradients(model, losses[4].total)
    assert reached and all(name.startswith("mtp.0.attn.indexer.") for name in reached)


@pytest.mark.parametrize(
    "config",
    [shape(compress_ratios=(0, 24, 24, 0)), shape(attention="sliding"), shape(attention="dense")],
    ids=["no-csa", "sliding", "dense"],
)
@pytest.mark.parametrize("keep", ["index_loss", "index_recall"])
def test_a_model_without_indexers_refuses_to_keep_their_loss(config: ModelConfig, keep):
    with pytest.raises(ShapeError, match="no CSA layer"):
        Transformer(config).features(text(30), keep=(keep,))


def test_sixty_steps_on_the_loss_teach_an_indexer_where_attention_looks():
    config = shape(
        num_hidden_layers=1, compress_ratios=(4,), num_attention_heads=2, index_n_heads=8, initializer_range=0.3
    )
    model = Transformer(config, seed=3)
    with torch.no_grad():  # attention of a model that has not learned looks almost everywhere; sharpen it
        model.layers[0].attn.compressor.norm.weight *= 3
    optimizer = torch.optim.Adam(model.layers[0].attn.indexer.parameters(), lr=0.05)

    def loss_on(length: int, seed: int) -> IndexLoss:
        tokens = text(length, batch=4, seed=seed)
        return model.features(tokens, attention="dense", keep=("index_loss",)).index_loss[0]

    before = loss_on(200, seed=99).recall
    for step in range(60):
        optimizer.zero_grad()
        loss_on(120, seed=step).mean.backward()
        optimizer.step()
    after = loss_on(200, seed=99).recall
    chance = float(before.mean_chance)
    assert abs(float(before.mean) - chance) < 0.03, (float(before.mean), chance)
    assert float(after.mean) > chance + 0.12, (float(after.mean), chance)
