"""The moons networks and the losses give the numbers of the reference implementation (tests/data/parity_math.npz)."""
import numpy as np
import pytest
import torch

from dlsm.dsm import dsm_loss, perturb
from dlsm.losses import ce_loss, dlsm_loss, total_loss
from dlsm.networks import MLPClassifier, MLPScore
from dlsm.schedule import VESchedule


@pytest.fixture(scope="module")
def given(root):
    return {k: torch.from_numpy(v) for k, v in np.load(root/"tests/data/parity_math.npz").items()}


def fill(net, offset=0):
    "Fill the weights by rule: the i-th entry of the state dict is a_j = cos(0.37 j + i), scaled by its fan-in."
    state = {}
    for i, (key, old) in enumerate(net.state_dict().items()):
        a = torch.cos(0.37 * torch.arange(old.numel(), dtype=torch.float64) + i + offset).reshape(old.shape)
        gain = (2 / (old.numel() / len(old))) ** 0.5 if old.ndim >= 2 else 0.1
        state[key] = (gain * a + (key.endswith("weight") and old.ndim < 2)).float()
    net.load_state_dict(state)
    return net.requires_grad_(False)


def close(got, expected, tolerance=1e-5):
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, f"relative difference {error:.1e}"


@pytest.fixture(scope="module")
def toy(given):
    return fill(MLPScore()), fill(MLPClassifier(), 5), [given[f"toy_{k}"] for k in ("x", "y", "sigma", "z")]


def test_moons_networks(given, toy):
    score, classifier, (x, _, sigma, noise) = toy
    x_noisy = perturb(x, sigma, noise)
    close(score(x_noisy, sigma), given["toy_score"])
    close(classifier(x_noisy, sigma), given["toy_logits"])


def test_moons_dsm(given, toy):
    score, _, (x, _, sigma, noise) = toy
    close(2 * dsm_loss(score, x, sigma, noise, power=2).mean(), given["toy_dsm_w2"])  # the released moons code has no ½


@pytest.mark.parametrize("power", [0, 1, 2])
def test_moons_stage_2(given, toy, power):
    score, classifier, (x, y, sigma, noise) = toy
    close(ce_loss(classifier, perturb(x, sigma, noise), sigma, y).mean(), given[f"toy_ce_w{power}"])
    close(dlsm_loss(classifier, score, x, y, sigma, noise, power).mean(), given[f"toy_dlsm_w{power}"])
    close(total_loss(classifier, score, x, y, sigma, noise, 0.125, power).mean(), given[f"toy_total_w{power}"])


@pytest.fixture(scope="module")
def cifar(given):
    def score(x, sigma): return -(x - 0.5) / (sigma**2 + 0.0625)[:, None, None, None]
    def classifier(x, sigma): return x.flatten(1) @ given["pc_clf_w"].T / (1 + sigma)[:, None]
    return score, classifier, [given[f"cifar_{k}"] for k in ("x", "y", "z")]


@pytest.mark.parametrize("power", [0, 1])
def test_cifar_stage_2(given, cifar, power):
    score, classifier, (x, y, noise) = cifar
    sigma = VESchedule(0.01, 50.).at(given["cifar_u"] * (1 - 1e-5) + 1e-5)
    close(ce_loss(classifier, perturb(x, sigma, noise), sigma, y).mean(), given[f"cifar_ce_w{power}"])
    close(dlsm_loss(classifier, score, x, y, sigma, noise, power).mean(), given[f"cifar_dlsm_w{power}"])
    close(total_loss(classifier, score, x, y, sigma, noise, 1., power).mean(), given[f"cifar_total_w{power}"])


def test_cifar_stage_1(given, cifar):
    score, _, (x, _, noise) = cifar
    sigma = VESchedule(0.01, 50.).at(given["cifar_u"] * (1 - 1e-3) + 1e-3)
    close(dsm_loss(score, x, sigma, noise, reduce="sum").mean(), given["cifar_dsm"])
