"""Batches for training as a pure function of (documents, seed, step): to resume is to ask for the next step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from longreach.data.packing import PackedRows


class Batch(NamedTuple):
    """One step's input."""

    tokens: torch.Tensor
    """int64 (B, T)."""
    documents: torch.Tensor
    """int64 (B, T): equal numbers in a row belong to one document."""


class TrainingStream:
    """Endless shuffled batches. Each pass has its own order of documents and of rows; each sees every row once.

    A batch may begin in one pass and end in the next, so every batch is full.
    """

    def __init__(self, documents: Sequence[np.ndarray], seq_len: int, rows_per_batch: int, seed: int):
        self._documents = documents
        self._seq_len = seq_len
        self._rows_per_batch = rows_per_batch
        self._seed = seed
        self._passes: dict[int, tuple[PackedRows, np.ndarray]] = {}
        self.rows_per_pass = len(self._pass(0)[0])

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0; always the same for the same step."""
        first = step * self._rows_per_batch
        tokens, documents = [], []
        for number, place in (divmod(first + i, self.rows_per_pass) for i in range(self._rows_per_batch)):
            rows, order = self._pass(number)
            row_tokens, row_documents = rows.take(order[place : place + 1])
            tokens.append(row_tokens)
            documents.append(row_documents)
        return Batch(torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(np.concatenate(documents)))

    def _pass(self, number: int) -> tuple[PackedRows, np.ndarray]:
        if number not in self._passes:
            # A batch touches at most the running pass and those after it; older ones are done.
            self._passes = {known: data for known, data in self._passes.items() if known == number - 1}
            rng = np.random.default_rng((self._seed, number))
            order = rng.permutation(len(self._documents))
            rows = PackedRows([self._documents[i] for i in order], self._seq_len)
            self._passes[number] = rows, rng.permutation(len(rows))
        return self._passes[number]


def in_order(documents: Sequence[np.ndarray], seq_len: int, rows_per_batch: int, max_tokens: int) -> Iterator[Batch]:
    """Batches for validation: the documents as they come, each row once, up to about `max_tokens` tokens.

    Data shorter than one row becomes one shorter row.
    """
    total = sum(map(len, documents))
    rows = PackedRows(documents, min(seq_len, total))
    count = min(len(rows), max(1, max_tokens // seq_len))
    for first in range(0, count, rows_per_batch):
        tokens, owners = rows.take(range(first, min(first + rows_per_batch, count)))
        yield Batch(torch.from_numpy(tokens), torch.from_numpy(owners))
