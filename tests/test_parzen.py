"""The oracle: exact scores against autograd of the formula, near and far, in chunks, within its memory, and what it refuses."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dlsm import parzen
from dlsm.data import moons
from dlsm.guidance import likelihood_score
from dlsm.parzen import parzen_classifier, parzen_log_density, parzen_score


def naive_log_density(x_noisy, sigma, data):
    squares = (x_noisy.flatten(1)[:, None] - data.flatten(1)).square().sum(2)
    log_norm = math.log(len(data)) + data[0].numel()*(sigma.log() + math.log(2*math.pi)/2)
    return torch.logsumexp(-squares/(2*sigma[:, None]**2), 1) - log_norm


def gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def relative_error(a, b): return ((a - b).flatten(1).norm(dim=1)/b.flatten(1).norm(dim=1)).max().item()


def batch(shape, points=80, queries=60, dtype=torch.float64):
    "Data of three classes of unequal size, noisy queries over two decades of σ, and labels of the queries."
    generator = torch.Generator().manual_seed(sum(shape))
    data = torch.randn(points, *shape, generator=generator, dtype=torch.float64)*3 + 5
    y = torch.arange(points) % 5 % 3
    sigma = torch.logspace(-0.5, 1.5, queries, dtype=torch.float64)
    x_noisy = data[:queries] + sigma.reshape(-1, *[1]*len(shape))*torch.randn(queries, *shape, generator=generator, dtype=torch.float64)
    return data.to(dtype), y, x_noisy.to(dtype), sigma.to(dtype)


SHAPES = [(1,), (2,), (16,), (17,), (1, 8, 8), (3, 8, 8)]  # up to 16 dimensions the kernels are computed in another way


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prior_and_density_against_autograd(shape):
    data, _, x_noisy, sigma = batch(shape)
    log_density = parzen_log_density(data)
    assert torch.allclose(log_density(x_noisy, sigma), naive_log_density(x_noisy, sigma, data), rtol=1e-10, atol=0)
    exact = gradient(lambda q: naive_log_density(q, sigma, data), x_noisy)
    assert relative_error(parzen_score(data)(x_noisy, sigma), exact) < 1e-10
    assert relative_error(gradient(lambda q: log_density(q, sigma), x_noisy), exact) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_posterior_and_likelihood_against_autograd(shape):
    data, y, x_noisy, sigma = batch(shape)
    prior = parzen_score(data)(x_noisy, sigma)
    for c in range(3):
        own = data[y == c]
        posterior = parzen_score(own)(x_noisy, sigma)
        assert relative_error(posterior, gradient(lambda q, own=own: naive_log_density(q, sigma, own), x_noisy)) < 1e-10
        likelihood = likelihood_score(parzen_classifier(data, y, 3), x_noisy, sigma, torch.full((len(sigma),), c))
        exact = gradient(lambda q, own=own: naive_log_density(q, sigma, own) - naive_log_density(q, sigma, data), x_noisy)
        size = (prior.flatten(1).norm(dim=1) + posterior.flatten(1).norm(dim=1))
        for other in (exact, posterior - prior):  # the likelihood score may be zero: relative to the two that it is a difference of
            assert ((likelihood - other).flatten(1).norm(dim=1) < 1e-10*size).all()


def test_classifier_is_bayes_rule():
    data, y, x_noisy, sigma = batch((2,))
    log_p = parzen_classifier(data, y, 3)(x_noisy, sigma)
    joint = torch.stack([naive_log_density(x_noisy, sigma, data[y == c]) + (y == c).double().mean().log() for c in range(3)], 1)
    assert torch.allclose(log_p, joint.log_softmax(1), rtol=1e-10, atol=1e-12)
    shares = torch.stack([(y == c).double().mean() for c in range(3)])
    assert torch.allclose(parzen_classifier(data, y, 3)(x_noisy, sigma*1e8).exp(), shares.expand(len(sigma), 3), atol=1e-6)


def exact_score(x_noisy, sigma, data):
    "The score in 80-bit arithmetic, one query at a time."
    x_noisy, data = (t.numpy().astype(np.longdouble) for t in (x_noisy, data))
    out = []
    for q, s in zip(x_noisy, sigma.tolist()):
        log_w = -np.square(data - q).sum(1)/(2*np.longdouble(s)**2)
        w = np.exp(log_w - log_w.max())
        out.append(((w[:, None]*data).sum(0)/w.sum() - q)/np.longdouble(s)**2)
    return torch.from_numpy(np.array(out).astype(np.float64))


@pytest.mark.parametrize("far", [0., 1e2, 1e6, 1e12])
@pytest.mark.parametrize("level", [1e-3, 1., 1e3])
def test_far_from_the_data_it_is_finite_and_right(far, level):
    data, y = moons(1000, dtype=torch.float64)
    angle = torch.linspace(0, 6, 12, dtype=torch.float64)
    x_noisy = data[:12] + far*torch.stack([angle.cos(), angle.sin()], 1) + level*torch.tensor([0.6, 0.8], dtype=torch.float64)
    sigma = torch.full((12,), level, dtype=torch.float64)
    assert relative_error(parzen_score(data)(x_noisy, sigma), exact_score(x_noisy, sigma, data)) < 1e-10
    assert parzen_log_density(data)(x_noisy, sigma).isfinite().all()
    classifier = parzen_classifier(data, y, 2)
    log_p = classifier(x_noisy, sigma)
    assert not log_p.isnan().any() and torch.allclose(log_p.exp().sum(1), torch.ones(12, dtype=torch.float64))
    assert likelihood_score(classifier, x_noisy, sigma, torch.zeros(12, dtype=torch.long)).isfinite().all()


def test_far_images():
    data, _, x_noisy, _ = batch((3, 8, 8))
    sigma = torch.full((len(x_noisy),), 1e-2, dtype=torch.float64)
    score = parzen_score(data)(x_noisy + 1e6, sigma)
    exact = exact_score((x_noisy + 1e6).flatten(1), sigma, data.flatten(1))
    assert relative_error(score.flatten(1), exact) < 1e-10


def test_float32_in_float32_out_with_the_digits_of_float64():
    data, y, x_noisy, sigma = batch((2,), dtype=torch.float32)
    score = parzen_score(data)(x_noisy, sigma)
    exact = parzen_score(data.double())(x_noisy.double(), sigma.double())
    assert score.dtype == torch.float32 and relative_error(score.double(), exact) < 1e-6
    assert parzen_log_density(data)(x_noisy, sigma).dtype == torch.float32 == parzen_classifier(data, y, 3)(x_noisy, sigma).dtype


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)], ids=str)
def test_chunks_do_not_matter(monkeypatch, shape):
    data, y, x_noisy, sigma = batch(shape, points=200, queries=150)
    whole = parzen_score(data)(x_noisy, sigma), parzen_classifier(data, y, 3)(x_noisy, sigma)
    monkeypatch.setattr(parzen, "BUDGET", 1)
    parts = parzen_score(data)(x_noisy, sigma), parzen_classifier(data, y, 3)(x_noisy, sigma)
    for a, b in zip(whole, parts): assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_under_vmap_as_one_batch_after_the_other():
    "An ensemble that is trained on the oracle meets it under `vmap`."
    data, y, x_noisy, sigma = batch((2,), queries=24)
    score, classifier = parzen_score(data), parzen_classifier(data, y, 3)
    def log_p(query, sigma): return classifier(query, sigma)[:, 0].sum()
    many, levels = x_noisy.unflatten(0, (4, 6)), sigma.unflatten(0, (4, 6))
    for f in (score, classifier, torch.func.grad(log_p)):
        alone = torch.stack([f(q, s) for q, s in zip(many, levels)])
        assert torch.allclose(torch.vmap(f)(many, levels), alone, rtol=1e-12, atol=1e-12)
        assert torch.allclose(torch.vmap(f, (1, None))(many.transpose(0, 1), levels[0]), torch.stack([f(q, levels[0]) for q in many]), rtol=1e-12, atol=1e-12)


def test_no_exponential_underflows(monkeypatch):
    "At small levels nearly all would, and each takes several times as long as another."
    data, y, x_noisy, sigma = batch((2,))
    seen, exp = [], torch.Tensor.exp_
    monkeypatch.setattr(torch.Tensor, "exp_", lambda kernels: seen.append(kernels.min().item()) or exp(kernels))
    score = parzen_score(data)(x_noisy, 1e-3 * sigma)
    assert min(seen) == parzen.FAINT and score.isfinite().all()


def test_a_score_is_not_differentiated():
    "The weighted mean would count as a constant, and the derivative be wrong without a word."
    data, y, x_noisy, sigma = batch((2,))
    score = parzen_score(data)
    with pytest.raises(NotImplementedError, match="cannot be differentiated"): gradient(lambda q: score(q, sigma).square(), x_noisy)
    with pytest.raises(NotImplementedError, match="cannot be differentiated"): torch.func.jvp(lambda q: score(q, sigma), (x_noisy,), (x_noisy,))


def test_empty_batch_and_single_point():
    data = torch.tensor([[1., 2.]])
    assert parzen_score(data)(torch.zeros(0, 2), torch.zeros(0)).shape == (0, 2)
    assert torch.allclose(parzen_score(data)(torch.zeros(3, 2), torch.full((3,), 2.)), data/4)


def test_gradient_is_exact_once_and_refused_twice():
    data, y, x_noisy, sigma = batch((2,))
    for f in (lambda q: parzen_log_density(data)(q, sigma).sum(), lambda q: parzen_classifier(data, y, 3)(q, sigma)[:, 0].sum()):
        assert torch.allclose(torch.func.grad(f)(x_noisy), gradient(f, x_noisy))
        with pytest.raises(NotImplementedError, match="once"):
            torch.func.grad(lambda q, f=f: torch.func.grad(f)(q).square().sum())(x_noisy)


def test_oracle_neither_builds_a_graph_nor_needs_its_absence():
    data, _, x_noisy, sigma = batch((2,))
    with torch.no_grad(): free = parzen_score(data)(x_noisy, sigma)
    assert torch.equal(parzen_score(data)(x_noisy, sigma), free)


def test_memory_of_a_large_evaluation():
    "10⁵ points × 10⁴ queries in 2-D: 8 GB of kernels if they were kept, within 2 GiB for the whole process."
    code = """
