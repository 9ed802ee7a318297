"""Text to ids and back."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from longreach.errors import RequestError
from longreach.tokenizer.bpe import SMALLEST_VOCABULARY, Tokenizer
from longreach.tokenizer.special import SPECIAL_TOKENS
from longreach.tokenizer.stream import StreamDecoder

TEXTS = [
    "def add(a, b):\n    return a + b  # 1234 and 5678\n" * 8,
    "The answer is 42. Größe, naïve, 你好世界, こんにちは, 😀🎉, \x00\t\r\n end",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=600)


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


def test_special_tokens_have_the_published_spelling_and_begin_and_end_are_0_and_1(tokenizer):
    bar, low = chr(0xFF5C), chr(0x2581)
    assert tokenizer.bos_id == tokenizer.special_id(f"<{bar}begin{low}of{low}sentence{bar}>") == 0
    assert tokenizer.eos_id == tokenizer.special_id(f"<{bar}end{low}of{low}sentence{bar}>") == 1
    names = ["User", "Assistant", "latest_reminder", "action", "query", "authority", "domain", "title", "read_url"]
    names += ["extracted_url", f"fim{low}begin", f"fim{low}hole", f"fim{low}end"]
    others = [f"<{bar}{name}{bar}>" for name in names] + ["<think>", "</think>", f"{bar}DSML{bar}"]
    assert sorted(tokenizer.special_id(token) for token in others) == list(range(2, 18))
    assert len(SPECIAL_TOKENS) == 18


@pytest.mark.parametrize(
    "text", [*TEXTS, "", " ", "\n\n", "a" * 1000, "<think>", "｜DSML｜ <｜User｜>", "\ufeffbom", "e\u0301"]
)
def test_decoding_what_was_encoded_gives_it_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_survives_the_round_trip_whole_and_streamed(tokenizer):
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(200):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        decoder = StreamDecoder(tokenizer)
        assert "".join([decoder.push(token) for token in ids] + [decoder.finish()]) == text


def test_text_that_looks_like_a_special_token_stays_text_unless_allowed(tokenizer):
    for spelling in SPECIAL_TOKENS:
        assert tokenizer.special_ids[spelling] not in tokenizer.encode(spelling)
        assert tokenizer.encode(spelling, allow_special=True) == [tokenizer.special_ids[spelling]]
    framed = tokenizer.encode("<think>a</think>", allow_special=True)
    assert framed == [tokenizer.special_id("<think>"), *tokenizer.encode("a"), tokenizer.special_id("</think>")]


def test_every_digit_is_its_own_token(tokenizer):
    assert words(tokenizer, "1234") == ["1", "2", "3", "4"]
    assert words(tokenizer, "42.")[:2] == ["4", "2"]


def test_text_is_cut_into_words_before_merging():
    # So much repetition that a word is one token exactly where the splitting rules allow it to be.
    line = " return x.append(item)\n\n    你好 caf\u00e9!\n"
    tokenizer = Tokenizer.train([line * 2000], vocab_size=1000)
    assert words(tokenizer, line) == [" return", " x", ".append", "(item", ")\n\n", "    ", "你好", " café", "!\n"]


def test_training_gives_exactly_the_asked_vocabulary_even_from_too_little_text():
    small = Tokenizer.train(["tiny"], vocab_size=1500)
    assert small.vocab_size == 1500
    assert len(small.token_bytes) == 1500
    assert all(small.token_bytes)
    placeholders = [token for token in small.special_ids if "place" in token]
    assert placeholders
    assert max(small.encode(" ".join(placeholders))) < min(small.special_ids[token] for token in placeholders)


def test_a_vocabulary_without_room_for_bytes_and_special_tokens_is_refused():
    assert SMALLEST_VOCABULARY == 18 + 256
    with pytest.raises(RequestError, match="273 is too small"):
        Tokenizer.train(["text"], vocab_size=273)


def test_the_same_texts_give_the_same_tokenizer_in_another_process_with_other_threads(tokenizer, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    program = (
        "import json, sys; from longreach.tokenizer.bpe import Tokenizer; "
        "Tokenizer.train(json.load(open(sys.argv[1])), 600).save(sys.argv[2])"
    )
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    tokenizer.save(here)
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "texts.json"), str(there)],
        check=True,
        env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PATH": ""},
        cwd=Path(__file__).parent.parent,
    )
    assert here.read_bytes() == there.read_bytes()


def test_a_saved_tokenizer_reads_back_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert again.special_ids == tokenizer.special_ids
    assert again.token_bytes == tokenizer.token_bytes


@pytest.mark.parametrize("content", ["{", "{}", "[]", "not json"])
def test_a_damaged_tokenizer_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RequestError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_words_of_chat_are_cheap():
    tokenizer = Tokenizer.train([TEXTS[0] * 200], vocab_size=2048)
    for word in (" assistant", "_calls", "invoke", "parameter", "Hello", " help", "tool", " name", "_result"):
        assert len(tokenizer.encode(word)) == 1, word


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer):
    with pytest.raises(RequestError, match="character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, 600, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, token):
    with pytest.raises(RequestError, match="outside the vocabulary of 600"):
        tokenizer.decode([token])


def test_a_streamed_character_appears_only_when_it_is_whole(tokenizer):
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("😀", allow_special=False)
    assert len(ids) > 1, "the test needs a character of several tokens"
    assert [decoder.push(token) for token in ids] == [""] * (len(ids) - 1) + ["😀"]
    assert decoder.push(ids[0]) == ""
    assert decoder.finish() == "\ufffd"
