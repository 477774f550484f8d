"""The losses of stage 2: closed forms, weighting, the Proposition, gradients, ensembles, images, and what is refused."""
import math

import pytest
import torch
from torch import nn

from dlsm.dsm import perturb
from dlsm.guidance import likelihood_score
from dlsm.losses import ce_loss, dlsm_loss, elsm_loss, total_loss
from dlsm.networks import Ensemble, MLPClassifier, seeded
from dlsm.parzen import parzen_classifier, parzen_score
from dlsm.schedule import VESchedule

B = 6


def prior(x, sigma): return -0.5 * x


def sines(x, n_classes=2, seed=0):
    "A smooth random classifier for points or images."
    a = torch.randn(n_classes, x[0].numel(), generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return lambda x, sigma: torch.sin(x.flatten(1) @ a.T / sigma[:, None]) * 3


@pytest.fixture(params=[(2,), (3, 4, 4)], ids=["points", "images"])
def batch(request):
    "x, y, sigma, noise in float64."
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(B, *request.param, generator=g, dtype=torch.float64) for _ in range(2))
    return x, torch.arange(B) % 2, torch.linspace(0.2, 3., B, dtype=torch.float64), noise


@pytest.mark.parametrize("power", [0, 1, 2, 0.5])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_closed_forms(batch, power, reduce):
    x, y, sigma, noise = batch
    classifier, oracle = sines(x), sines(x, seed=1)
    x_noisy = perturb(x, sigma, noise)
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    def half_square(r): return getattr((s**power * r).square().flatten(1), reduce)(1) / 2
    g = likelihood_score(classifier, x_noisy, sigma, y)
    ce = -classifier(x_noisy, sigma).log_softmax(1)[torch.arange(B), y]
    dlsm = half_square(g + prior(x_noisy, sigma) - (x - x_noisy) / s**2)
    weighting = dict(power=power, reduce=reduce)
    assert torch.allclose(ce_loss(classifier, x_noisy, sigma, y), ce)
    elsm = half_square(g - likelihood_score(oracle, x_noisy, sigma, y))
    assert torch.allclose(elsm_loss(classifier, oracle, x_noisy, sigma, y, **weighting), elsm)
    assert torch.allclose(dlsm_loss(classifier, prior, x, y, sigma, noise, **weighting), dlsm, rtol=1e-10)
    assert torch.allclose(total_loss(classifier, prior, x, y, sigma, noise, 0.125, **weighting), dlsm + 0.125 * ce, rtol=1e-10)
    assert torch.allclose(total_loss(classifier, prior, x, y, sigma, noise, torch.tensor(2.), **weighting), dlsm + 2 * ce, rtol=1e-10)


def test_elsm_of_the_oracle_is_zero():
    data, classes = torch.randn(40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64), torch.arange(40) % 2
    oracle = parzen_classifier(data, classes, 2)
    loss = elsm_loss(lambda x, s: oracle(x, s) + 3, oracle, data[:B] + 0.3, torch.ones(B, dtype=torch.float64), classes[:B])
    assert loss.shape == (B,) and loss.max() < 1e-25


