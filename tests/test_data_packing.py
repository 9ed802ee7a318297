"""Best-fit packing: nothing lost, little cut, little padding; and the shuffles the stream is built on."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from longreach.data.order import Shuffle, words
from longreach.data.packing import FILL_ABOVE, Piece, joined, pack, packing_figures


def whole(lengths: list[int]) -> list[Piece]:
    return [Piece(number, 0, length) for number, length in enumerate(lengths)]


def targets(rows: list[list[Piece]]) -> Counter:
    """Every (document, position) that some row predicts: all but the first of each piece."""
    return Counter((d, at) for row in rows for d, start, stop in row for at in range(start + 1, stop))


def sizes(row: list[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in row)


def fewest_rows(lengths: list[int], room: int) -> int:
    """The optimum, by trying every row for every document."""
    best = len(lengths)

    def place(number: int, rows: list[int]) -> None:
        nonlocal best
        if len(rows) >= best:
            return
        if number == len(lengths):
            best = len(rows)
            return
        for row in range(len(rows)):
            if rows[row] + lengths[number] <= room:
                place(number + 1, [used + lengths[number] * (at == row) for at, used in enumerate(rows)])
        place(number + 1, [*rows, lengths[number]])

    place(0, [])
    return best


def test_a_long_document_is_cut_into_full_rows_that_share_a_token_and_its_rest_goes_where_it_fits_best():
    # Rows of 8. Document 0 gives tokens 0-8 and 7-15, and a rest of three (14-17); 1 leaves room for 3, 2 for 4.
    rows = pack(whole([17, 5, 4]), seq_len=8)
    assert rows == [[(0, 0, 8)], [(0, 7, 15)], [(1, 0, 5), (0, 14, 17)], [(2, 0, 4)]]


def test_no_target_is_lost_or_comes_twice_and_no_row_is_too_long():
    rng = random.Random(0)
    for _ in range(400):
        seq_len = rng.randint(3, 40)
        lengths = [rng.randint(1, 3 * seq_len) for _ in range(rng.randint(1, 30))]
        rows = pack(whole(lengths), seq_len)
        assert all(0 < sizes(row) <= seq_len for row in rows)
        assert targets(rows) == Counter((d, at) for d, length in enumerate(lengths) for at in range(1, length))
        firsts = Counter(piece.document for row in rows for piece in row if piece.start == 0)
        assert firsts == Counter(range(len(lengths)))
        assert rows == pack(whole(lengths), seq_len), "the same documents give the same rows"


def test_the_number_of_rows_is_close_to_the_least_possible():
    rng = random.Random(1)
    hits = 0
    for _ in range(150):
        lengths = [rng.randint(2, 20) for _ in range(rng.randint(1, 9))]
        optimum, found = fewest_rows(lengths, 20), len(pack(whole(lengths), 20))
        # Best-fit decreasing needs at most 11/9 of the optimum; cutting documents only takes rows away.
        assert found <= 11 / 9 * optimum + 2 / 3
        hits += found <= optimum
    assert hits >= 140


def test_documents_that_fit_stay_whole_when_the_rows_come_out_full():
    rng = random.Random(2)
    lengths = [rng.randint(2, 128) for _ in range(2000)]
    padding, cut = packing_figures(pack(whole(lengths), 128), lengths, 128)
    assert cut < 0.01
    assert padding < 0.005


@pytest.mark.parametrize("length", [33, 40, 51, 60])
def test_documents_a_little_longer_than_half_a_row_are_cut_rather_than_half_the_rows_left_empty(length):
    lengths = [length] * 300
    rows = pack(whole(lengths), 64)
    padding, cut = packing_figures(rows, lengths, 64)
    assert padding <= FILL_ABOVE + 1 / len(rows)
    assert (cut > 0) == (length < 60), "room for four of 64 is left alone"
    assert targets(rows) == Counter((d, at) for d in range(300) for at in range(1, length))


def test_the_figures_count_padding_and_documents_that_need_not_have_been_cut():
    rows = [[Piece(0, 0, 4)], [Piece(0, 3, 6), Piece(1, 0, 1)], [Piece(1, 0, 3)]]
    assert packing_figures(rows, [6, 3], 4) == (1 - 11 / 12, 1.0), (
        "the long document does not count, the short one does"
    )


def test_pieces_of_a_document_become_one_again():
    pieces = [Piece(0, 0, 5), Piece(1, 3, 7), Piece(0, 4, 9), Piece(0, 12, 14), Piece(1, 0, 3)]
    assert joined(pieces) == [(0, 0, 9), (0, 12, 14), (1, 0, 3), (1, 3, 7)]
    rng = random.Random(3)
    for _ in range(50):
        lengths = [rng.randint(2, 200) for _ in range(20)]
        rows = pack(whole(lengths), rng.randint(3, 60))
        assert joined(piece for row in rows for piece in row) == whole(lengths)


def test_many_short_documents_fill_their_rows_almost_wholly():
    rng = random.Random(4)
    lengths = [rng.randint(2, 512) for _ in range(20_000)]
    padding, cut = packing_figures(pack(whole(lengths), 512), lengths, 512)
    assert padding < 0.003
    assert cut < 0.003


# ---- shuffles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000])
def test_a_shuffle_holds_every_number_once(size):
    for key in range(5):
        assert sorted(Shuffle(size, key)[place] for place in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        Shuffle(size, 0)[size]


def test_all_orders_are_about_equally_likely():
    counts = Counter(tuple(Shuffle(4, "test", key)[place] for place in range(4)) for key in range(4800))
    assert set(counts) == set(itertools.permutations(range(4)))
    # Chi-square with 23 degrees of freedom: above 49.7 in one case of a thousand.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7


def test_a_large_shuffle_has_no_pattern():
    order = Shuffle(10_000, "test", 1)
    steps = [order[place + 1] - order[place] for place in range(0, 9998)]
    assert max(Counter(steps).values()) < 12
    moved = [abs(order[place] - place) for place in range(10_000)]
    assert math.isclose(sum(moved) / 10_000, 10_000 / 3, rel_tol=0.03)


def test_keys_of_different_parts_give_different_numbers():
    assert words(1, 23) != words(12, 3)
    assert words("1", 23) != words(1, 23)
    # Fixed for ever: positions saved by earlier releases count on it.
    assert [Shuffle(8, 0)[place] for place in range(8)] == [5, 7, 0, 2, 3, 4, 1, 6]
