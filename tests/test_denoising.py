"""What a class does for a denoiser, without an oracle: squared errors, and the factor that helps most."""
import pytest
import torch

from dlsm.denoising import class_effect, denoising_errors, denoising_parabola, helpful_scale, squared_errors
from dlsm.losses import dlsm_loss
from dlsm.parzen import parzen_classifier, parzen_score

G = torch.Generator().manual_seed(0)
X, Y = torch.rand(30, 1, 3, 3, generator=G), torch.arange(30) % 3
NOISE, LABELS = torch.randn(8, 1, 3, 3, generator=G), torch.stack([Y[:8], (Y[:8] + 1) % 3])


def test_the_squared_error_of_the_denoiser_is_what_dlsm_minimises():
    "L_DLSM′, weighted by σ and summed over the pixels, is the squared error divided by 2σ²."
    sigma = 0.4
    score, judge = (lambda x, s: parzen_score(X)(x, s) + 0.3), parzen_classifier(X, Y, 3)
    found = denoising_errors(score, {"mine": judge}, X[:8], NOISE, LABELS, sigma, batch=3)
    assert found["none"].shape == (8,) and found["mine"].shape == (2, 8)
    for error, labels in zip(found["mine"], LABELS):
        loss = dlsm_loss(judge, score, X[:8], labels, torch.full((8,), sigma), NOISE, power=1, reduce="sum")
        torch.testing.assert_close(error / (2 * sigma**2), loss.detach().double(), rtol=1e-4, atol=1e-5)
    noisy = X[:8] + sigma * NOISE
    torch.testing.assert_close(found["none"], squared_errors(score(noisy, torch.full((8,), sigma)), X[:8], noisy, sigma), rtol=1e-6, atol=1e-8)
    assert squared_errors(-NOISE / sigma, X[:8], noisy, sigma).max() < 1e-10  # the score of the image itself
    with pytest.raises(ValueError, match=r"labels have shape \(8,\); expected \[L, 8\]"): denoising_errors(score, {}, X[:8], NOISE, LABELS[0], sigma)


def test_the_error_of_the_denoiser_is_a_parabola_in_the_factor(sigma=2.):
    "And its minimum is where the errors of a grid of factors are least."
    score, judge = (lambda x, s: parzen_score(X)(x, s) + 0.3), parzen_classifier(X, Y, 3)
    parabola = denoising_parabola(score, judge, X[:8], NOISE, LABELS[0], sigma, batch=3)
    found = denoising_errors(score, {"mine": judge}, X[:8], NOISE, LABELS, sigma)
    torch.testing.assert_close(parabola[0], found["none"])
    torch.testing.assert_close(parabola.sum(0), found["mine"][0], rtol=1e-5, atol=1e-8)
    grid = torch.linspace(0, 10, 100_001, dtype=torch.float64)
    least = grid[(parabola[1].sum() * grid + parabola[2].sum() * grid**2).argmin()].item()
    assert helpful_scale(parabola) == pytest.approx(least, abs=1e-4)
    harmful, endless, none = (torch.tensor([[1.], [slope], [curve]], dtype=torch.float64) for slope, curve in ((1., 1.), (-100., 1.), (0., 0.)))
    assert helpful_scale(harmful) == 0 and helpful_scale(endless) == 10 and helpful_scale(endless, 3.) == 3 and helpful_scale(none) == 1
    with pytest.raises(ValueError, match="not finite"): helpful_scale(none * float("nan"))


def test_the_effect_of_a_class_has_an_interval_over_images():
    none = torch.linspace(1., 2., 50, dtype=torch.float64)
    assert class_effect(0.7 * none, none) == pytest.approx((-0.3, -0.3, -0.3))  # the same share of every image
    value, low, high = class_effect(none + torch.tensor([1., -1.]).repeat(25), none)
    assert abs(value) < 1e-9 and low == pytest.approx(-high) and high == pytest.approx(2.01 / 1.5 / 7, rel=0.02)
