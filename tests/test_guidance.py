"""Likelihood and posterior scores: exact on the oracle, per item, in any shape, with a graph only if asked for; and what is refused."""
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dlsm.guidance import likelihood_score, posterior_score, prior_score, scale_by_level
from dlsm.networks import Ensemble, MLPClassifier, seeded
from dlsm.parzen import parzen_classifier, parzen_score
from dlsm.resnet import BatchNorm

B = 6


@pytest.fixture(params=[(2,), (3, 4, 4)], ids=["points", "images"])
def batch(request):
    "Noisy items, levels, labels of three classes, and the data they come from, in float64."
    g = torch.Generator().manual_seed(0)
    data, classes = torch.randn(30, *request.param, generator=g, dtype=torch.float64), torch.arange(30) % 3
    x_noisy = data[:B] + torch.randn(B, *request.param, generator=g, dtype=torch.float64)
    return x_noisy, torch.linspace(0.3, 3., B, dtype=torch.float64), torch.arange(B) % 3, data, classes


def linear(x, n_classes=3, seed=1):
    "A classifier W·x/σ + b, whose likelihood score is known."
    w = torch.randn(n_classes, x[0].numel(), generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return w, lambda x, sigma: x.flatten(1) @ w.T / sigma[:, None] + torch.arange(n_classes, dtype=x.dtype)


def test_closed_form(batch):
    x, sigma, y, *_ = batch
    w, classifier = linear(x)
    p = classifier(x, sigma).softmax(1)
    expected = ((w[y] - p @ w) / sigma[:, None]).reshape(x.shape)
    assert torch.allclose(likelihood_score(classifier, x, sigma, y), expected, atol=1e-12)


def test_bayes_rule_is_exact_on_the_oracle(batch):
    x, sigma, y, data, classes = batch
    prior, oracle = parzen_score(data), parzen_classifier(data, classes, 3)
    guided = posterior_score(prior, oracle, y)(x, sigma)
    for c in range(3):
        exact = parzen_score(data[classes == c])(x, sigma)
        assert torch.allclose(guided[y == c], exact[y == c], rtol=1e-10, atol=1e-10)
        assert torch.allclose(posterior_score(prior, oracle, c)(x, sigma), exact, rtol=1e-10, atol=1e-10)


def test_scales_and_labels_are_per_item(batch):
    x, sigma, y, *_ = batch
    _, classifier = linear(x)
    def score(x, sigma): return -x
    alpha = torch.arange(B, dtype=x.dtype)
    got = posterior_score(score, classifier, y, alpha)(x, sigma)
    for i in range(B):
        alone = posterior_score(score, classifier, int(y[i]), float(alpha[i]))(x[i:i + 1], sigma[i:i + 1])
        assert torch.allclose(got[i:i + 1], alone, atol=1e-12)
    assert torch.equal(got[0], -x[0])  # α = 0: the prior alone
    as_tensor, as_number = (posterior_score(score, classifier, y, alpha)(x, sigma) for alpha in (torch.tensor(2.), 2.))
    assert torch.equal(as_tensor, as_number)


def test_a_scale_may_depend_on_the_level(batch):
    x, sigma, y, *_ = batch
    _, classifier = linear(x)
    def score(x, sigma): return -x
    alpha = scale_by_level([0.1, 1., 10.], [1., 3., 5.])
    at = torch.tensor([0.01, 0.1, 10**-0.5, 1., 10**0.5, 10., 50.], dtype=x.dtype)
    torch.testing.assert_close(alpha(at), torch.tensor([1., 1., 2., 3., 4., 5., 5.], dtype=x.dtype))  # linear in log σ, constant outside
    assert torch.equal(posterior_score(score, classifier, y, alpha)(x, sigma), posterior_score(score, classifier, y, alpha(sigma))(x, sigma))
    assert torch.equal(scale_by_level(torch.tensor([0.1, 1., 10.]), torch.tensor([1., 3., 5.]))(at.float()), alpha(at.float()))
    assert scale_by_level([2.], [7.])(sigma).tolist() == [7.] * B and alpha(sigma.float()).dtype == torch.float32
    for levels, alphas in (([1., 1.], [1., 2.]), ([0., 1.], [1., 2.]), ([], []), ([1., 2.], [1.]), ([1., float("nan")], [1., 2.])):
        with pytest.raises(ValueError, match="as many of each, the levels above 0 and increasing"): scale_by_level(levels, alphas)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\)"): posterior_score(score, classifier, y, lambda sigma: sigma[:2])(x, sigma)


