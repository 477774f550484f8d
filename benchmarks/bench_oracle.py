"""Exact scores against a loop over the query points, in one run: of the paper's grid from 10,000 points, and of 256 noisy images from as many as CIFAR has."""
import time

import pytest
import torch

from dlsm.data import moons
from dlsm.mismatch import image_oracle
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


@pytest.mark.parametrize("device", DEVICES)
def test_oracle_of_images_against_a_loop(benchmark, compare, device):
    "The images are noise: what they show makes no difference to the time. The loop is timed on two of the queries."
    generator, n, few = torch.Generator().manual_seed(0), 256, 2
    images, y = torch.rand(50_000, 3, 32, 32, generator=generator).to(device), (torch.arange(50_000) % 10).to(device)
    query, sigma = images[:n] + torch.randn(n, 3, 32, 32, generator=generator).to(device), torch.ones(n, device=device)
    oracle, flat = image_oracle(images, y, 10), images.flatten(1)
    found = oracle(query[:few], sigma[:few], y[None, :few]).prior
    assert torch.allclose(found.flatten(1).float(), looped(flat, query[:few].flatten(1), sigma[:few]), rtol=1e-5, atol=1e-6)

    def at_once():
        oracle(query, sigma, y[None, :n])
        if device == "cuda": torch.cuda.synchronize()
    benchmark.pedantic(at_once, rounds=3)
    here, loop = seconds(at_once, device), seconds(lambda: looped(flat, query[:few].flatten(1), sigma[:few]), device) * n / few
    compare(f"exact scores of {n} noisy images from {len(images):,} of 32×32 pixels, prior, posterior, classes and neighbours, {device}", here,
            "a loop over the images, prior only", loop)
    print(f"\n{device}: {here:.3g} s for {n} images; a loop {loop:.3g} s, {loop / here:.1f} times")
