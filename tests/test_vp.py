"""Models from elsewhere: DDPM's convention and ours, its three kinds of prediction, and what is refused."""
import pytest
import torch
from torch import nn

from dlsm.guidance import likelihood_score, posterior_score
from dlsm.parzen import parzen_classifier, parzen_score
from dlsm.samplers import heun_sample
from dlsm.schedule import expand
from dlsm.vp import VPClassifier, VPScore, check_score

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
M, SPREAD = 0.3, 0.5


def noise_net(x_t, t):
    "The best prediction of the noise for data N(M, SPREAD²)."
    a2 = expand(ABAR.to(x_t.device)[t], x_t).to(x_t.dtype)
    return (1 - a2).sqrt() * (x_t - a2.sqrt() * M) / (a2 * SPREAD**2 + 1 - a2)


def exact(x, sigma): return -(x - M) / (SPREAD**2 + expand(sigma, x) ** 2)


def noisy(levels, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(levels), 3, 4, 4, generator=g, dtype=torch.float64)
    return (M + (SPREAD**2 + expand(levels, x) ** 2).sqrt() * x).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_gaussian_data_have_the_known_score(dtype, tolerance):
    score = VPScore(noise_net, ABAR)
    levels = score.levels()
    assert len(levels) == 1000 and (levels.diff() < 0).all() and torch.allclose(levels.square(), ((1 - ABAR) / ABAR).flip(0), rtol=1e-5)
    x = noisy(levels)
    found = score(x.to(dtype), levels.to(dtype))
    assert found.dtype == dtype
    error = (found.double() - exact(x, levels)) * expand(levels, x)
    assert error.abs().max() < tolerance, error.abs().max()


def test_fewer_levels_are_levels_of_the_network():
    score = VPScore(noise_net, ABAR)
    few = score.levels(10)
    assert len(few) == 10 and few[0] == score.levels()[0] and few[-1] == score.levels()[-1] and set(few.tolist()) <= set(score.levels().tolist())
    for n in (1, 1001):
        with pytest.raises(ValueError, match=f"n={n}; expected 2 … 1000"): score.levels(n)


def test_the_step_is_the_nearest():
    asked = []
    score = VPScore(lambda x, t: asked.append(t) or torch.zeros_like(x), ABAR)
    sigmas = score.levels().flip(0)
    for factor in (0.9999, 1., 1.0001): score(torch.zeros(1000, 2), (sigmas * factor).float())
    assert all(torch.equal(t, torch.arange(1000)) and t.dtype == torch.long for t in asked)
    score(torch.zeros(2, 2), torch.tensor([1e-9, 1e9]))
    assert asked[-1].tolist() == [0, 999]


def test_levels_in_float64_meet_images_and_networks_in_float32():
    net = nn.Linear(2, 2)
    x, sigma = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1., 10.])
    for predicts in ("noise", "data", "v"):
        score = VPScore(lambda x_t, t: net(x_t), ABAR, predicts)
        found = score(x, sigma.double())
        assert found.dtype == torch.float32 and torch.equal(found, score(x, sigma))
    classifier = VPClassifier(lambda x_t, t: net(x_t), ABAR)
    assert torch.equal(classifier(x, sigma.double()), classifier(x, sigma))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_is_for_the_network(dtype):
    "The ladder keeps its digits, also where the wrapper is part of something larger; score and images are the network's."
    class Net(nn.Linear):
        def forward(self, x_t, t):
            self.asked = t
            return super().forward(x_t)
    score = VPScore(Net(2, 2), ABAR)
    levels, whole = score.levels(), nn.Sequential(score).to(dtype)
    assert torch.equal(score.levels(), levels) and score.net.weight.dtype == dtype
    found = whole[0](torch.ones(1000, 2, dtype=dtype), levels.flip(0))
    assert found.dtype == dtype and torch.equal(score.net.asked, torch.arange(1000))
    assert score.to("meta").log_sigmas.device.type == "meta"


def test_steps_are_where_the_images_are():
    "ᾱ may lie elsewhere: a function in the place of a network is never moved."
    found = []
    score = VPScore(lambda x, t: found.append(t) or x, ABAR)
    assert score(torch.empty(2, 3, device="meta"), torch.empty(2, device="meta")).device.type == found[0].device.type == "meta"


