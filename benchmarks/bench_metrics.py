"""Precision, recall, density and coverage of 10,000 against 10,000 float32 features: ours beside `prdc` 0.2.

    make bench                                       # all benchmarks
    python -m pytest benchmarks/bench_metrics.py --benchmark-enable -s

Each measurement has a process of its own; its memory is what it peaked at above what it had before (both sets of features
are there then), as /proc/self/status tells: where there is none, only time is compared. The aim: at most a quarter of the
memory, and three times (64 features) and one and a half times (2,048) as fast.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

N, K = 10_000, 3
WAYS = ("prdc", "ours")
STATUS = Path("/proc/self/status")
seen = {}


def status(key):
    "VmRSS, what this process holds, or VmHWM, the most it has held, in bytes; None where there is no /proc. (ru_maxrss of a child begins at its parent's.)"
    return next((1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(key)), None) if STATUS.exists() else None


def measure(way, d, n=N):
    "Compute the four metrics once: seconds, bytes of working memory (None where they are not known), and the metrics."
    import torch

    from dlsm.neighbours import prdc
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, n, d, generator=generator).unbind()
    if way == "prdc":
        from prdc import compute_prdc
        call = compute_prdc
        real, fake = real.numpy(), fake.numpy()
    else: call = prdc
    call(real[:100], fake[:100], K)  # libraries start their threads
    before = status("VmRSS")
    began = time.perf_counter()
    found = call(real, fake, K)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": None if before is None else status("VmHWM") - before, **{k: float(v) for k, v in found.items()}}


def measured(way, d, n=N):
    "Measure in a fresh process."
    done = subprocess.run([sys.executable, __file__, way, str(d), str(n)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("d", (64, 2048))
@pytest.mark.parametrize("way", WAYS)
def test_prdc(benchmark, compare, way, d):
    if not benchmark.enabled: pytest.skip("needs --benchmark-enable")
    result = benchmark.pedantic(lambda: measured(way, d), rounds=1)
    seen[way, d] = result
    known = result["bytes"] is not None
    print(f"\n{way}, {N:,} × {N:,} × {d}: {result['seconds']:.1f} s" + (f", {result['bytes'] / 1e6:,.0f} MB" if known else ""))
    if way == "ours":
        theirs = seen["prdc", d]
        print(f"{theirs['seconds'] / result['seconds']:.1f} times as fast" + (f", {result['bytes'] / theirs['bytes']:.2f} of the memory" if known else ""))
        what = f"precision, recall, density and coverage of {N:,} × {N:,}, {d:,} features"
        compare(what, result["seconds"], "prdc 0.2", theirs["seconds"], aim={64: 3, 2048: 1.5}[d])
        if known: compare(f"{what}: memory", result["bytes"] / 1e6, "prdc 0.2", theirs["bytes"] / 1e6, "MB", aim=4)
        assert all(abs(result[name] - theirs[name]) < 1e-5 for name in ("precision", "recall", "density", "coverage"))
    if not known: pytest.skip("memory is read from /proc, and there is none: only time was compared")


if __name__ == "__main__": print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