@pytest.mark.parametrize("classifier", [lambda x, s: torch.tensor([1., -2.]).expand(len(x), 2), lambda x, s: torch.stack([s, -s], 1)])
def test_no_dependence_on_the_input_is_a_zero_score(classifier):
    x, sigma, y = torch.randn(B, 2), torch.ones(B), torch.arange(B) % 2
    for create_graph in (False, True):
        assert torch.equal(likelihood_score(classifier, x, sigma, y, create_graph), torch.zeros(B, 2))


def test_gradient_survives_where_the_probability_underflows():
    x, sigma, y = torch.full((1, 2), 1e4), torch.ones(1), torch.zeros(1, dtype=torch.long)
    got = likelihood_score(lambda x, s: torch.stack([0 * x[:, 0], x[:, 0]], 1), x, sigma, y)
    assert torch.equal(got, torch.tensor([[-1., 0.]]))
    half = likelihood_score(lambda x, s: torch.stack([0 * x[:, 0], x[:, 0]], 1).bfloat16(), torch.full((1, 2), 20.), sigma, y)
    assert half.dtype == torch.float32 and torch.allclose(half, torch.tensor([[-1., 0.]]))


def test_no_graph_is_kept():
    net = MLPClassifier()
    x, sigma, y = torch.randn(B, 2, requires_grad=True), torch.ones(B), torch.arange(B) % 2
    assert not likelihood_score(net, x, sigma, y).requires_grad
    def score(x, sigma): return x * net.out.weight[0, 0]
    assert not prior_score(score, x, sigma).requires_grad
    assert not posterior_score(score, net, y)(x, sigma).requires_grad
    assert x.grad is None and all(p.grad is None for p in net.parameters())
    with torch.no_grad(): assert likelihood_score(net, x, sigma, y).abs().sum() > 0


def test_double_backward_against_finite_differences():
    net = seeded(lambda: MLPClassifier(widths=(8, 8), sigma_widths=(4,), joint=8, activation=nn.SiLU).double(), 0)
    g = torch.Generator().manual_seed(1)
    x, sigma, y = torch.randn(B, 2, generator=g, dtype=torch.float64), torch.ones(B, dtype=torch.float64), torch.arange(B) % 2
    def value(): return likelihood_score(net, x, sigma, y, create_graph=True).square().sum()
    for w, grad in zip(net.parameters(), torch.autograd.grad(value(), list(net.parameters()), materialize_grads=True)):
        ends = []
        for step in (1e-5, -2e-5):
            with torch.no_grad(): w.view(-1)[0] += step
            ends.append(value().item())
        with torch.no_grad(): w.view(-1)[0] += 1e-5
        assert abs((ends[0] - ends[1]) / 2e-5 - grad.view(-1)[0].item()) < 1e-7


def test_inside_vmap():
    nets = [seeded(MLPClassifier, s) for s in range(3)]
    g = torch.Generator().manual_seed(2)
    x, sigma, y = torch.randn(3, B, 2, generator=g), torch.rand(3, B, generator=g) + 0.1, torch.randint(2, (3, B), generator=g)
    together = Ensemble(nets).map(lambda net, x, s, y: likelihood_score(net, x, s, y), x, sigma, y)
    for i, net in enumerate(nets): assert torch.allclose(together[i], likelihood_score(net, x[i], sigma[i], y[i]), atol=1e-6)


X, S, Y = torch.randn(B, 2), torch.ones(B), torch.zeros(B, dtype=torch.long)
def two(x, sigma): return x[:, :2]


@pytest.mark.parametrize("args, says", [
    ((two, X, 0 * S, Y), r"sigma \(6,\)"),
    ((two, X, -S, Y), r"sigma \(6,\)"),
    ((two, X, S * float("nan"), Y), r"sigma \(6,\)"),
    ((two, X, S[:2], Y), r"sigma has shape \(2,\)"),
    ((two, X, S[:, None], Y), r"sigma has shape \(6, 1\)"),
    ((two, X[:, 0], S, Y), r"x_noisy has shape \(6,\)"),
    ((two, X, S, Y[:2]), r"y has shape \(2,\)"),
    ((two, X, S, Y + 2), r"y \(6,\) has labels outside 0…1"),
    ((two, X, S, Y - 1), r"y \(6,\) has labels outside 0…1"),
    ((two, X, S, Y.float()), r"y \(6,\) has dtype torch.float32"),
    ((lambda x, s: x[:, 0], X, S, Y), r"classifier gave logits of shape \(6,\)"),
    ((lambda x, s: x[:3], X, S, Y), r"classifier gave logits of shape \(3, 2\)"),
])
def test_bad_input(args, says):
    with pytest.raises(ValueError, match=says): likelihood_score(*args)
    classifier, x, sigma, y = args
    with pytest.raises(ValueError, match=says): posterior_score(lambda x, s: torch.zeros_like(x), classifier, y)(x, sigma)


