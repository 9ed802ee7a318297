"""The tokenizer: byte-level BPE with V4's special tokens, trained here or read from any published tokenizer.json.

    tokenizer = Tokenizer.train(texts, vocab_size=4096)
    tokenizer.encode("x = 1")                          text is text: "<think>" typed by a user is five ordinary pieces
    tokenizer.encode("<think>", allow_special=True)    only our own templates may mean the special token

Text is cut into words before merging, in the manner of DeepSeek-V3: runs of Chinese and Japanese; a punctuation mark with
the ASCII letters behind it; letters with at most one leading character; punctuation with an optional leading space and
the line ends behind it; line ends with the white space before them; white space. One difference: V3 groups up to three
digits, here each digit is its own token, so a small model sees every number in the same ten symbols.
No text is ever out of vocabulary, and decoding what was encoded gives it back byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from longreach.errors import RequestError
from longreach.runtime import write_atomic
from longreach.tokenizer.framing import framing_documents
from longreach.tokenizer.special import BOS, EOS, SPECIAL_TOKENS, placeholder

SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

_WORD = (
    r"[!-/:-@\[-`{-~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_CHINESE_JAPANESE = r"[一-龥぀-ゟ゠-ヿ]+"


class Tokenizer:
    """Text to ids and back. Immutable; safe to share between threads.

    Built from the text of a `tokenizer.json`. Two views of it are kept: one knows the special tokens, the other does not,
    so that text can never be mistaken for one.
    """

    def __init__(self, tokenizer_json: str):
        self._json = tokenizer_json
        self._full = tokenizers.Tokenizer.from_str(tokenizer_json)
        description = json.loads(tokenizer_json)
        added = description.get("added_tokens") or []
        description["added_tokens"] = []
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(description))
        self.special_ids: dict[str, int] = {token["content"]: token["id"] for token in added}
        """Id of every token that is more than text, by spelling."""
        self.vocab_size = max([self._full.get_vocab_size() - 1, *self.special_ids.values()]) + 1

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` until there are exactly `vocab_size` tokens. The same texts give the same tokenizer.

        A text too small for that many merges leaves placeholder tokens at the end, which no text ever encodes to.

        Raises:
            RequestError: `vocab_size` has no room for the special tokens and the 256 bytes.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise RequestError(
                f"a vocabulary of {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and 256 bytes "
                f"need {SMALLEST_VOCABULARY}"
            )
        texts = list(texts)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), behavior="isolated"),
                pre_tokenizers.Split(tokenizers.Regex(_CHINESE_JAPANESE), behavior="isolated"),
                pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        framing = framing_documents(sum(map(len, texts)))
        tokenizer.train_from_iterator(texts + framing, trainer)
        missing = vocab_size - tokenizer.get_vocab_size()
        tokenizer.add_special_tokens([placeholder(number) for number in range(missing)])
        assert tokenizer.get_vocab_size() == vocab_size
        return Tokenizer(tokenizer.to_str())

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or the one inside a directory.

        Raises:
            RequestError: it is absent or not a tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise RequestError(f"no tokenizer at {file}; copy the tokenizer.json the model was trained with there")
        try:
            return Tokenizer(file.read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers library raises bare Exception for whatever it cannot read
            raise RequestError(f"{file} is not a tokenizer.json that can be read: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` at `path` (a file, or a directory that gets it)."""
        path = Path(path)
        write_atomic(path / "tokenizer.json" if path.is_dir() else path, self._json)

    # ---- text to ids ------------------------------------------------------------------------------------------------

    @property
    def bos_id(self) -> int:
        """Begins every document."""
        return self.special_id(BOS)

    @property
    def eos_id(self) -> int:
        """Ends every document and every answer."""
        return self.special_id(EOS)

    def special_id(self, spelling: str) -> int:
        """The id of a special token.

        Raises:
            RequestError: this tokenizer has no such token.
        """
        if spelling not in self.special_ids:
            raise RequestError(f"this tokenizer has no special token {spelling!r}")
        return self.special_ids[spelling]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`, without begin or end marks.

        Args:
            text: any text.
            allow_special: take spellings of special tokens as those tokens. Leave it off for text from outside:
                a user who types `</think>` must not end the thinking.

        Raises:
            RequestError: `text` has half a surrogate pair, which no UTF-8 text has.
        """
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"the text is not valid Unicode at character {error.start}: {error.reason}"
                ) from None
        view = self._full if allow_special else self._plain
        return [encoding.ids for encoding in view.encode_batch_fast(list(texts), add_special_tokens=False)]

    # ---- ids to text ------------------------------------------------------------------------------------------------

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes each id stands for; a special token's are its spelling. Ids without a token are empty."""
        table = [b""] * self.vocab_size
        byte_of = _byte_of_letter()
        for token, index in self._plain.get_vocab().items():
            table[index] = (
                bytes(byte_of[letter] for letter in token) if byte_of.keys() >= set(token) else token.encode()
            )
        for token, index in self.special_ids.items():
            table[index] = token.encode()
        return tuple(table)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Like `decode`, before the bytes are read as UTF-8."""
        table = self.token_bytes
        parts = []
        for index in ids:
            if not 0 <= index < len(table):
                raise RequestError(f"token id {index} is outside the vocabulary of {len(table)}")
            parts.append(table[index])
        return b"".join(parts)


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable letter: itself where it has a visible one, else from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}
