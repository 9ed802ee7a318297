"""Text as it becomes certain: cut at the first stop string whatever the tokens, with nothing shown that is taken back."""

from __future__ import annotations

import random
import time

import pytest

from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.engine.stopping import TextStream
from longreach.errors import RequestError
from longreach.tokenizer.bpe import SMALLEST_VOCABULARY, Tokenizer

LETTERS = "ab\né€😀"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    generator = random.Random(0)
    words = ["".join(generator.choices(LETTERS, k=generator.randint(1, 6))) for _ in range(300)]
    return Tokenizer.train([" ".join(words)] * 3, SMALLEST_VOCABULARY + 80)


def random_tokens(tokenizer: Tokenizer, text: str, generator: random.Random) -> list[int]:
    """Any way of spelling the text in tokens, also in the middle of characters."""
    id_of = {spelling: index for index, spelling in enumerate(tokenizer.token_bytes) if spelling}
    data, at, ids = text.encode(), 0, []
    while at < len(data):
        ends = [end for end in range(at + 1, min(at + 12, len(data)) + 1) if data[at:end] in id_of]
        end = generator.choice(ends)
        ids.append(id_of[data[at:end]])
        at = end
    return ids


def single(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte."""
    return [tokenizer.token_bytes.index(bytes([byte])) for byte in text.encode()]


def run(stream: TextStream, ids: list[int]) -> list[str]:
    """The deltas; the last is what `finish` gave."""
    deltas = []
    for token_id in ids:
        deltas.append(stream.push(token_id))
        if stream.finish_reason is not None:
            break
    return [*deltas, stream.finish()]


def cut(text: str, stops: tuple[str, ...], include: bool = False) -> tuple[str, str | None]:
    """The reference: the stop string that is complete first, the longest of those that end at one place."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    end, start, stop = min(found, default=(len(text), len(text), None))
    return text[: end if include else start], stop


@pytest.mark.parametrize("seed", range(400))
def test_the_deltas_joined_are_the_text_cut_at_the_first_stop_string(tokenizer, seed):
    generator = random.Random(seed)
    letters = LETTERS[: generator.randint(1, len(LETTERS))]
    text = "".join(generator.choices(letters, k=generator.randint(0, 40)))
    stops = tuple(
        "".join(generator.choices(letters, k=generator.randint(1, 7))) for _ in range(generator.randint(0, 4))
    )
    include = generator.random() < 0.3
    stream = TextStream(tokenizer, SamplingParams(stop=stops, include_stop=include))
    ids = random_tokens(tokenizer, text, generator)
    deltas = run(stream, ids)
    expected, stop = cut(text, stops, include)
    assert "".join(deltas) == expected
    assert stream.stop_reason == stop
    assert stream.finish_reason is (None if stop is None else FinishReason.STOP)
    # The token that completed the stop string is the last one counted.
    assert cut(tokenizer.decode(ids[: stream.num_tokens]), stops)[1] == stop
    assert stop is None or cut(tokenizer.decode(ids[: stream.num_tokens - 1]), stops)[1] is None


@pytest.mark.parametrize("seed", range(60))
def test_any_bytes_at_all_give_the_decoded_text_cut_at_the_first_stop_string(tokenizer, seed):
    generator = random.Random(seed)
    ids = [generator.randrange(2, tokenizer.vocab_size) for _ in range(generator.randint(1, 30))]
    text = tokenizer.decode(ids)
    at = generator.randrange(len(text))
    stops = (text[at : at + generator.randint(1, 4)], "�" if seed % 2 else "no such text")
    stream = TextStream(tokenizer, SamplingParams(stop=stops))
    expected, stop = cut(text, stops)
    assert "".join(run(stream, ids)) == expected
    assert stream.stop_reason == stop


@pytest.mark.parametrize("seed", range(60))
def test_what_is_held_back_is_exactly_what_may_begin_a_stop_string(tokenizer, seed):
    generator = random.Random(seed)
    stops = tuple("".join(generator.choices("ab", k=generator.randint(2, 6))) for _ in range(2))
    stream = TextStream(tokenizer, SamplingParams(stop=stops))
    text, shown = "", ""
    for letter in generator.choices("ab", k=40):
        text, shown = text + letter, shown + stream.push(single(tokenizer, letter)[0])
        if stream.finish_reason is not None:
            return
        beginnings = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
        assert shown == text[: len(text) - max(beginnings)]


def test_a_stop_string_across_tokens_is_never_shown(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(stop=["b\nb"]))
    assert [stream.push(i) for i in single(tokenizer, "ab\na")] == ["a", "", "", "b\na"]
    assert [stream.push(i) for i in single(tokenizer, "b\nb")] == ["", "", ""]
    assert (stream.finish_reason, stream.stop_reason, stream.finish()) == (FinishReason.STOP, "b\nb", "")
    assert stream.num_tokens == 7


def test_a_stop_string_can_be_kept(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(stop="b", include_stop=True))
    assert "".join(run(stream, single(tokenizer, "aaba"))) == "aab"


def test_the_end_mark_releases_what_was_held_and_has_no_text(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(stop="bbb"))
    assert run(stream, [*single(tokenizer, "abb"), tokenizer.eos_id]) == ["a", "", "", "", "bb"]
    assert (stream.finish_reason, stream.stop_reason) == (FinishReason.STOP, tokenizer.eos_id)
    assert stream.num_tokens == 4


def test_an_ignored_end_mark_is_an_ordinary_token(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(ignore_eos=True))
    assert "".join(run(stream, [*single(tokenizer, "a"), tokenizer.eos_id, *single(tokenizer, "b")])) == (
        f"a{tokenizer.token_bytes[tokenizer.eos_id].decode()}b"
    )
    assert stream.finish_reason is None


def test_a_stop_token_ends_the_text_before_it(tokenizer):
    [b] = single(tokenizer, "b")
    stream = TextStream(tokenizer, SamplingParams(stop_token_ids=[b], include_stop=True))
    assert "".join(run(stream, single(tokenizer, "aabaa"))) == "aa"
    assert (stream.finish_reason, stream.stop_reason, stream.num_tokens) == (FinishReason.STOP, b, 3)


def test_max_tokens_ends_the_text_with_all_of_it_shown(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(max_tokens=3, stop="bbb"))
    assert run(stream, single(tokenizer, "abbbbb")) == ["a", "", "", "bb"]
    assert (stream.finish_reason, stream.stop_reason) == (FinishReason.LENGTH, None)


def test_a_stop_string_in_the_last_token_is_a_stop(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(max_tokens=3, stop="bb"))
    assert run(stream, single(tokenizer, "abb")) == ["a", "", "", ""]
    assert stream.finish_reason is FinishReason.STOP


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(max_tokens=3))
    assert run(stream, single(tokenizer, "a😀")) == ["a", "", "", "�"]