@pytest.mark.parametrize("score, y, scale, says", [
    (lambda x, s: -x, 2, 1., r"y \(6,\) has labels outside 0…1"),
    (lambda x, s: -x, 0, torch.ones(3), r"scale has shape \(3,\)"),
    (lambda x, s: -x, 0, torch.ones(6, 1), r"scale has shape \(6, 1\)"),
    (lambda x, s: -x[:, :1], 0, 1., r"score gave shape \(6, 1\)"),
])
def test_bad_guidance(score, y, scale, says):
    with pytest.raises(ValueError, match=says): posterior_score(score, two, y, scale)(X, S)


class Images(nn.Module):
    "A small classifier of images [B, 3, 4, 4] with one layer of the kind that is asked for."
    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.head = kind, nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)
        self.norm = BatchNorm(8) if kind == "our batch norm" else nn.BatchNorm2d(8)

    def forward(self, x, sigma):
        if self.kind == "fused attention":
            tokens = self.conv(x).flatten(2).mT[:, None]
            return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mean(1))
        if "checkpoint" in self.kind: h = checkpoint(self.conv, x, use_reentrant=self.kind.startswith("reentrant"))
        else: h = self.norm(self.conv(x))
        return self.head(F.silu(h).mean((2, 3)))


def training_gradient(net):
    g = torch.Generator().manual_seed(0)
    x, sigma, y = torch.rand(6, 3, 4, 4, generator=g), torch.full((6,), 0.5), torch.arange(6) % 2
    likelihood_score(net, x, sigma, y, create_graph=True).square().sum().backward()
    return net.conv.weight.grad


@pytest.mark.parametrize("kind", ["fused attention", "our batch norm"])
def test_layers_that_can_be_helped(kind):
    "Fused attention has no second derivative; a plain one is taken in its place."
    torch.manual_seed(0)
    found = training_gradient(Images(kind))
    assert found.isfinite().all() and found.abs().max() > 0


@pytest.mark.parametrize("kind, says", [
    ("batch norm", "Images cannot be differentiated.*BatchNorm in train mode does: call `eval\\(\\)` on such layers.*use `dlsm.resnet.BatchNorm`"),
    ("checkpoint", "switch activation checkpointing off"), ("reentrant checkpoint", "autograd.Function without `setup_context`"),
])
def test_layers_that_cannot_be_helped_are_explained(kind, says):
    with pytest.raises(RuntimeError, match=says): training_gradient(Images(kind))
    if kind == "batch norm": assert training_gradient(Images(kind).eval()).isfinite().all()


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_network_in_eval_mode_has_the_gradient_that_a_function_has(around):
    "The former goes through plain autograd, the latter through `torch.func.grad`, which under inference mode gives 0 in PyTorch 2.11."
    torch.manual_seed(0)
    net, x, sigma, y = Images("batch norm").eval(), torch.rand(6, 3, 4, 4), torch.full((6,), 0.5), torch.arange(6) % 2
    expected = likelihood_score(net, x, sigma, y)
    assert expected.abs().max() > 0 and not expected.requires_grad
    def function(x, sigma): return net(x, sigma)
    def agree(*args):
        for given in (net, function):
            found = likelihood_score(given, *args)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
            assert not found.requires_grad
        guided = posterior_score(lambda x, sigma: 0 * x, net, args[2])
        torch.testing.assert_close(guided(*args[:2]), expected, rtol=1e-5, atol=1e-7)
    with around():
        copies = x.clone(), sigma.clone(), y.clone()  # under inference mode they can never ask for a gradient, nor be a part of one
        for args in ((x, sigma, y), copies): agree(*args)
        assert likelihood_score(net, *copies, create_graph=True).requires_grad
    agree(*copies)
    assert all(p.grad is None for p in net.parameters())


class Constant(nn.Module):
    "Logits of [B, 2] that do not depend on x; with a weight, they ask for a gradient nevertheless."
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2)) if weight else None

    def forward(self, x, sigma): return sigma[:, None] * (torch.ones(2) if self.weight is None else self.weight)


