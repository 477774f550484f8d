"""Denoising score matching: perturbation, weights, ESM = DSM + C, ensembles, and what is refused."""
import math

import pytest
import torch

from dlsm.data import moons
from dlsm.dsm import dsm_loss, esm_loss, perturb, weighted_error
from dlsm.networks import Ensemble, MLPScore, seeded
from dlsm.parzen import parzen_score
from dlsm.schedule import VESchedule


def test_perturb_adds_noise_of_each_items_level():
    x, noise = torch.arange(24.).reshape(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    assert torch.equal(perturb(x, torch.tensor([1., 10.]), noise) - x, torch.tensor([1., 10.])[:, None, None, None].expand_as(x))


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)], ids=str)
def test_losses_are_the_formula(shape):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(5, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.1, 0.5, 1., 2., 9.], dtype=torch.float64)
    score = lambda q, s: torch.tanh(q)*3
    for power in (0, 1, 2):
        total = []
        for i in range(5):
            noisy = x[i] + sigma[i]*noise[i]
            total.append(0.5*((sigma[i]**power*(torch.tanh(noisy)*3 - (x[i] - noisy)/sigma[i]**2))**2).sum())
        for reduce, share in (("sum", 1), ("mean", math.prod(shape))):
            loss = dsm_loss(score, x, sigma, noise, power, reduce)
            assert loss.shape == (5,) and torch.allclose(loss, torch.stack(total)/share, rtol=1e-12)


def test_the_oracle_has_no_explicit_loss_and_the_noise_itself_no_denoising_loss():
    x, _ = moons(50, dtype=torch.float64)
    sigma = torch.full((50,), 3., dtype=torch.float64)
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle = parzen_score(x)
    assert torch.equal(esm_loss(oracle, oracle, x + 3*noise, sigma), torch.zeros(50, dtype=torch.float64))
    assert dsm_loss(lambda q, s: (x - q)/9, x, sigma, noise).max() < 1e-24


@pytest.mark.parametrize("level", [0.2, 1., 4.])
def test_dsm_is_esm_plus_a_constant_by_quadrature(level):
    data = torch.tensor([-3., -2.2, 0., 2., 2.5], dtype=torch.float64)[:, None]
    grid = torch.linspace(-3 - 10*level, 3 + 10*level, 4001, dtype=torch.float64)[:, None]
    sigma = torch.full((len(grid),), level, dtype=torch.float64)
    oracle, weight = parzen_score(data), (grid[1] - grid[0]).item()/5/level/math.sqrt(2*math.pi)
    given_x = [(-(grid[:, 0] - x).square()/(2*level**2)).exp()*weight for x in data]
    explicit = denoising = torch.zeros(8, dtype=torch.float64)
    for seed in range(8):
        net = seeded(lambda: MLPScore(n=1).double(), seed)
        with torch.no_grad():
            e = sum((p*esm_loss(net, oracle, grid, sigma, power=0)).sum() for p in given_x)
            d = sum((p*dsm_loss(net, x.expand_as(grid), sigma, (grid - x)/level, power=0)).sum() for p, x in zip(given_x, data))
        explicit, denoising = explicit.index_fill(0, torch.tensor(seed), e), denoising.index_fill(0, torch.tensor(seed), d)
    difference = denoising - explicit
    constant = (1/level**2 - sum((p*oracle(grid, sigma)[:, 0]**2).sum() for p in given_x))/2
    assert (difference.max() - difference.min()) < 1e-10*constant and torch.allclose(difference.mean(), constant, rtol=1e-9)
    assert explicit.std() > 1e-3*constant  # the losses themselves differ


def test_dsm_is_esm_plus_a_constant_by_sampling():
    generator = torch.Generator().manual_seed(0)
    data, _ = moons(500, dtype=torch.float64)
    n, oracle = 20_000, parzen_score(data)
    x = data[torch.randint(500, (n,), generator=generator)]
    sigma, noise = VESchedule(0.1, 10.).draw(n, generator).double(), torch.randn(n, 2, generator=generator, dtype=torch.float64)
    noisy = perturb(x, sigma, noise)
    exact = oracle(noisy, sigma)
    constant = weighted_error(noise/sigma[:, None], sigma, 1) - weighted_error(exact, sigma, 1)
    for seed in range(4):
        net = seeded(lambda: MLPScore(joint=16, scale=15).double(), seed)
        with torch.no_grad(): off = dsm_loss(net, x, sigma, noise) - esm_loss(net, lambda *_: exact, noisy, sigma) - constant
        assert off.mean().abs() < 4*off.std()/math.sqrt(n)


def test_an_ensemble_has_the_losses_of_its_members():
    nets = [seeded(MLPScore, seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 16, 2, generator=generator) for _ in range(2))
    sigma = torch.rand(3, 16, generator=generator) + 0.1
    together = Ensemble(nets).map(lambda net, x, sigma, noise: dsm_loss(net, x, sigma, noise, power=2), x, sigma, noise)
    for i, net in enumerate(nets): assert torch.allclose(together[i], dsm_loss(net, x[i], sigma[i], noise[i], power=2), rtol=1e-5)


def test_levels_of_a_schedule_meet_float32_points():
    "They are float64; the loss is that of the same levels in float32, in float32."
    x, net = moons(64)[0], seeded(MLPScore, 0)
    levels, noise = VESchedule(0.1, 10.).levels(64), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    assert levels.dtype == torch.float64 and perturb(x, levels, noise).dtype == torch.float32
    for power in (0, 1, 2):
        found = dsm_loss(net, x, levels, noise, power)
        assert found.dtype == torch.float32 and torch.equal(found, dsm_loss(net, x, levels.float(), noise, power))


X, ONES = torch.zeros(4, 2), torch.ones(4)
zero = lambda q, s: torch.zeros_like(q)


@pytest.mark.parametrize("call, words", {
    "sigma zero": (lambda: perturb(X, 0*ONES, X), ["sigma (4,)", "positive"]),
    "sigma negative": (lambda: dsm_loss(zero, X, -ONES, X), ["sigma (4,)", "positive"]),
    "sigma zero in esm": (lambda: esm_loss(zero, zero, X, 0*ONES), ["sigma (4,)", "positive"]),
    "one sigma": (lambda: dsm_loss(zero, X, ONES[:1], X), ["sigma", "(1,)", "x (4, 2)"]),
    "noise of another shape": (lambda: dsm_loss(zero, X, ONES, X[:1]), ["noise", "(1, 2)", "(4, 2)"]),
    "NaN in x": (lambda: dsm_loss(zero, X * math.nan, ONES, X), ["x (4, 2)", "NaN"]),
    "infinite noise": (lambda: perturb(X, ONES, X + math.inf), ["noise (4, 2)", "infinite"]),
    "no batch": (lambda: perturb(torch.zeros(4), ONES, torch.zeros(4)), ["x", "(4,)"]),
    "score of another shape": (lambda: dsm_loss(lambda q, s: q[:, :1], X, ONES, X), ["score", "(4, 1)", "(4, 2)"]),
    "score of another shape in esm": (lambda: esm_loss(lambda q, s: q[:, :1], zero, X, ONES), ["score", "(4, 1)"]),
    "oracle of another shape": (lambda: esm_loss(zero, lambda q, s: q[0], X, ONES), ["oracle", "(2,)"]),
    "unknown reduction": (lambda: dsm_loss(zero, X, ONES, X, reduce="none"), ["reduce", "none"]),
}.values(), ids=lambda v: None if callable(v) else v[0])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error: call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