def test_the_proposition_in_two_dimensions():
    "L_DLSM − L_ELSM is the same for every classifier, by quadrature over the plane."
    data = torch.tensor([[-1., 0.], [0.5, 1.], [1., -0.5], [0., -1.]], dtype=torch.float64)
    classes, level, n = torch.tensor([0, 1, 0, 1]), 0.7, 111
    line = torch.linspace(-7, 7, n, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    weight = (torch.exp(-z.square().sum(1) / 2) / (2 * math.pi) * (line[1] - line[0])**2).repeat(4) / 4
    x, y, noise = data.repeat_interleave(n * n, 0), classes.repeat_interleave(n * n), z.repeat(4, 1)
    sigma = torch.full((len(x),), level, dtype=torch.float64)
    constants, losses = [], []
    for seed in range(8):
        classifier = sines(x, seed=seed)
        dlsm = weight @ dlsm_loss(classifier, parzen_score(data), x, y, sigma, noise)
        elsm = weight @ elsm_loss(classifier, parzen_classifier(data, classes, 2), perturb(x, sigma, noise), sigma, y)
        constants.append((dlsm - elsm).item()); losses.append(elsm.item())
    assert max(losses) > 2 * min(losses) and (max(constants) - min(constants)) / constants[0] < 1e-6, (losses, constants)


def test_the_prior_stays_frozen_and_the_classifier_learns():
    score, classifier = nn.Linear(2, 2), MLPClassifier()
    x, y, sigma, noise = torch.randn(B, 2), torch.arange(B) % 2, torch.ones(B), torch.randn(B, 2)
    total_loss(classifier, lambda x, s: score(x), x, y, sigma, noise, 1.).mean().backward()
    assert score.weight.grad is None and all(p.grad is not None for p in classifier.parameters())


@pytest.mark.parametrize("loss", ["elsm", "dlsm", "total"])
def test_gradient_against_finite_differences(loss):
    net = seeded(lambda: MLPClassifier(widths=(8, 8), sigma_widths=(4,), joint=8, activation=nn.SiLU).double(), 0)
    g = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(B, 2, generator=g, dtype=torch.float64) for _ in range(2))
    y, sigma = torch.arange(B) % 2, torch.linspace(0.3, 3, B, dtype=torch.float64)
    def value():
        if loss == "elsm": return elsm_loss(net, sines(x), perturb(x, sigma, noise), sigma, y).sum()
        return total_loss(net, prior, x, y, sigma, noise, 0.5 if loss == "total" else 0.).sum()
    weights = list(net.parameters())
    direction = [torch.randn(w.shape, generator=g, dtype=torch.float64) for w in weights]
    slope = sum((a * b).sum() for a, b in zip(torch.autograd.grad(value(), weights), direction)).item()
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad(): torch._foreach_add_(weights, direction, alpha=step)
        ends.append(value().item())
    assert abs((ends[0] - ends[1]) / 2e-5 / slope - 1) < 1e-6


def test_inside_an_ensemble():
    "The same losses and gradients for members together as for each alone, with another λ for each."
    nets, g = [seeded(MLPClassifier, s) for s in range(3)], torch.Generator().manual_seed(2)
    x, noise = (torch.randn(3, B, 2, generator=g) for _ in range(2))
    sigma, y, lam = torch.rand(3, B, generator=g) + 0.1, torch.randint(2, (3, B), generator=g), torch.tensor([0., 0.125, 1.])
    ensemble = Ensemble(nets)
    together = ensemble.map(lambda net, *args: total_loss(net, prior, *args), x, y, sigma, noise, lam)
    together.sum().backward()
    for i, net in enumerate(nets):
        alone = total_loss(net, prior, x[i], y[i], sigma[i], noise[i], lam[i])
        alone.sum().backward()
        assert torch.allclose(together[i], alone, rtol=1e-4)
        for stack, own in zip(ensemble.parameters(), net.parameters()): assert torch.allclose(stack.grad[i], own.grad, rtol=1e-3, atol=1e-5)


X, S, Y = torch.randn(B, 2), torch.ones(B), torch.zeros(B, dtype=torch.long)
def two(x, sigma): return x[:, :2]


@pytest.mark.parametrize("args, says", [
    ((two, prior, X, Y, 0 * S, X), r"sigma \(6,\)"),
    ((two, prior, X, Y, S[:2], X), r"sigma has shape \(2,\)"),
    ((two, prior, X, Y[:2], S, X), r"y has shape \(2,\)"),
    ((two, prior, X, Y + 2, S, X), r"y \(6,\) has labels outside 0…1"),
    ((two, prior, X, Y, S, X[:, :1]), r"noise has shape \(6, 1\)"),
    ((two, prior, X[:, 0], Y, S, X[:, 0]), r"x has shape \(6,\)"),
    ((two, lambda x, s: x[:, :1], X, Y, S, X), r"score gave shape \(6, 1\)"),
    ((lambda x, s: x[:, 0], prior, X, Y, S, X), r"classifier gave logits of shape \(6,\)"),
])
def test_bad_input(args, says):
    with pytest.raises(ValueError, match=says): dlsm_loss(*args)
    with pytest.raises(ValueError, match=says): total_loss(*args, 1.)


