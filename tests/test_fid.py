"""Fréchet distance and Inception score: equal to scipy's formula and torch-fidelity, at any rank, streamed."""
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from dlsm.features import Features
from dlsm.frechet import Moments, fid, fid_curve, inception_score, moments


def correlated(n, d, seed, shift=0.):
    "Features with a spectrum that falls, as those of networks do."
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def by_scipy(a, b):
    a, b = a.numpy(), b.numpy()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb)
    return float(((a.mean(0) - b.mean(0))**2).sum() + np.trace(ca) + np.trace(cb) - 2 * np.trace(root).real)


def quietly(*args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fid(*args)


@pytest.mark.parametrize(("n", "m", "d"), ((500, 400, 16), (1500, 1200, 200)))
def test_equals_scipy_and_torch_fidelity(n, m, d):
    reference = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = correlated(n, d, 0), 1.1 * correlated(m, d, 1, 0.05)
    ours = quietly(a, b)
    statistics = [reference.fid_features_to_statistics(x) for x in (a, b)]
    theirs = reference.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(by_scipy(a, b), rel=1e-6) and ours == pytest.approx(theirs, rel=1e-6)
    assert quietly(b, a) == pytest.approx(ours, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), ((30, 40), (30, 500), (500, 30)))
def test_fewer_images_than_features(n, m):
    "With rank-deficient covariances the trace term is the sum of the singular values of both centred sets' product."
    a, b = correlated(n, 100, 0), correlated(m, 100, 1, 0.1)
    x, y = ((f - f.mean(0)) / (len(f) - 1)**0.5 for f in (a, b))
    exact = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    assert quietly(a, b) == pytest.approx(exact.item(), rel=1e-6)


def test_itself_and_degenerate_sets():
    a = correlated(300, 20, 0)
    assert quietly(a, a) < 1e-8 * moments(a).cov.trace()
    flat = torch.ones(10, 20, dtype=torch.float64)
    assert quietly(flat, flat) == 0 and quietly(flat, a) == pytest.approx(((a.mean(0) - 1).square().sum() + moments(a).cov.trace()).item())


def test_the_root_leaves_out_rounding_errors():
    "Eigenvalues up to D · 2.3e-16 of the largest, here 9.2e-16, in any unit; a covariance of nothing has no root."
    cov = torch.diag(torch.tensor([1., 1e-15, 9e-16, -1e-17], dtype=torch.float64))
    for unit in (1e-9, 1., 1e9):
        root = Moments(9, torch.zeros(4), unit * cov).root
        assert root.shape == (4, 2)
        torch.testing.assert_close(root @ root.T, unit * torch.diag(torch.tensor([1., 1e-15, 0., 0.], dtype=torch.float64)), rtol=1e-9, atol=1e-25 * unit)
    for nothing in (torch.zeros_like(cov), -cov.abs()): assert Moments(9, torch.zeros(4), nothing).root.shape == (4, 0)


def test_streamed_moments():
    a = correlated(1000, 30, 0, 1e4).float()
    whole = Moments(1000, a.double().mean(0), torch.cov(a.double().T))
    for parts in (a, Features(a, torch.zeros(1000), "plane"), a.split(33), (row[None] for row in a), (a[:0], a[:500], a[:0], a[500:])):
        found = moments(parts)
        assert found.n == 1000 and torch.allclose(found.mean, whole.mean, rtol=1e-12) and torch.allclose(found.cov, whole.cov, rtol=1e-6, atol=1e-9)
        assert found.cov.dtype == torch.float64


def test_warns_below_fifty_thousand_images():
    a = correlated(100, 3, 0)
    with pytest.warns(UserWarning, match="Fréchet distance of 100 and 100 images: it is biased upwards"): fid(a, a)
    many = Moments(50_000, a.mean(0), torch.cov(a.T))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fid(many, many) < 1e-9


def test_falls_with_the_number_of_images():
    curve = fid_curve(correlated(3000, 24, 0), correlated(3000, 24, 1), (100, 400, 1600, 3000), repeats=3)
    means = [row["mean"] for row in curve]
    assert means == sorted(means, reverse=True) and curve[-1]["sd"] == 0 < curve[0]["sd"] and [row["n"] for row in curve] == [100, 400, 1600, 3000]


@pytest.mark.parametrize("splits", (1, 10))
def test_inception_score_equals_torch_fidelity(splits):
    reference = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = 3 * torch.randn(1234, 50, generator=torch.Generator().manual_seed(0))
    theirs = reference(logits, splits=splits)
    assert inception_score(logits, splits) == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-9)


def test_inception_score_survives_certainty():
    assert inception_score(1e6 * torch.eye(5).repeat(20, 1), 1)[0] == pytest.approx(5)


@pytest.mark.parametrize(("call", "told"), (
    (lambda: quietly(torch.zeros(5, 3), torch.zeros(5, 4)), "real has shape (5, 3) and fake (5, 4); expected [N, D] and [M, D]"),
    (lambda: quietly(torch.zeros(5, 3), torch.zeros(5, 3) / 0), "fake (5, 3) has values that are NaN or infinite"),
    (lambda: quietly(moments(torch.randn(9, 3)), moments(torch.randn(9, 4))), "real has 3 features and fake 4; expected as many"),
    (lambda: moments(torch.zeros(1, 3)), "1 images: a covariance needs at least 2"),
    (lambda: moments([torch.zeros(0, 3), torch.zeros(0, 3)]), "0 images: a covariance needs at least 2"),
    (lambda: moments(torch.zeros(4, 3) / 0), "features (4, 3) have values that are NaN or infinite"),
    (lambda: quietly(Features(torch.zeros(5, 3), torch.zeros(5), "a"), Features(torch.zeros(5, 3), torch.zeros(5), "b")),
     "real features are from a (weights none) and fake ones from b (weights none): only features of one network can be compared"),
    (lambda: inception_score(torch.zeros(5, 3), 6), "logits have shape (5, 3) for 6 splits; expected [N, K], N ≥ splits"),
    (lambda: inception_score(torch.zeros(5, 3) / 0, 1), "logits (5, 3) have values that are NaN or infinite"),
    (lambda: inception_score(Features(torch.zeros(5, 3), torch.zeros(5), "pixels")), "features of pixels have no logits: the score needs a network that classifies"),
    (lambda: fid_curve(torch.randn(5, 3), torch.randn(5, 3), [6]), "n=6 of 5 images; expected 2 … 5"),
))
def test_mistakes_are_one_line_each(call, told):
    with pytest.raises(ValueError) as error: call()
    assert str(error.value) == told