def test_a_stop_string_counts_only_from_min_tokens_on(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(min_tokens=5, stop="ab"))
    assert "".join(run(stream, single(tokenizer, "abaababab"))) == "aba"
    assert stream.num_tokens == 5


@pytest.mark.parametrize("seed", range(100))
def test_an_occurrence_before_min_tokens_is_passed_over_and_may_share_letters_with_the_next(tokenizer, seed):
    generator = random.Random(seed)
    text = "".join(generator.choices("ab", k=20))
    stop = "".join(generator.choices("ab", k=generator.randint(1, 4)))
    min_tokens = generator.randint(0, 15)
    stream = TextStream(tokenizer, SamplingParams(min_tokens=min_tokens, stop=stop))
    ends = [end for end in range(min_tokens, 21) if text[:end].endswith(stop)]
    expected = text[: ends[0] - len(stop)] if ends else text
    assert "".join(run(stream, single(tokenizer, text))) == expected
    assert stream.num_tokens == (ends[0] if ends else 20)


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.ERROR])
def test_a_request_ended_from_outside_keeps_its_text_and_gets_the_reason(tokenizer, reason):
    stream = TextStream(tokenizer, SamplingParams(stop="bbb"))
    assert [stream.push(i) for i in single(tokenizer, "abb")] == ["a", "", ""]
    assert stream.finish(reason) == "bb"
    assert stream.finish_reason is reason
    assert stream.finish(FinishReason.LENGTH) == ""
    assert stream.finish_reason is reason


def test_an_unknown_token_is_refused(tokenizer):
    with pytest.raises(RequestError, match="outside the vocabulary"):
        TextStream(tokenizer, SamplingParams()).push(tokenizer.vocab_size)


def test_a_long_text_of_near_misses_takes_time_in_proportion_to_its_length(tokenizer):
    # Every character could begin the stop string anew; looking again at what is held would take the square.
    stream = TextStream(tokenizer, SamplingParams(max_tokens=10**6, stop="a" * 5000 + "b"))
    [a] = single(tokenizer, "a")
    start = time.perf_counter()
    shown = sum(len(stream.push(a)) for _ in range(40_000))
    seconds = time.perf_counter() - start
    assert shown == 35_000
    assert seconds < 3, "0.1 s were measured"
