"""The exact score of 1,225 points (the paper's grid) from 10,000: chunks against a loop over the query points, in one run."""
import time

import pytest
import torch

from dlsm.data import moons
from dlsm.parzen import parzen_score
from dlsm.plots import plane_grid

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def looped(data, x_noisy, sigma):
    "The formula for one query after the other, in float64."
    data, out = data.double(), []
    for q, s in zip(x_noisy.double(), sigma.double()):
        weights = (-(q - data).square().sum(1)/(2*s**2)).softmax(0)
        out.append((weights @ data - q)/s**2)
    return torch.stack(out).to(x_noisy.dtype)


def seconds(run, device):
    "Best of three."
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        run()
        if device == "cuda": torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("device", DEVICES)
def test_oracle_against_a_loop(benchmark, compare, device):
    data, x_noisy = moons()[0].to(device), plane_grid().to(device)
    sigma = torch.full((len(x_noisy),), 7.5, device=device)
    oracle = parzen_score(data)
    assert torch.allclose(oracle(x_noisy, sigma), looped(data, x_noisy, sigma), rtol=1e-5, atol=1e-7)

    def chunked():
        out = oracle(x_noisy, sigma)
        if device == "cuda": torch.cuda.synchronize()
        return out
    benchmark(chunked)
    ours, loop = seconds(chunked, device), seconds(lambda: looped(data, x_noisy, sigma), device)
    compare(f"exact score of {len(x_noisy):,} points from {len(data):,}, {device}", ours, "a loop over the points", loop, aim=20 if device == "cuda" else None)
    print(f"\n{device}: oracle {ours:.3g} s, loop over query points {loop:.3g} s, {loop/ours:.1f} times faster")
