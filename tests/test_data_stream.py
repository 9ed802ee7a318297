"""The training stream: every target once per pass, proportions, exact resume, filling in the middle, bounded memory."""

from __future__ import annotations

import json
import random
import weakref
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from longreach.data.documents import Documents, MemoryDocuments, encode_documents
from longreach.data.fim import FillInMiddle
from longreach.data.shards import write_shards
from longreach.data.stream import Batch, MixtureStream
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import FIM_BEGIN, FIM_END, FIM_HOLE

TEXTS = [f"def f{i}():\n" + f"    return {i} * 'é' + \"{'x' * (i % 7)}\"\n" * (1 + i * i % 11) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=360)


def numbered(lengths: list[int], first: int = 0) -> MemoryDocuments:
    """Documents whose tokens are all different, so that a token tells where it is from."""
    ends = np.cumsum([first, *lengths])
    return MemoryDocuments(np.arange(a, b) for a, b in pairwise(ends))


def varied(count: int, first: int = 0, longest: int = 60) -> MemoryDocuments:
    rng = random.Random(first)
    return numbered([rng.randint(2, longest) for _ in range(count)], first)


def predicted_tokens(batch: Batch) -> list[int]:
    """The tokens that a loss predicts: those behind a token of the same document, padding being none."""
    tokens, documents = batch
    inside = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    return tokens[:, 1:][inside].tolist()


def assert_equal(a: Batch, b: Batch) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.documents, b.documents)


def firsts(documents: Documents) -> set[int]:
    return {int(documents[number][0]) for number in range(len(documents))}


