"""What the cache's storage precision does to the model's predictions, and what it saves.

    longreach bench cache RUN            a trained model, on text it reads through its own tokenizer
    longreach bench cache --tokens 4096  the bench shape with random weights

The prompt's first half is read into the cache; logits of the second half, read one chunk later from storage, are compared
with those of a float32 cache: KL divergence in nats per token, agreement of the likeliest token, largest difference.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from longreach.checkpoint.load import load_model
from longreach.errors import RequestError
from longreach.model.config import PRESETS, ModelConfig
from longreach.model.stores import PRECISIONS
from longreach.model.transformer import Transformer
from longreach.rundir import find_model
from longreach.runtime import choose_device, json_line
from longreach.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class CacheBenchOptions:
    """Measure what each storage precision of the cache costs in accuracy and saves in bytes."""

    model: tyro.conf.Positional[str] = "bench"
    """A run, a checkpoint, or a preset's name (random weights)."""
    tokens: int = 2048
    """Length of the prompt."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


def main(options: CacheBenchOptions) -> int:
    """Run the comparison and print its table."""
    if options.tokens < 2:
        raise RequestError(f"--tokens {options.tokens}: give at least 2")
    choice = choose_device(options.device)
    model, text, what = _model_and_text(options, choice.value)
    print(f"device {choice}; {what}; {text.shape[1]} tokens")
    half = text.shape[1] // 2
    figures: dict[str, float] = {}
    reference: Tensor | None = None
    print(f"{'cache':>9} {'bytes/token':>12} {'KL nats':>10} {'same top-1':>11} {'largest':>10}")
    with torch.no_grad():
        for precision in PRECISIONS:
            cache = model.new_cache(1, precision)
            cache.reserve(text.shape[1])
            model(text[:, :half], cache, logits_to_keep=1)
            logits = model(text[:, half:], cache).double()
            growing = sum(cache.nbytes_by_part().get(part, 0) for part in ("entries", "index_entries"))
            figures[f"bytes_per_token_{precision}"] = growing / text.shape[1]
            reference = logits if reference is None else reference
            assert reference is not None
            log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
            figures[f"kl_{precision}"] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            figures[f"top1_{precision}"] = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
            figures[f"largest_{precision}"] = float((logits - reference).abs().max() / reference.abs().max())
            print(
                f"{precision:>9} {figures[f'bytes_per_token_{precision}']:>12.0f} {figures[f'kl_{precision}']:>10.2e} "
                f"{figures[f'top1_{precision}']:>11.2%} {figures[f'largest_{precision}']:>10.1e}"
            )
    print("largest: largest difference of a logit, over the largest logit")
    if options.json:
        print(json_line({"command": "bench cache", "model": options.model, "figures": figures}))
    return 0


def _model_and_text(options: CacheBenchOptions, device: torch.device) -> tuple[Transformer, Tensor, str]:
    if options.model in PRESETS and not Path(options.model).exists():
        config = ModelConfig.preset(options.model)
        model = Transformer(config, device=device, seed=0).eval()
        generator = torch.Generator().manual_seed(0)
        return (
            model,
            torch.randint(0, config.vocab_size, (1, options.tokens), generator=generator).to(device),
            (f"preset {options.model}, random weights and tokens"),
        )
    model = load_model(options.model, device=device).eval()
    tokenizer = Tokenizer.load(find_model(options.model) / "tokenizer.json")
    # Real text that every machine has: the source of a standard module.
    ids = [model.config.bos_token_id, *tokenizer.encode(inspect.getsource(inspect))][: options.tokens]
    return model, torch.tensor([ids], device=device), f"{options.model}, the source of Python's inspect module"
