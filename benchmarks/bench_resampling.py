"""How the resampling of NCSN++ through the filter [1, 3, 3, 1] is best written: by convolutions, or by sums of shifted pixels.

    python -m pytest benchmarks/bench_resampling.py --benchmark-enable -s

`Resample` uses a depthwise convolution, and its transpose to go up, on a CPU; on a GPU it writes the same sums with slices, which a compiler
makes one kernel of, bound by memory alone. Forward and backward, on the maps of the paper's score model (on a CPU, small ones), plain and
compiled; the share is that of the measured rate of a copy, for pixels read once and written once in each direction.
"""
import pytest
import torch
from bench_networks import DEVICE, best_time, synchronise

from dlsm.ncsnpp import Resample

GPU = DEVICE.type == "cuda"
MAPS = [(128, 128, 32), (128, 256, 16), (128, 256, 8)] if GPU else [(16, 32, 32), (16, 64, 16)]  # images, channels, pixels of the larger side
DTYPE = torch.bfloat16 if GPU else torch.float32
seen = {}


WAYS = {"convolution": lambda mode: Resample(mode).to(DEVICE).convolved, "shifted": lambda mode: Resample(mode).shifted}


@pytest.fixture(scope="module")
def rate():
    "Bytes a second of a copy."
    source, target = torch.zeros(2, 2**28 if GPU else 2**25, device=DEVICE)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source))


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