def test_a_batch_is_tokens_of_whole_documents_with_padding_marked():
    stream = MixtureStream([numbered([5, 3], first=10)], seed=0)
    tokens, documents = stream.next_batch(1, 8)
    assert tokens.tolist() == [[10, 11, 12, 13, 14, 15, 16, 17]]
    assert documents.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    tokens, documents = MixtureStream([numbered([5, 4], first=10)], seed=0).next_batch(2, 6)
    rows = sorted(zip(tokens.tolist(), documents.tolist(), strict=True))
    assert rows == [([10, 11, 12, 13, 14, 0], [0, 0, 0, 0, 0, -1]), ([15, 16, 17, 18, 0, 0], [0, 0, 0, 0, -1, -1])]
    assert (tokens.dtype, documents.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize("window_tokens", [200, 1000, 1 << 22])
def test_a_pass_predicts_every_token_once_and_the_next_pass_begins_where_it_ended(window_tokens):
    documents = varied(80)
    stream = MixtureStream([documents], seed=3, window_tokens=window_tokens)
    every = set(range(documents.num_tokens)) - firsts(documents)
    for pass_number in range(3):
        seen: list[int] = []
        rows = 0
        while len(seen) < len(every):
            seen += predicted_tokens(stream.next_batch(1, 24))
            rows += 1
        assert len(seen) == len(every)
        assert set(seen) == every
        assert pass_number > 0 or rows == MixtureStream([documents], seed=3, window_tokens=window_tokens).rows_per_pass(
            24
        )


def test_passes_and_seeds_differ_in_the_order_of_documents_and_of_rows():
    documents = varied(80)
    for window_tokens in (300, 1 << 22):  # what is in the first of several windows; the order of rows in a single one
        one, other = (MixtureStream([documents], seed=seed, window_tokens=window_tokens) for seed in (1, 2))
        rows = one.rows_per_pass(24)
        first, foreign = (set(predicted_tokens(stream.next_batch(10, 24))) for stream in (one, other))
        while one.passes[0] <= 1.0:
            start = one.state_dict()
            one.next_batch(1, 24)
        one.load_state_dict(start)
        one.next_batch(1, 24)
        second = set(predicted_tokens(one.next_batch(9, 24)))
        assert rows > 60
        for different in (foreign, second):
            assert len(first & different) < len(first) / 2


def test_when_rows_grow_longer_nothing_is_skipped_or_repeated_and_cut_documents_are_joined_again():
    documents = numbered([2000, 30, 700, 5, 64, 64])
    every = set(range(documents.num_tokens)) - firsts(documents)
    rng = random.Random(0)
    for seed in range(20):
        stream = MixtureStream([documents], seed=seed)
        seen: list[int] = []
        while len(seen) < len(every):
            seq_len = rng.choice([16, 64, 256, 1024])
            for _ in range(rng.randint(1, 4)):
                if len(seen) < len(every):
                    seen += predicted_tokens(stream.next_batch(1, seq_len))
        assert len(seen) == len(every)
        assert set(seen) == every
    stream = MixtureStream([numbered([1000])], seed=0)
    stream.next_batch(1, 4)
    assert (stream.next_batch(1, 900).documents == 0).sum() >= 490, "996 tokens left, in at most two runs"


# ---- resume ---------------------------------------------------------------------------------------------------------


def schedule(rng: random.Random, steps: int) -> list[tuple[int, int]]:
    """A batch ramp with sequence lengths that change now and then."""
    plan, seq_len = [], 16
    for step in range(steps):
        if rng.random() < 0.15:
            seq_len = rng.choice([8, 16, 32, 100])
        plan.append((1 + step // 10 + rng.randint(0, 1), seq_len))
    return plan


@pytest.mark.parametrize("window_tokens", [150, 900, 1 << 20])
def test_a_stream_goes_on_bit_for_bit_from_any_position(tokenizer, window_tokens):
    documents = MemoryDocuments(encode_documents(TEXTS, tokenizer))
    sources = [documents, varied(40), varied(7, first=100, longest=300)]

    def new() -> MixtureStream:
        fim = FillInMiddle(tokenizer, 0.3)
        return MixtureStream(sources, [3, 1, 0.5], seed=5, fim=fim, window_tokens=window_tokens)

    rng = random.Random(window_tokens)
    for _ in range(2):
        plan = schedule(rng, 40)
        unbroken = new()
        batches, states = [], []
        for rows, seq_len in plan:
            states.append(json.dumps(unbroken.state_dict()))
            batches.append(unbroken.next_batch(rows, seq_len))
        for cut in (0, *rng.sample(range(len(plan)), 5)):
            resumed = new()
            resumed.load_state_dict(json.loads(states[cut]))
            assert json.dumps(resumed.state_dict()) == states[cut]
            for batch, (rows, seq_len) in zip(batches[cut:], plan[cut:], strict=True):
                assert_equal(batch, resumed.next_batch(rows, seq_len))


def test_resuming_far_into_the_data_reads_one_window_only():
    documents = numbered([20] * 5000)
    stream = MixtureStream([documents], seed=0, window_tokens=1000)
    for _ in range(100):
        stream.next_batch(32, 20)
    state = stream.state_dict()
    assert len(json.dumps(state)) < 400
    counted = Counting(documents)
    resumed = MixtureStream([counted], seed=0, window_tokens=1000)
    resumed.load_state_dict(state)
    assert counted.reads == 50
    assert_equal(resumed.next_batch(4, 20), stream.next_batch(4, 20))


def test_a_position_in_other_data_is_refused():
    state = MixtureStream([varied(10)], seed=1).state_dict()
    for other, message in (
        (MixtureStream([varied(11)], seed=1), "has data .* where the run began with"),
        (MixtureStream([varied(10)], seed=2), "has seed 2 where the run began with 1"),
        (MixtureStream([varied(10)], [2], seed=1), "has weights"),
        (MixtureStream([varied(10)], seed=1, window_tokens=99), "has window_tokens 99"),
    ):
        with pytest.raises(RequestError, match=message):
            other.load_state_dict(state)
    again = MixtureStream([varied(10)], seed=1)
    again.load_state_dict(state)


def test_documents_on_disk_and_in_memory_give_the_same_batches_and_positions(tokenizer, tmp_path):
    encoded = encode_documents(TEXTS, tokenizer)
    disk = MixtureStream([write_shards(encoded, tmp_path / "shards", tokenizer, shard_tokens=500)], seed=0)
    memory = MixtureStream([MemoryDocuments(encoded)], seed=0)
    for _ in range(5):
        assert_equal(disk.next_batch(3, 40), memory.next_batch(3, 40))
        disk.load_state_dict(memory.state_dict())


# ---- mixtures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.2, 0.8]])
def test_proportions_hold_at_every_moment(weights):
    rng = random.Random(0)
    a, b = (numbered([rng.randint(10, 50) for _ in range(count)], first) for count, first in ((400, 0), (90, 10**6)))
    stream = MixtureStream([a, b], weights, seed=0, window_tokens=8000)
    counts = np.zeros(2)
    for step in range(150):
        tokens, documents = stream.next_batch(4, 50)
        of_b = tokens[documents >= 0] >= 10**6
        counts += [(~of_b).sum(), of_b.sum()]
        if step >= 3:
            # A few rows of 50 may be ahead: each source has rows of its own, and rests share theirs.
            assert abs(counts[0] - counts.sum() * weights[0] / sum(weights)) < 600 + 0.01 * counts.sum(), step
    assert counts[0] / counts.sum() == pytest.approx(weights[0] / sum(weights), abs=0.02)


def test_without_weights_sources_of_any_size_end_their_passes_together():
    a, b = varied(300), varied(30, first=10**6)
    stream = MixtureStream([a, b], seed=0)
    rows = stream.rows_per_pass(50)
    seen = Counter(predicted_tokens(stream.next_batch(rows, 50)))
    assert set(seen) == set(range(a.num_tokens)) - firsts(a) | {int(t) for n in range(len(b)) for t in b[n][1:]}
    repeated = sum(count - 1 for count in seen.values())
    assert repeated < 2 * 60, "one source may be a document or two ahead"


def test_a_small_source_with_a_large_weight_is_repeated():
    stream = MixtureStream([varied(500), numbered([40], first=10**6)], [1, 1], seed=0, window_tokens=2000)
    tokens, documents = stream.next_batch(100, 64)
    assert ((tokens >= 10**6) & (documents >= 0)).sum() / (documents >= 0).sum() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([], None, "one is empty"),
        ([[]], None, "one is empty"),
        ([[3]], [0], "one number above 0"),
        ([[3]], [float("nan")], "one number above 0"),
        ([[3], [4]], [1], r"weights \[1\] must be one number above 0 for each of 2 sources"),
    ],
)
def test_impossible_mixtures_are_refused(sources, weights, message):
    with pytest.raises(RequestError, match=message):
        MixtureStream([numbered(lengths) for lengths in sources], weights, seed=0)


def test_data_shorter_than_a_row_is_refused():
    with pytest.raises(RequestError, match="the data holds 5 tokens, fewer than one row of 8; give more text"):
        MixtureStream([numbered([5])], seed=0).next_batch(1, 8)


# ---- filling in the middle ------------------------------------------------------------------------------------------


def put_back(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a rearranged document in its old order."""
    begin, hole, end = (ids.tolist().index(tokenizer.special_id(mark)) for mark in (FIM_BEGIN, FIM_HOLE, FIM_END))
    assert (ids[0], begin, ids[-1]) == (tokenizer.bos_id, 1, tokenizer.eos_id)
    parts = ids[begin + 1 : hole], ids[end + 1 : -1], ids[hole + 1 : end]
    return "".join(tokenizer.decode(part.tolist()) for part in parts)


def test_a_rearranged_document_is_prefix_suffix_middle_and_holds_the_text_exactly(tokenizer):
    fim = FillInMiddle(tokenizer, 1.0)
    cuts_in_tokens = 0
    for number, ids in enumerate(encode_documents(TEXTS, tokenizer)):
        rearranged = fim.rearranged(ids, 0, number)
        assert rearranged is not None
        assert put_back(rearranged, tokenizer) == TEXTS[number]
        np.testing.assert_array_equal(rearranged, fim.rearranged(ids, 0, number))
        cuts_in_tokens += len(rearranged) > len(ids) + 3
    assert cuts_in_tokens > 20, "cuts between characters split tokens"


def test_the_share_of_rearranged_documents_is_the_rate_and_every_pass_chooses_anew(tokenizer):
    ids = encode_documents(["a b c d e f"], tokenizer)[0]
    for rate in (0.0, 0.1, 0.5, 1.0):
        fim = FillInMiddle(tokenizer, rate)
        chosen = [fim.rearranged(ids, 0, 0, pass_number) is not None for pass_number in range(3000)]
        assert sum(chosen) / 3000 == pytest.approx(rate, abs=0.03)
    results = {tuple(FillInMiddle(tokenizer, 1.0).rearranged(ids, number)) for number in range(300)}
    assert len(results) > 55, "eleven characters can be cut in 78 ways"


def test_what_is_not_plain_text_between_its_marks_is_left_alone(tokenizer):
    fim = FillInMiddle(tokenizer, 1.0)
    text = tokenizer.encode("é")
    for ids in ([0, 1], [], [5, 6, 7], [0, *text, 5, 1], [0, text[0], 1] if len(text) > 1 else [0, 1]):
        assert fim.rearranged(np.array(ids, dtype=np.int32), 0) is None


def test_the_stream_rearranges_at_the_rate_whatever_the_batches_are(tokenizer):
    documents = MemoryDocuments(encode_documents(TEXTS * 5, tokenizer))
    hole = tokenizer.special_id(FIM_HOLE)

    def rearranged_in_a_pass(rows: int, seq_len: int, window_tokens: int = 1 << 20) -> list[tuple[int, ...]]:
        fim = FillInMiddle(tokenizer, 0.2)
        stream = MixtureStream([documents], seed=0, fim=fim, window_tokens=window_tokens)
        total = stream.rows_per_pass(seq_len)
        found = []
        for count in [rows] * (total // rows) + [total % rows] * (total % rows > 0):
            for tokens, owners in zip(*stream.next_batch(count, seq_len), strict=True):
                for number in range(int(owners.max()) + 1):
                    if hole in (document := tokens[owners == number].tolist()):
                        found.append(tuple(document))
        return sorted(found)

    found = rearranged_in_a_pass(4, 2000)
    assert 35 <= len(found) <= 85
    assert found == rearranged_in_a_pass(7, 4000)
    assert found == rearranged_in_a_pass(4, 2000, window_tokens=5000)
    assert all(put_back(np.array(ids), tokenizer) in TEXTS for ids in found)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_outside_0_to_1_is_refused(tokenizer, rate):
    with pytest.raises(RequestError, match=r"--fim-rate .* must be from 0 to 1"):
        FillInMiddle(tokenizer, rate)


def test_a_tokenizer_without_the_marks_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text().replace(FIM_HOLE, "<hole>")
    with pytest.raises(RequestError, match="no special token"):
        FillInMiddle(Tokenizer(text))


# ---- memory ---------------------------------------------------------------------------------------------------------


class Counting:
    """Documents made when asked for; knows how many were asked for and how many are still held by someone."""

    def __init__(self, documents: MemoryDocuments):
        self._documents = documents
        self.num_tokens, self.digest = documents.num_tokens, documents.digest
        self.reads = self.held = self.most_held = 0

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> np.ndarray:
        self.reads += 1
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        document = self._documents[index].copy()
        weakref.finalize(document, self._let_go)
        return document

    def _let_go(self) -> None:
        self.held -= 1


def test_no_more_than_a_few_documents_are_held_at_a_time(tokenizer):
    plain = Counting(varied(2000))
    stream = MixtureStream([plain], seed=0, window_tokens=5000)
    for _ in range(30):
        stream.next_batch(8, 64)
        assert len(stream._drawn) < 5000 / 2
    assert plain.reads > 500
    assert plain.most_held <= 3

    # Rearranged documents are kept, but no longer than their window.
    encoded = encode_documents(TEXTS * 20, tokenizer)
    stream = MixtureStream([MemoryDocuments(encoded)], seed=0, fim=FillInMiddle(tokenizer, 1.0), window_tokens=3000)
    for _ in range(30):
        stream.next_batch(8, 64)
        kept = sum(len(drawn.rearranged) for drawn in stream._drawn if drawn.rearranged is not None)
        assert 0 < kept < 3 * 3000
