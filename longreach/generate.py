"""Text from a model: `longreach generate runs/quickstart "def read_lines(path):"`.

The prompt goes through the model in one pass that fills a cache; from then on each new token is one step that reads it.
`stream` is the same for a program: an iterator of tokens as they are made.

    for piece in stream(model, tokenizer, "def ", max_tokens=64, temperature=0.7, seed=1):
        print(piece.text, end="")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from torch import Tensor

from longreach.checkpoint.load import load_model
from longreach.errors import RequestError
from longreach.model.transformer import Transformer
from longreach.rundir import find_model
from longreach.runtime import choose_device, json_line, log, set_threads, setup_logging
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.stream import StreamDecoder

PREFILL_CHUNK = 4096
"""Prompt tokens per pass: bounds the memory a long prompt takes, costs a short one nothing."""


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt, token by token.

    The continuation goes to stdout as it is made, everything else to stderr.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Run directory, or checkpoint directory of either published layout."""
    prompt: Annotated[str, tyro.conf.Positional]
    """Text to continue; - reads it from standard input."""
    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples as the model believes; higher is wilder."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that together have this probability; 1 leaves none out."""
    max_tokens: int = 256
    """Stop after this many tokens, or sooner at the end of the text."""
    seed: int = 0
    """The same seed gives the same text."""
    threads: int | None = None
    """CPU threads (default: one per core)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print one JSON object at the end instead of the text as it comes."""


class Piece(NamedTuple):
    """One generated token."""

    token_id: int
    text: str
    """What this token makes certain; empty while a character is unfinished, and for the end mark."""
    finish_reason: str | None
    """On the last piece: `stop` (the model ended the text) or `length` (max_tokens or the context is full)."""


def sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row, int64 `(B,)`.

    Args:
        logits_BV: float32.
        temperature: 0 takes the likeliest token (the lowest id among equals) and draws nothing.
        top_p: keeps the smallest set of likeliest tokens whose probability reaches it, at least one.
        generator: on the device of the logits; decides the draw.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities = (logits_BV.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is out once those before it have the mass; the first has nothing before it.
        outside = ranked.cumsum(dim=-1) - ranked >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ranked.masked_fill(outside, 0.0))
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)


@torch.no_grad()
def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[Piece]:
    """Yield the continuation of `prompt` token by token; nothing is computed before the first piece is asked for.

    The prompt is plain text: a special token spelled out in it stays text. The last piece carries the finish reason.

    Raises:
        RequestError: an option out of range, or a prompt that leaves no room in the model's context.
    """
    check_sampling(max_tokens, temperature, top_p, seed)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    context = model.config.max_position_embeddings
    if len(ids) >= context:
        raise RequestError(
            f"the prompt is {len(ids)} tokens long, the context of this model is {context} with at least one to generate; "
            "shorten the prompt"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    decoder = StreamDecoder(tokenizer)
    cache = model.new_cache(1)
    pending = torch.tensor([ids], device=device)
    for chunk in pending.split(PREFILL_CHUNK, dim=1):
        logits = model(chunk, cache=cache, logits_to_keep=1)
    for made in range(1, max_tokens + 1):
        token = sample(logits[:, -1, : tokenizer.vocab_size], temperature, top_p, generator)
        token_id = int(token)
        if token_id == tokenizer.eos_id:
            yield Piece(token_id, decoder.finish(), "stop")
            return
        text = decoder.push(token_id)
        if made == max_tokens or len(ids) + made >= context:
            yield Piece(token_id, text + decoder.finish(), "length")
            return
        yield Piece(token_id, text, None)
        logits = model(token[:, None], cache=cache, logits_to_keep=1)


def check_sampling(max_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raise RequestError for the first option out of range."""
    if max_tokens < 1:
        raise RequestError(f"max_tokens {max_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise RequestError(f"temperature {temperature:g} must be 0 or above")
    if not 0 < top_p <= 1:
        raise RequestError(f"top_p {top_p:g} must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed {seed} must be from 0 to {2**63 - 1}")


def main(options: GenerateOptions) -> int:
    """Run the command."""
    setup_logging()
    check_sampling(options.max_tokens, options.temperature, options.top_p, options.seed)
    directory = find_model(options.model)
    device, threads = choose_device(options.device), set_threads(options.threads)
    prompt = _read_stdin() if options.prompt == "-" else options.prompt
    tokenizer = Tokenizer.load(directory)
    model = load_model(directory, device=device.value).eval()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    log.info("%s: %s on %s, threads: %s", options.model, dtype, device, threads)

    start = time.perf_counter()
    first_token_at = start
    pieces: list[Piece] = []
    for piece in stream(
        model,
        tokenizer,
        prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    ):
        if not pieces:
            first_token_at = time.perf_counter()
            if not options.json:
                # On stderr, so that stdout is the continuation alone; on a terminal the two read as one text.
                print(prompt, end="", file=sys.stderr, flush=True)
        pieces.append(piece)
        if not options.json:
            print(piece.text, end="", flush=True)
    seconds = time.perf_counter() - start
    # The first token comes out of the prompt's pass; the speed of decoding is that of the others.
    decode_seconds = seconds - (first_token_at - start)
    tokens_per_s = (len(pieces) - 1) / decode_seconds if len(pieces) > 1 else None
    if options.json:
        result = {
            "text": "".join(piece.text for piece in pieces),
            "prompt_tokens": len(tokenizer.encode(prompt)) + 1,
            "tokens": len(pieces),
            "finish_reason": pieces[-1].finish_reason,
            "seconds": round(seconds, 3),
            "first_token_s": round(first_token_at - start, 3),
            "tokens_per_s": None if tokens_per_s is None else round(tokens_per_s, 1),
        }
        print(json_line(result))
    else:
        print(flush=True)
        speed = "" if tokens_per_s is None else f", {tokens_per_s:.1f} tokens/s"
        log.info(
            "%d tokens (%s), first after %.2f s%s", len(pieces), pieces[-1].finish_reason, first_token_at - start, speed
        )
    return 0


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8: byte at offset {error.start}") from None