def test_bad_input_of_the_others():
    with pytest.raises(ValueError, match=r"y \(6,\) has labels"): ce_loss(two, X, S, Y + 2)
    with pytest.raises(ValueError, match=r"y \(6,\) has labels"): elsm_loss(two, two, X, S, Y + 2)
    with pytest.raises(ValueError, match=r"sigma \(6,\)"): ce_loss(two, X, -S, Y)
    with pytest.raises(ValueError, match="reduce='max'"): dlsm_loss(two, prior, X, Y, S, X, reduce="max")
    with pytest.raises(ValueError, match=r"classifier gave logits of shape \(6,\)"): ce_loss(lambda x, s: x[:, 0], X, S, Y)


def test_lambda_belongs_to_the_item_or_to_all():
    with pytest.raises(ValueError, match=r"lam has shape \(6, 1\); expected one value, or one per item"):
        x = torch.zeros(6, 2)
        total_loss(lambda x, s: x, lambda x, s: -x, x, torch.zeros(6, dtype=torch.long), torch.ones(6), x, torch.ones(6, 1))


def test_lambda_in_float64_leaves_the_loss_in_float32():
    lam = torch.linspace(0, 1, 6, dtype=torch.float64)
    found, same = (total_loss(two, prior, X, Y, S, X, weight) for weight in (lam, lam.float()))
    assert found.dtype == torch.float32 and torch.equal(found, same)


def test_an_infinite_cross_entropy_does_not_count_without_a_weight():
    "The class 1 is impossible, and its gradient a number."
    x, sigma, noise = torch.randn(B, 2, generator=torch.Generator().manual_seed(0)), torch.ones(B), torch.zeros(B, 2)
    def certain(x, sigma): return torch.stack([x[:, 0], 2 * x[:, 1] - math.inf], 1)
    y = torch.ones(B, dtype=torch.long)
    assert ce_loss(certain, x, sigma, y).isinf().all() and total_loss(certain, prior, x, y, sigma, noise, 0.1).isinf().all()
    expected = (torch.tensor([-1., 2.]) - x / 2).square().mean(1) / 2
    for found in (dlsm_loss(certain, prior, x, y, sigma, noise), total_loss(certain, prior, x, y, sigma, noise, 0)): torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cross_entropy_of_any_logits_is_at_least_float32(dtype):
    x, sigma, y, noise = torch.zeros(3, 2), torch.ones(3), torch.tensor([0, 1, 1]), torch.zeros(3, 2)
    logits = torch.tensor([[0.1, 0.3], [1., -1.], [6e4, -6e4]]).to(dtype)
    def net(x, sigma): return logits + (0 * x).to(dtype)
    expected = (logits.double().logsumexp(1) - logits.double()[torch.arange(3), y])
    found = ce_loss(net, x, sigma, y)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total_loss(net, lambda x, s: 0 * x, x, y, sigma, noise, 1.).double(), expected, rtol=1e-6, atol=1e-6)


def test_levels_of_a_schedule_meet_float32_points():
    "They are float64; the losses are those of the same levels in float32, in float32."
    g = torch.Generator().manual_seed(0)
    x, noise, y, net = torch.randn(8, 2, generator=g), torch.randn(8, 2, generator=g), torch.arange(8) % 2, seeded(MLPClassifier, 0)
    levels = VESchedule(0.1, 10.).levels(8)
    for loss in (lambda s: total_loss(net, prior, x, y, s, noise, 1., 2), lambda s: dlsm_loss(net, prior, x, y, s, noise, 1), lambda s: ce_loss(net, x, s, y),
                 lambda s: elsm_loss(net, parzen_classifier(x, y, 2), x, s, y, 1)):
        found = loss(levels)
        assert levels.dtype == torch.float64 and found.dtype == torch.float32 and torch.allclose(found, loss(levels.float()), rtol=1e-5)
