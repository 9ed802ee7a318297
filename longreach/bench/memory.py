"""Peak memory of one long call, measured in a process of its own so that nothing earlier counts.

python -m longreach.bench.memory MODEL_DIRECTORY TOKENS [--train longreach] [--dtype float32] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from longreach.bench.measure import extra_bytes, limit_memory, peak_bytes

READ_FIRST, TRAIN_FIRST = 1024, 256
"""Tokens of the call before the measured one. Libraries make their own buffers on the first call; a training step also
leaves the gradients and the optimizer's moments, which then do not count as extra."""


def measure_in_process(
    directory: Path, tokens: int, dtype: str, threads: int, device: str, train: tuple[str, ...] = ()
) -> dict[str, float]:
    """`extra_bytes`, `peak_bytes` and `seconds` of one call on `tokens` tokens, from a fresh process.

    The call reads the tokens; with `train`, the arguments that say whose (`Trainee.arguments`), it is a training step.

    Raises:
        RuntimeError: the process failed, most often because the machine's free memory did not suffice.
    """
    command = [sys.executable, "-m", "longreach.bench.memory", str(directory), str(tokens), "--dtype", dtype]
    command += ["--threads", str(threads), "--device", device, *train]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", choices=("longreach", "transformers"))
    parser.add_argument("--experts", default="eager", help="which implementation of transformers")
    parser.add_argument("--recompute", action="store_true", help="of each layer keep the input alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    call, vocabulary, first = _reading(options, device) if options.train is None else _training(options, device)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, vocabulary, (1, options.tokens), generator=generator).to(device)
    limit_memory(device)
    call(text[:, :first])
    began = time.perf_counter()
    extra = extra_bytes(lambda: call(text), device)
    seconds = time.perf_counter() - began
    print(json.dumps({"extra_bytes": extra, "peak_bytes": peak_bytes(device), "seconds": seconds}))


def _reading(options: argparse.Namespace, device: torch.device) -> tuple[Callable[[Tensor], object], int, int]:
    from longreach.checkpoint.load import load_model

    model = load_model(options.directory, dtype=getattr(torch, options.dtype), device=device).eval()
    torch.set_grad_enabled(False)
    return lambda text: model(text, logits_to_keep=1), model.config.vocab_size, READ_FIRST


def _training(options: argparse.Namespace, device: torch.device) -> tuple[Callable[[Tensor], object], int, int]:
    from longreach.bench.train import our_trainee, peer_trainee

    directory, dtype = options.directory, getattr(torch, options.dtype)
    if options.train == "longreach":
        trainee = our_trainee(directory, dtype, device, options.recompute)
    else:
        trainee = peer_trainee(directory, dtype, device, options.experts, options.recompute)
    return trainee.step, trainee.vocabulary, TRAIN_FIRST


if __name__ == "__main__":
    main()
