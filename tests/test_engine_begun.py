"""Requests taken up where an interruption left them."""

from __future__ import annotations

import pytest
from serving import make_tokenizer

from longreach.engine.llm import LLM
from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer

PARAMS = SamplingParams(max_tokens=24, temperature=1.0, seed=5, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size, arithmetic="invariant")
    return Transformer(config, seed=3)


def finish(llm: LLM, request) -> list[tuple[int, float]]:
    made = []
    while not request.is_finished:
        for output in llm.engine.step():
            made += [(token.token_id, token.logprob) for token in output.tokens]
    return made


@pytest.mark.parametrize("cut", [1, 2, 11, 23])
@pytest.mark.parametrize("extra", [{}, {"frequency_penalty": 0.7, "top_p": 0.9}])
def test_a_request_goes_on_behind_its_tokens_as_if_it_had_never_stopped(model, tokenizer, cut, extra):
    import dataclasses

    params = dataclasses.replace(PARAMS, **extra)
    with LLM(model, tokenizer=tokenizer, memory_gib=0.05) as llm:
        prompt = [1, 2, *range(300, 380)]
        whole = finish(llm, llm.engine.submit(prompt, params))
        ids = [token for token, _ in whole]
        request = llm.engine.submit(prompt, params, begun=ids[:cut])
        rest = finish(llm, request)
        assert rest == whole[cut:]
        assert request.tokens == prompt + ids and request.num_generated == 24


def test_tokens_that_end_the_request_leave_nothing_to_go_on_with(model, tokenizer):
    with LLM(model, tokenizer=tokenizer, memory_gib=0.05) as llm:
        with pytest.raises(RequestError, match="end the request at number 2"):
            llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=9), begun=[300, tokenizer.eos_id, 300])
        with pytest.raises(RequestError, match="end the request at number 3"):
            llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=3), begun=[300, 301, 302])
        with pytest.raises(RequestError, match="outside the vocabulary"):
            llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=3), begun=[100_000])
        assert not llm.engine.has_work and not llm.engine.requests
