"""The engine of this process as a source of episodes' tokens.

    source = EngineSource(model, tokenizer, max_running=64)
    samples = play(source, jobs, tokenizer, judging=judging)
    optimizer.step(); source.weights_changed()

Turns of different episodes decode in one batch. Attempts at the same problem read its prompt once: the others find it in the
prefix cache, and so does each later turn what the one before has read.
"""

from __future__ import annotations

from collections.abc import Sequence

from longreach.engine.engine import Engine, EngineOptions, Output
from longreach.engine.sampling import FinishReason
from longreach.evaluate.episode import Piece, Turn
from longreach.model.stores import Precision
from longreach.model.transformer import Transformer
from longreach.tokenizer.bpe import Tokenizer


class EngineSource:
    """Implements `evaluate.episode.Source`.

    Args:
        model: is used as it is and stays the caller's; its arithmetic decides whether tokens depend on what decodes beside
            them (`invariant`: they do not).
        max_running: turns in one batch; more of them wait.
        memory_gib: for the states of all turns, and for what is remembered of finished ones.
        precision: of the cache; None keeps the model's own.
        prefix_cache: remember prompts. Without it each attempt at a problem reads its prompt again.

    Raises:
        RequestError: the memory is too little for so many turns.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_running: int = 64,
        memory_gib: float = 1.0,
        precision: Precision | None = None,
        prefix_cache: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.engine = Engine(
            model,
            tokenizer,
            EngineOptions(
                max_running=max_running, memory_gib=memory_gib, precision=precision, prefix_cache=prefix_cache,
                checkpoint_gib=memory_gib / 2, swap_gib=memory_gib,
            ),
        )  # fmt: skip
        self._full: list[Piece] = []

    @property
    def most_tokens(self) -> int:
        """Of a prompt and what follows it: the context of the model, or what the memory holds if that is less."""
        return min(self.engine.model.config.max_position_embeddings, self.engine.memory.capacity)

    def submit(self, turn: Turn) -> object:
        """Begin a turn.

        Raises:
            RequestError: its prompt is beyond the context or the memory, or its parameters make no sense.
        """
        if turn.begun and len(turn.prompt) + len(turn.begun) >= self.most_tokens:
            # It had come to the end of the context when it was interrupted.
            handle = object()
            self._full.append(Piece(handle, (), (), FinishReason.LENGTH))
            return handle
        ends = _Ends((self.tokenizer.eos_id, *turn.params.stop_token_ids))
        return self.engine.submit(turn.prompt, turn.params, begun=turn.begun, stream=ends)

    def step(self) -> Sequence[Piece]:
        """One pass; nothing at all where no turn is under way."""
        if self._full:
            full, self._full = self._full, []
            return full
        if not self.engine.has_work:
            return ()
        return [_piece(output) for output in self.engine.step()]

    def weights_changed(self) -> None:
        """Call after every change of the model's weights: what was read with the old ones is not used again."""
        self.engine.weights_changed()

    def close(self) -> None:
        """Give the memory back. The source is not used afterwards."""
        self.engine.close()

    def __enter__(self) -> EngineSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _piece(output: Output) -> Piece:
    tokens = output.tokens
    logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
    is_told = len(logprobs) == len(tokens)  # they were asked for
    ids = tuple(token.token_id for token in tokens)
    return Piece(output.request, ids, logprobs if is_told else None, output.finish_reason, output.request.error)


class _Ends:
    """Reads tokens in place of the engine's text stream: a turn ends at a mark alone, and nobody needs its text yet."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        self._ends = ends
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def push(self, token_id: int) -> str:
        if token_id in self._ends:
            self.finish_reason, self.stop_reason = FinishReason.STOP, token_id
        return ""

    def finish(self, reason: FinishReason | None = None) -> str:
        return ""
