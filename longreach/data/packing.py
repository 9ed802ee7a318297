"""Documents as ids, packed end to end into rows of equal length, every token knowing its document.

      document 0          document 1
    [bos a b c eos]     [bos d e eos]              two documents
    [bos a b c eos bos] [bos d e eos …]            rows of 6; a row begins with the last token of the row before,
     0   0 0 0 0   1     1   1 1 1                 so that each token is predicted exactly once per pass

The second array, `documents`, keeps packed neighbours apart: attention stays inside a document and no target crosses
into the next one. V4 trains this way (V3 let packed documents see each other).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer

_ENCODE_AT_ONCE = 64


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Each text as int32 ids: begin mark, text, end mark. Special tokens spelled out in a text stay text."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    encoded = []
    # In portions: an encoding in the making takes far more memory than its ids.
    for first in range(0, len(texts), _ENCODE_AT_ONCE):
        for ids in tokenizer.encode_batch(texts[first : first + _ENCODE_AT_ONCE]):
            encoded.append(np.array([bos, *ids, eos], dtype=np.int32))
    return encoded


class PackedRows:
    """Rows of `seq_len` tokens cut from documents laid end to end in the given order.

    The last tokens, too few for a row, are left out. Nothing is copied until a row is asked for.
    """

    def __init__(self, documents: Sequence[np.ndarray], seq_len: int):
        self.seq_len = seq_len
        self._tokens = np.concatenate(documents)
        self._document_of = np.repeat(np.arange(len(documents), dtype=np.int32), [len(d) for d in documents])
        if len(self._tokens) < seq_len:
            raise RequestError(
                f"the data holds {len(self._tokens)} tokens, fewer than one row of {seq_len}; "
                "give more text or a lower --seq-len"
            )

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // (self.seq_len - 1)

    def take(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, documents) of these rows, both int64 (len(rows), seq_len)."""
        index = np.asarray(rows, dtype=np.int64)[:, None] * (self.seq_len - 1) + np.arange(self.seq_len)
        return self._tokens[index].astype(np.int64), self._document_of[index].astype(np.int64)
