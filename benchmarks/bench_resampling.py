"""How the resampling of NCSN++ through the filter [1, 3, 3, 1] is best written: by convolutions, or by sums of shifted pixels.

    python -m pytest benchmarks/bench_resampling.py --benchmark-enable -s

`Resample` uses a depthwise convolution, and its transpose to go up. The same sums can be written with slices, which a compiler makes
one kernel of, bound by memory alone. Forward and backward, on the maps of the paper's score model (on a CPU, small ones), plain and compiled;
the share is that of the measured rate of a copy, for pixels read once and written once in each direction.
"""
import pytest
import torch
import torch.nn.functional as F
from bench_networks import DEVICE, best_time, synchronise

from dlsm.ncsnpp import Resample

GPU = DEVICE.type == "cuda"
MAPS = [(128, 128, 32), (128, 256, 16), (128, 256, 8)] if GPU else [(16, 32, 32), (16, 64, 16)]  # images, channels, pixels of the larger side
DTYPE = torch.bfloat16 if GPU else torch.float32
seen = {}


def padded(x, dim): return F.pad(x, (1, 1, 0, 0) if dim == 3 else (0, 0, 1, 1))


def shifted(x, mode):
    "Resample by sums of shifted pixels, one direction after the other."
    for dim in (2, 3):
        n, p = x.shape[dim], padded(x, dim)
        if mode == "up":
            before, after = p.narrow(dim, 0, n), p.narrow(dim, 2, n)
            x = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], dim + 1).flatten(dim, dim + 1)
        else:
            pairs = p.unflatten(dim, (n // 2 + 1, 2))
            odd, even = pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)  # pixels 2i − 1 and 2i
            first, last = (t.narrow(dim, i, n // 2) for i, t in ((0, odd), (1, even)))
            x = 0.125 * (first + last) + 0.375 * (even.narrow(dim, 0, n // 2) + odd.narrow(dim, 1, n // 2))
    return x


WAYS = {"convolution": lambda mode: Resample(mode).to(DEVICE), "shifted": lambda mode: lambda x: shifted(x, mode)}


@pytest.fixture(scope="module")
def rate():
    "Bytes a second of a copy."
    source, target = torch.zeros(2, 2**28 if GPU else 2**25, device=DEVICE)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source))


def test_both_ways_are_the_same():
    x = torch.randn(2, 8, 16, 16, device=DEVICE, dtype=torch.float64)
    for mode in ("up", "down"): torch.testing.assert_close(shifted(x, mode), Resample(mode).to(x)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("mode", ["up", "down"])
@pytest.mark.parametrize("way", WAYS)
def test_resampling(benchmark, rate, way, mode, compiled):
    resample = WAYS[way](mode)
    if compiled: resample = torch.compile(resample)
    maps = [torch.randn(b, c, s // 2 if mode == "up" else s, s // 2 if mode == "up" else s, device=DEVICE) for b, c, s in MAPS]
    maps = [x.to(DTYPE, memory_format=torch.channels_last).requires_grad_() for x in maps]
    with torch.no_grad(), torch.autocast(DEVICE.type, DTYPE, enabled=GPU): ahead = [torch.ones_like(resample(x)) for x in maps]
    moved = 2 * sum(x.nbytes + g.nbytes for x, g in zip(maps, ahead))

    def step():
        with torch.autocast(DEVICE.type, DTYPE, enabled=GPU): out = [resample(x) for x in maps]
        torch.autograd.grad(out, maps, ahead)
        synchronise()
    benchmark.pedantic(step, rounds=10, warmup_rounds=5)
    if not benchmark.stats: return
    seconds = benchmark.stats["min"]
    seen[way, mode, compiled] = seconds
    gain = f", {seen['convolution', mode, compiled] / seconds:.2f} times as fast" if way == "shifted" and ("convolution", mode, compiled) in seen else ""
    print(f"\n{mode}, {way}, {'compiled' if compiled else 'plain'}: {1e3 * seconds:.2f} ms, {moved / seconds / rate:.0%} of a copy's rate{gain}")
