"""The offline face of the engine:

llm = longreach.LLM("runs/quickstart")
for answer in llm.generate(["def main", "class Stack:"], SamplingParams(max_tokens=64, temperature=0)):
    print(answer.text, answer.finish_reason, answer.cached_tokens)
for piece in llm.stream("import "):
    print(piece.text, end="")
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from longreach.checkpoint.load import load_model
from longreach.engine.engine import Engine, EngineOptions, Output
from longreach.engine.request import Request
from longreach.engine.sampler import Sampled
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.model.transformer import Transformer
from longreach.rundir import find_model
from longreach.runtime import choose_device
from longreach.tokenizer.bpe import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """What became of one prompt.

    Attributes:
        token_ids: generated ones, the end mark or stop token included.
        logprobs: one per token, where `SamplingParams.logprobs` asked.
        stop_reason: the stop string or stop token that ended it; None for the end mark.
        cached_tokens: prompt tokens that came from the prefix cache instead of the model.
        error: why it ended with `FinishReason.ERROR`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_tokens: int
    cached_tokens: int
    seed: int
    logprobs: list[Sampled] | None = None
    error: str | None = None


class LLM:
    """A model that continues prompts, many at once.

    Args:
        model: run directory, checkpoint directory of either layout, or a loaded `Transformer`.
        options: the engine's; keyword arguments of `EngineOptions` may be given instead.
        tokenizer: for a loaded model.
        arithmetic: "invariant" makes every result independent of what runs beside it, to the bit.
        device: as everywhere.
    """

    def __init__(
        self,
        model: str | os.PathLike | Transformer,
        options: EngineOptions | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        arithmetic: str | None = None,
        device: str = "auto",
        **changes,
    ) -> None:
        if isinstance(model, Transformer):
            if arithmetic is not None and arithmetic != model.config.arithmetic:
                raise RequestError(
                    f"this model was made with arithmetic={model.config.arithmetic!r}; load it with load_model(…, "
                    f"arithmetic={arithmetic!r}) or give the directory"
                )
        else:
            directory = find_model(Path(model))
            tokenizer = tokenizer or Tokenizer.load(directory)
            changed: dict[str, Any] = {"arithmetic": arithmetic} if arithmetic is not None else {}
            model = load_model(directory, device=choose_device(device).value, **changed).eval()
        if options is not None and changes:
            raise RequestError("give either an EngineOptions or its fields as keywords, not both")
        self.engine = Engine(model, tokenizer, options or EngineOptions(**changes))
        self._waiting: dict[str, deque[Output]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: str = "",
    ) -> list[Completion]:
        """Continue every prompt; answers in the order of the prompts.

        Args:
            prompts: texts or lists of token ids, or a single one.
            params: for all, or one for each.

        Raises:
            RequestError: a prompt or parameter that cannot be served; nothing has run then.
        """
        listed = _listed(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(listed)
        if len(each) != len(listed):
            raise RequestError(f"{len(each)} parameters for {len(listed)} prompts; give one for all, or one for each")
        requests: list[Request] = []
        try:
            for prompt, param in zip(listed, each, strict=True):
                requests.append(self._submit(prompt, param, tenant))
            texts = ["".join(output.text for output in self._outputs_of(request)) for request in requests]
        finally:
            self._leave(requests)
        return [completion(request, text) for request, text in zip(requests, texts, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, tenant: str = "") -> Iterator[Output]:
        """Continue one prompt, yielding what each step makes. Leaving the loop early cancels the request.

        Several streams may be read in turns; each step serves all of them.
        """
        request = self._submit(prompt, params, tenant)
        try:
            yield from self._outputs_of(request)
        finally:
            self._leave([request])

    def _submit(self, prompt: Prompt, params: SamplingParams | None, tenant: str) -> Request:
        request = self.engine.submit(prompt, params, tenant=tenant)
        self._waiting[request.id] = deque()
        return request

    def _outputs_of(self, request: Request) -> Iterator[Output]:
        """What the engine makes for one request; what it makes for others meanwhile waits for them."""
        mine = self._waiting[request.id]
        while mine or not request.is_finished:
            if not mine:
                self._step()
            while mine:
                yield mine.popleft()

    def _step(self) -> None:
        for output in self.engine.step():
            if (queue := self._waiting.get(output.request.id)) is not None:
                queue.append(output)

    def _leave(self, requests: Sequence[Request]) -> None:
        """Cancel what is not finished and forget what nobody reads."""
        for request in requests:
            self.engine.cancel(request.id)
        if not all(request.is_finished for request in requests):
            self._step()
        for request in requests:
            self._waiting.pop(request.id, None)

    def close(self) -> None:
        """Finish writing the disk tier."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def completion(request: Request, text: str) -> Completion:
    """A finished request as its answer."""
    assert request.finish_reason is not None
    return Completion(
        text,
        request.tokens[request.num_prompt :],
        request.finish_reason,
        request.stop_reason,
        request.num_prompt,
        request.cached,
        request.seed,
        request.work.logprobs if request.params.logprobs is not None else None,
        request.error,
    )


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    try:
        listed = list(prompts)
    except TypeError:
        raise RequestError(f"prompts must be texts or lists of token ids, not {prompts!r}") from None
    if listed and all(hasattr(prompt, "__index__") for prompt in listed):
        return [cast("Sequence[int]", listed)]  # one prompt of token ids
    return cast("list[Prompt]", listed)
