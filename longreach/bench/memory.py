"""Peak memory of one long call, measured in a process of its own so that nothing earlier counts.

python -m longreach.bench.memory MODEL_DIRECTORY TOKENS [--dtype float32] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from longreach.bench.measure import extra_bytes


def measure_in_process(directory: Path, tokens: int, dtype: str, threads: int, device: str) -> dict[str, float]:
    """`extra_bytes` and `seconds` of reading `tokens` tokens in one call, from a fresh process."""
    command = [sys.executable, "-m", "longreach.bench.memory", str(directory), str(tokens), "--dtype", dtype]
    command += ["--threads", str(threads), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from longreach.checkpoint.load import load_model

    device = torch.device(options.device)
    model = load_model(options.directory, dtype=getattr(torch, options.dtype), device=device).eval()
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, model.config.vocab_size, (1, options.tokens), generator=generator).to(device)
    with torch.no_grad():
        model(text[:, :1024], logits_to_keep=1)  # libraries make their own buffers on the first call
        began = time.perf_counter()
        extra = extra_bytes(lambda: model(text, logits_to_keep=1), device)
    print(json.dumps({"extra_bytes": extra, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