import torch
from dlsm.parzen import parzen_score
generator = torch.Generator().manual_seed(0)
data, x_noisy = 20*torch.randn(100_000, 2, generator=generator), 20*torch.randn(10_000, 2, generator=generator)
score = parzen_score(data)(x_noisy, torch.full((10_000,), 2.))
assert score.isfinite().all()
try: print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))  # a child's ru_maxrss begins at its parent's
except FileNotFoundError:
    import resource
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) / 2**20 < 2, "GiB at the peak"


DATA, LABELS, ONES = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1]), torch.ones(6)
NAN, INFINITE = DATA.clone(), DATA.clone()
NAN[2, 1], INFINITE[0, 0] = math.nan, math.inf


@pytest.mark.parametrize("make, words", {
    "NaN in data": (lambda: parzen_score(NAN), ["data (6, 2)", "NaN"]),
    "NaN in data of a density": (lambda: parzen_log_density(NAN), ["data (6, 2)", "NaN"]),
    "infinite data": (lambda: parzen_classifier(INFINITE, LABELS, 2), ["data (6, 2)", "infinite"]),
    "no data": (lambda: parzen_score(DATA[:0]), ["data", "(0, 2)"]),
    "data without dimensions": (lambda: parzen_score(DATA[:, 0]), ["data", "(6,)"]),
    "sigma zero": (lambda: parzen_score(DATA)(DATA, 0*ONES), ["sigma (6,)", "positive"]),
    "sigma negative": (lambda: parzen_classifier(DATA, LABELS, 2)(DATA, -ONES), ["sigma (6,)", "positive"]),
    "sigma NaN": (lambda: parzen_log_density(DATA)(DATA, ONES*math.nan), ["sigma (6,)", "positive"]),
    "too few sigma": (lambda: parzen_score(DATA)(DATA, ONES[:1]), ["sigma", "(1,)", "x_noisy (6, 2)"]),
    "sigma of two dimensions": (lambda: parzen_score(DATA)(DATA, ONES[:, None]), ["sigma", "(6, 1)"]),
    "queries of other dimensions": (lambda: parzen_score(DATA)(torch.zeros(6, 3), ONES), ["x_noisy", "(6, 3)", "(6, 2)"]),
    "images for points": (lambda: parzen_score(DATA)(torch.zeros(6, 2, 1), ONES), ["x_noisy", "(6, 2, 1)"]),
    "query without a batch": (lambda: parzen_score(DATA)(torch.zeros(2), torch.ones(2)), ["x_noisy", "(2,)"]),
    "label too large": (lambda: parzen_classifier(DATA, LABELS + 1, 2), ["y (6,)", "0…1"]),
    "label negative": (lambda: parzen_classifier(DATA, LABELS - 1, 2), ["y (6,)", "0…1"]),
    "label not an integer": (lambda: parzen_classifier(DATA, LABELS.float(), 2), ["y (6,)", "integer"]),
    "too few labels": (lambda: parzen_classifier(DATA, LABELS[:4], 2), ["y", "(4,)", "data (6, 2)"]),
    "empty class": (lambda: parzen_classifier(DATA, LABELS, 3), ["y (6,)", "class 2"]),
}.values(), ids=lambda v: None if callable(v) else v[0])
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError) as error: make()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