def test_a_network_moves_with_its_wrapper():
    net = nn.Linear(2, 2)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x, t): return self.net(x)
    score = VPScore(Net(), ABAR).double()
    assert [n for n, _ in score.named_parameters()] == ["net.net.weight", "net.net.bias"] and "log_sigmas" not in score.state_dict()
    score(torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)).sum().backward()
    assert net.weight.grad is not None


def test_the_gradient_of_a_classifier_is_with_respect_to_the_noisy_image():
    "The chain rule through 1/√(1 + σ²)."
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    classifier = VPClassifier(lambda x_t, t: x_t @ weight.T, ABAR)
    x, sigma, y = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), torch.logspace(-1, 1, 5), torch.arange(5) % 4
    p = classifier(x, sigma).softmax(1)
    by_hand = (weight[y] - p @ weight) / (1 + sigma**2).sqrt()[:, None]
    torch.testing.assert_close(likelihood_score(classifier, x, sigma, y), by_hand)


def test_guided_as_in_the_other_convention():
    "A score and a classifier asked by way of x_t sample the same points as asked directly."
    g = torch.Generator().manual_seed(0)
    data, labels = torch.cat([torch.randn(50, 2, generator=g) * 0.1 + m for m in (-1, 1)]).double(), torch.arange(100) // 50
    oracle, judge = parzen_score(data), parzen_classifier(data, labels, 2)
    def back(x_t, t):
        sigma = ((1 - ABAR[t]) / ABAR[t]).sqrt()
        return x_t * (1 + expand(sigma, x_t) ** 2).sqrt(), sigma
    def net(x_t, t):
        x, sigma = back(x_t, t)
        return -expand(sigma, x) * oracle(x, sigma)
    score, classifier = VPScore(net, ABAR), VPClassifier(lambda x_t, t: judge(*back(x_t, t)), ABAR)
    levels = score.levels(30)
    start = levels[0] * torch.randn(20, 2, generator=g, dtype=torch.float64)
    ours, direct = (heun_sample(posterior_score(s, c, 1), start, levels) for s, c in ((score, classifier), (oracle, judge)))
    assert (ours > 0).all()
    torch.testing.assert_close(ours, direct, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make, says", [
    (lambda: VPScore(noise_net, 1 - ABAR), "decreasing, between 0 and 1 .the products of 1 − β, not the β"), (lambda: VPScore(noise_net, ABAR[:, None]), "alphas_cumprod"),
    (lambda: VPScore(noise_net, ABAR, "score"), "predicts='score'; expected 'noise', 'data' or 'v'"),
    (lambda: VPScore(lambda x, t: (x,), ABAR)(torch.zeros(2, 3), torch.ones(2)), "net gave a tuple; expected a tensor: wrap it"),
    (lambda: VPScore(lambda x, t: x[:, :1], ABAR)(torch.zeros(2, 3), torch.ones(2)), r"net gave shape \(2, 1\)"),
    (lambda: VPScore(noise_net, ABAR)(torch.zeros(2, 3), torch.ones(3)), "sigma has shape"),
])
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says): make()


@pytest.mark.parametrize("wrong, says", [
    (lambda x, s: -exact(x, s), "likely the sign"), (lambda x, s: -expand(s, x) * exact(x, s), "it seems to predict the noise"),
    (lambda x, s: x + expand(s, x) ** 2 * exact(x, s), "it seems to predict the clean data"),
    (lambda x, s: torch.full_like(x, 1e3), "is x scaled as in its training"),
])
def test_what_is_no_score_is_told(wrong, says):
    g = torch.Generator().manual_seed(0)
    x, noise = M + SPREAD * torch.randn(200, 3, 4, 4, generator=g), torch.randn(200, 3, 4, 4, generator=g)
    sigma = torch.logspace(-1, 1, 200)
    assert check_score(exact, x, sigma, noise) < 0.6
    with pytest.raises(ValueError, match=says): check_score(wrong, x, sigma, noise)
