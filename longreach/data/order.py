"""Randomness without generators: shuffles and draws that are pure functions of a key.

    order = Shuffle(len(documents), seed, source, epoch)
    documents[order[0]], documents[order[1]], …          each once, in an order of this key's own

A shuffle of a billion documents takes a few bytes, any place of it can be asked for, and both stay the same from one
release of a library to the next, so a position saved today means the same batches in a year.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_WORD = (1 << 64) - 1


def words(*key: int | str) -> list[int]:
    """Eight independent, uniform 64-bit numbers that depend on `key` alone."""
    digest = hashlib.blake2b(repr(key).encode("utf-8")).digest()
    return [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8)]


class Shuffle:
    """A pseudo-random permutation of range(size), one for each key.

    A Feistel network permutes the smallest power of four that holds `size`; a number that lands outside goes through it
    again until it lands inside (at most four times on average).
    """

    def __init__(self, size: int, *key: int | str):
        self._size = size
        self._half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
        self._keys = words(*key)[:_ROUNDS]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._size:
            raise IndexError(place)
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = place >> half, place & mask
            for key in self._keys:
                mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & _WORD
                mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & _WORD
                left, right = right, left ^ ((mixed >> 31) & mask)
            place = left << half | right
            if place < self._size:
                return place
