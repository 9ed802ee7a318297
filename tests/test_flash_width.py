"""A model of true Flash width: one layer of each kind and the MTP block, stored in the official FP8/FP4 layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GIB = 2**30

PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer

folder = Path(sys.argv[1])
config = ModelConfig.preset("flash").replace(
    num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), n_routed_experts=8, num_hash_layers=1
)
times = {}
def step(name, start=[time.time()]):
    times[name] = round(time.time() - start[0], 1)
    start[0] = time.time()
model = Transformer(config, dtype=torch.bfloat16, seed=0)
step("build")
save_model(model, folder / "flash", layout="official")
step("write")
del model
model = load_model(folder / "flash", dtype=torch.bfloat16).eval()
step("load")
tokens = torch.randint(0, config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    cache = model.new_cache(1, "released")
    a = model(tokens[:, :256], cache, logits_to_keep=1)
    b = model(tokens[:, 256:], cache, logits_to_keep=1)
    whole = model(tokens, logits_to_keep=1)
    mtp = model.features(tokens[:, :64], keep=("mtp",)).mtp
step("run")
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps({
    "peak": peak, "times": times, "finite": bool(torch.isfinite(whole).all() and torch.isfinite(mtp).all()),
    "cached": float((b - whole).abs().max() / whole.abs().max()),
    "parameters": sum(p.numel() for p in model.parameters()),
    "disk": sum(f.stat().st_size for f in (folder / "flash").iterdir()),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_true_flash_width_is_written_loaded_and_run_within_20_gb(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["peak"] < 20 * 10**9
    assert found["finite"]
    # Experts take half a byte, other matrices one, embedding and head (1.06 G of the parameters) two.
    assert found["disk"] < 1.4 * found["parameters"]
