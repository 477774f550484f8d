"""Precision, recall, density and coverage of 10,000 against 10,000 float32 features: ours beside `prdc` 0.2.

    make bench                                       # all benchmarks
    python -m pytest benchmarks/bench_metrics.py --benchmark-enable -s

Each measurement has a process of its own; its memory is what it peaked at above what it had before (both sets of features
are there then). The aim: at most a quarter of the memory, and three times (64 features) and one and a half times (2,048) as fast.
"""
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

N, K = 10_000, 3
WAYS = ("prdc", "ours")
seen = {}


def measure(way, d, n=N):
    "Compute the four metrics once: seconds, bytes of working memory, and the metrics."
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
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    began = time.perf_counter()
    found = call(real, fake, K)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, **{k: float(v) for k, v in found.items()}}


def measured(way, d, n=N):
    "Measure in a fresh process."
    done = subprocess.run([sys.executable, __file__, way, str(d), str(n)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("d", (64, 2048))
@pytest.mark.parametrize("way", WAYS)
def test_prdc(benchmark, way, d):
    if not benchmark.enabled: pytest.skip("needs --benchmark-enable")
    result = benchmark.pedantic(lambda: measured(way, d), rounds=1)
    seen[way, d] = result
    print(f"\n{way}, {N:,} × {N:,} × {d}: {result['seconds']:.1f} s, {result['bytes'] / 1e6:,.0f} MB")
    if way == "ours":
        theirs = seen["prdc", d]
        print(f"{theirs['seconds'] / result['seconds']:.1f} times as fast, {result['bytes'] / theirs['bytes']:.2f} of the memory")
        assert all(abs(result[name] - theirs[name]) < 1e-5 for name in ("precision", "recall", "density", "coverage"))


if __name__ == "__main__": print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