@pytest.mark.parametrize("weight", [False, True])
def test_a_network_without_dependence_on_the_input_has_a_zero_score(weight):
    assert torch.equal(likelihood_score(Constant(weight).eval(), X, S, Y), torch.zeros(B, 2))


def test_the_gradient_of_a_network_inside_transforms():
    "Where plain autograd is refused, and where nobody asks for it."
    net = MLPClassifier().eval()
    def of(x): return likelihood_score(net, x, S, Y)
    torch.testing.assert_close(torch.vmap(of)(X[None])[0], of(X), rtol=1e-5, atol=1e-7)
    seen, _ = torch.func.jvp(of, (X,), (torch.ones_like(X),))
    torch.testing.assert_close(seen, of(X), rtol=1e-5, atol=1e-7)


def test_layers_of_a_network_in_eval_mode():
    "Without a graph only reentrant checkpointing is in the way; and batch normalisation must not change while it is looked at."
    g = torch.Generator().manual_seed(0)
    args = torch.rand(6, 3, 4, 4, generator=g), torch.full((6,), 0.5), torch.arange(6) % 2
    assert likelihood_score(Images("checkpoint").eval(), *args).abs().max() > 0
    with pytest.raises(RuntimeError, match="Images cannot be differentiated.*reentrant checkpointing: switch it off"):
        likelihood_score(Images("reentrant checkpoint").eval(), *args)
    with pytest.raises(RuntimeError, match="BatchNorm in train mode does"): likelihood_score(Images("batch norm"), *args)


def test_other_errors_of_a_classifier_are_its_own():
    def broken(x, sigma): raise RuntimeError("out of tea")
    with pytest.raises(RuntimeError, match="^out of tea$"): likelihood_score(broken, X, S, Y)


@pytest.mark.parametrize("answer, says", [
    (lambda x, s: (two(x, s),), "classifier gave a tuple; expected logits, a tensor .B, K.: wrap it"), (lambda x, s: two(x, s)[:, :1], "at least two classes"),
])
def test_what_a_classifier_may_not_give(answer, says):
    with pytest.raises(ValueError, match=says): likelihood_score(answer, X, S, Y * 0)


def test_what_a_score_may_not_give():
    with pytest.raises(ValueError, match="score gave a tuple; expected a tensor like x_noisy: wrap it"): prior_score(lambda x, s: (x,), X, S)
    with pytest.raises(ValueError, match="y is None; expected labels"): posterior_score(lambda x, s: -x, two, None)(X, S)
    with pytest.raises(ValueError, match="x_noisy has dtype torch.uint8; expected floating-point numbers .of bytes, `dlsm.data.to_unit`"):
        prior_score(parzen_score(X), torch.zeros(6, 2, dtype=torch.uint8), S)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x, sigma): return self.layers(x)


@pytest.mark.parametrize("score, classifier, says", [
    (None, torch.no_grad()(lambda x, s: two(x, s)), "gradient is 0 for every item, so it guides nothing"),
    (None, lambda x, s: two(x.detach(), s), "gradient is 0"), (None, lambda x, s: two(x, s).softmax(1), "as probabilities do; expected logits"),
    (None, Dropping(), "the classifier is in train mode"), (Dropping(), None, "the score is in train mode"),
])
def test_what_is_seldom_meant_is_warned_of_once(score, classifier, says):
    guided = posterior_score(score or (lambda x, s: -x), classifier or two, 0)
    with pytest.warns(UserWarning, match=says): guided(X, S)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided(X, S)


def test_the_look_waits_for_a_batch_that_is_not_empty():
    guided = posterior_score(lambda x, s: -x, lambda x, s: two(x, s).softmax(1), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guided(X[:0], S[:0]).shape == (0, 2)
    with pytest.warns(UserWarning, match="as probabilities do; expected logits"): guided(X, S)


def test_a_scale_in_float64_leaves_the_score_in_float32():
    alpha = torch.linspace(0, 10, 6, dtype=torch.float64)
    found = posterior_score(lambda x, s: -x, two, Y, alpha)(X, S)
    assert found.dtype == torch.float32 and torch.equal(found, posterior_score(lambda x, s: -x, two, Y, alpha.float())(X, S))


def test_what_is_meant_is_not_warned_of():
    "Networks in eval mode; logits; a gradient that is 0 because the classifier is sure."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior_score(Dropping().eval(), Dropping().eval(), 0)(X, S)
        posterior_score(lambda x, s: -x, lambda x, s: torch.stack([x[:, 0] * 0 + 200, x[:, 1] * 0], 1), 0)(X, S)
