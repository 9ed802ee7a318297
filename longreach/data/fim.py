"""Fill in the middle: some documents are learned with their middle moved to the end, so that a model can write between.

    bos <fim▁begin> prefix <fim▁hole> suffix <fim▁end> middle eos            a share `rate` of the documents

The two cuts fall between any two characters, not only between tokens: a cursor stands in the middle of a word too. So
the three parts are encoded anew. Which documents, and where, depends on a key alone and not on the order of batches.
Source: DeepSeek-V4 report, section 4.2, which keeps V3's strategy (prefix-suffix-middle, per document, rate 0.1).
"""

from __future__ import annotations

import numpy as np

from longreach.data.order import words
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import FIM_BEGIN, FIM_END, FIM_HOLE

RATE = 0.1


class FillInMiddle:
    """Rearranges a share `rate` (0 to 1) of the documents it is shown.

    Raises:
        RequestError: the rate is outside 0 to 1, or the tokenizer lacks the three marks.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float = RATE):
        if not 0 <= rate <= 1:
            raise RequestError(f"--fim-rate {rate:g} must be from 0 to 1")
        self.rate = rate
        self._tokenizer = tokenizer
        self._begin, self._hole, self._end = map(tokenizer.special_id, (FIM_BEGIN, FIM_HOLE, FIM_END))
        self._is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_special[list(tokenizer.special_ids.values())] = True

    def rearranged(self, ids: np.ndarray, *key: int | str) -> np.ndarray | None:
        """The document with its middle last, int32; None if this key leaves it as it is.

        A document that is not begin mark, plain text, end mark is always left as it is: the special tokens inside would
        come back as text.
        """
        choice, first, second = (word / 2**64 for word in words("fim", *key)[:3])
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        if choice >= self.rate or len(ids) < 3 or ids[0] != bos or ids[-1] != eos or self._is_special[ids[1:-1]].any():
            return None
        try:
            text = self._tokenizer.decode_bytes(ids[1:-1].tolist()).decode("utf-8")
        except UnicodeDecodeError:
            return None
        start, stop = sorted((int(first * (len(text) + 1)), int(second * (len(text) + 1))))
        prefix, middle, suffix = self._tokenizer.encode_batch([text[:start], text[start:stop], text[stop:]])
        rearranged = [bos, self._begin, *prefix, self._hole, *suffix, self._end, *middle, eos]
        return np.array(rearranged, dtype=np.int32)
