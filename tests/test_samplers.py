"""The samplers: the reference implementation's numbers, a Gaussian kept, exact solutions, what guidance costs, and each image's own noise."""
import math

import numpy as np
import pytest
import torch
from scipy import stats

from dlsm.guidance import posterior_score
from dlsm.networks import MLPClassifier, MLPScore, seeded
from dlsm.noise import image_noise
from dlsm.samplers import gaussian_noise, guide_between, heun_sample, in_bf16, karras_levels, langevin, multistep_sample, pc_sample
from dlsm.schedule import VESchedule, expand

SAMPLERS = {"pc": lambda score, x, sigmas: pc_sample(score, x, sigmas, per_image=True), "heun": heun_sample, "2m": multistep_sample}


def gaussian(mean, std): return lambda x, sigma: (mean - x) / (std**2 + expand(sigma, x) ** 2)


@pytest.fixture(scope="module")
def given(root): return {k: torch.from_numpy(v) for k, v in np.load(root/"tests/data/parity_math.npz").items()}


def recorded(noise):
    "A source that gives the stored noise in turn."
    left = iter(noise)
    return lambda x: next(left).to(x)


@pytest.mark.parametrize("name, scale, denoise", [("uncond", None, True), ("guided_1", 1., True), ("guided_10", 10., True), ("guided_1_noisy", 1., False)])
@pytest.mark.parametrize("exact", [False, True])
def test_pc_gives_the_reference_numbers(given, name, scale, denoise, exact):
    "With one ladder to 1e-3; to 1e-5 when the networks are asked at σ(t) and the variances come from the ladder."
    def score(x, sigma): return -(x - 0.5) / (sigma**2 + 0.0625)[:, None, None, None]
    def classifier(x, sigma): return x.flatten(1) @ given["pc_clf_w"].T / (1 + sigma)[:, None]
    schedule, noise = VESchedule(0.01, 50.), given["pc_noise"]
    levels = schedule.at(torch.linspace(1, 1e-5, 8, dtype=torch.float64)) if exact else None
    guided = score if scale is None else posterior_score(score, classifier, given["pc_cond"].long(), scale)
    x = pc_sample(guided, 50 * noise[0], schedule.levels(8), 0.16, recorded(noise[1:]), denoise=denoise, levels=levels)
    error = ((x - given[f"pc_{name}"]).norm() / given[f"pc_{name}"].norm()).item()
    assert error < (1e-5 if exact else 1e-3), error


def swapped(score, x, sigmas, snr=0.16):
    "The walk with the mistake of the released toy sampler: the corrector's drift has the noise's coefficient, and the other way round."
    noise = image_noise(0, torch.arange(len(x)))
    for here, below in zip(sigmas.tolist(), [*sigmas.tolist()[1:], 0.]):
        level, z = x.new_full(x.shape[:1], here), noise(x)
        grad = score(x, level)
        eps = 2 * (snr * z.flatten(1).norm(dim=1).mean() / grad.flatten(1).norm(dim=1).mean()) ** 2
        x = x + (2 * eps).sqrt() * grad + eps * z
        x = x + (here**2 - below**2) * score(x, level)
        if below > 0: x = x + (here**2 - below**2) ** 0.5 * noise(x)
    return x


def test_a_gaussian_keeps_its_mean_and_variance():
    "Within 4% and 0.05, in 16 dimensions. The swapped coefficients fail the same check by far."
    generator = torch.Generator().manual_seed(0)
    start = 3 + (4 + 50**2) ** 0.5 * torch.randn(4_000, 16, generator=generator)
    sigmas = VESchedule(0.01, 50.).levels(300)
    def kept(x): return abs(x.mean().item() - 3) < 0.05 and abs(x.var().item() / 4 - 1) < 0.04
    assert kept(pc_sample(gaussian(3., 2.), start, sigmas))
    assert not kept(swapped(gaussian(3., 2.), start, sigmas))
    for sample in (heun_sample, multistep_sample): assert kept(sample(gaussian(3., 2.), start, karras_levels(0.01, 50., 40)))


@pytest.mark.parametrize("sample", [heun_sample, multistep_sample])
def test_second_order_against_the_exact_flow(sample):
    start = 3 + (4 + 50**2) ** 0.5 * torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = 3 + (start - 3) * ((4 + 0.1**2) / (4 + 50**2)) ** 0.5
    errors = [(sample(gaussian(3., 2.), start, karras_levels(0.1, 50., n + 1)[:-1], final=0.1) - exact).square().mean().sqrt().item() for n in (40, 80, 160)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(order - 2) < 0.1 for order in orders), orders


@pytest.mark.parametrize("sample", [heun_sample, multistep_sample])
def test_second_order_with_guidance_against_the_exact_flow(sample):
    "Two Gaussians of different mean: with α = 1 prior plus likelihood score is the score of one of them, whose flow is known."
    means = torch.tensor([-2., 3.], dtype=torch.float64)
    def classifier(x, sigma): return -0.5 * (x[:, None] - means[:, None]).square().sum(2) / (1 + sigma[:, None] ** 2)
    def score(x, sigma):
        share = classifier(x, sigma).softmax(1)
        return sum(share[:, k, None] * gaussian(means[k], 1.)(x, sigma) for k in (0, 1))
    start = 3 + (1 + 20**2) ** 0.5 * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = 3 + (start - 3) * ((1 + 0.1**2) / (1 + 20**2)) ** 0.5
    guided = posterior_score(score, classifier, 1)
    errors = [(sample(guided, start, karras_levels(0.1, 20., n + 1)[:-1], final=0.1) - exact).square().mean().sqrt().item() for n in (40, 80, 160)]
    assert all(abs(math.log2(a / b) - 2) < 0.1 for a, b in zip(errors, errors[1:])), errors


def test_guidance_costs_one_evaluation_each():
    "Of the classifier a forward and a backward pass; of the score a forward pass without a graph."
    net, calls = seeded(MLPScore, 0), {"score": 0, "classifier": 0, "backward": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(x): return x.clone()
        @staticmethod
        def setup_context(ctx, inputs, output): pass
        @staticmethod
        def backward(ctx, grad):
            calls["backward"] += 1
            return grad

    def score(x, sigma):
        calls["score"] += 1
        assert not torch.is_grad_enabled() and not x.requires_grad
        return net(x, sigma)

    def classifier(x, sigma):
        calls["classifier"] += 1
        return Count.apply(x)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    for sample, n in ((heun_sample, 2 * 9 - 1), (multistep_sample, 9), (pc_sample, 18)):
        calls.update(dict.fromkeys(calls, 0))
        end = sample(posterior_score(score, classifier, torch.arange(6) % 2, torch.linspace(0, 10, 6)), x, karras_levels(0.1, 10., 9))
        assert calls == dict.fromkeys(calls, n) and not end.requires_grad


def test_labels_and_scale_belong_to_the_image():
    net, classifier = seeded(MLPScore, 0), seeded(MLPClassifier, 1)
    x, y, scale = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2, torch.linspace(0, 10, 8)
    together = heun_sample(posterior_score(net, classifier, y, scale), x, karras_levels(0.1, 10., 9))
    for i in range(8):
        alone = heun_sample(posterior_score(net, classifier, int(y[i]), scale[i].item()), x[i:i + 1], karras_levels(0.1, 10., 9))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_models_in_bfloat16_and_the_state_in_float32(name):
    seen = []
    def score(x, sigma):
        seen.append(x.dtype)
        return gaussian(3., 2.)(x, sigma).bfloat16()
    x = 50 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    ends = [SAMPLERS[name](s, start, karras_levels(0.1, 50., 30)) for s, start in ((score, x.bfloat16()), (score, x), (gaussian(3., 2.), x))]
    assert {*seen} == {torch.float32} and all(end.dtype == torch.float32 for end in ends)
    assert (ends[1] - ends[2]).abs().max() < 0.2
    assert SAMPLERS[name](gaussian(3., 2.), x.double(), karras_levels(0.1, 50., 30)).dtype == torch.float64
    half = in_bf16(torch.nn.Bilinear(16, 1, 16))
    assert half(x, x[:, :1]).dtype == torch.float32


def test_guidance_within_an_interval():
    asked = []
    def guided(x, sigma):
        asked.append(sigma[0].item())
        return gaussian(5., 1.)(x, sigma)
    sigmas = karras_levels(0.01, 50., 18)
    multistep_sample(guide_between(gaussian(0., 1.), guided, 0.3, 10.), torch.zeros(4, 2, dtype=torch.float64), sigmas)
    assert asked == [s for s in sigmas.tolist() if 0.3 <= s <= 10.]


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_in_any_batch(name):
    "Its number decides its noise; to 1e-4 in float32."
    def score(x, sigma): return -(x - 0.5 - 0.3 * x.cos()) / (expand(sigma, x) ** 2 + 0.1)
    def sample(index):
        noise = image_noise(3, index)
        start = 20 * noise(torch.empty(len(index), 3, 4, 4))
        if name != "pc": return SAMPLERS[name](score, start, karras_levels(0.02, 20., 20))
        return pc_sample(score, start, VESchedule(0.02, 20.).levels(60), noise=noise, per_image=True)
    whole = sample(torch.arange(50))
    for part in (torch.tensor([7]), torch.tensor([49, 3, 8]), torch.arange(20, 45)): torch.testing.assert_close(sample(part), whole[part], rtol=1e-4, atol=1e-4)


def test_noise_is_gaussian_and_independent():
    "Over images, draws, seeds and places; all within four standard errors, Kolmogorov–Smirnov p > 0.001."
    noise = image_noise(11, torch.arange(600))
    z = noise(torch.zeros(600, 501, dtype=torch.float64))
    flat, n = z.flatten().numpy(), z.numel()
    for value, exact, variance in ((flat.mean(), 0, 1), (flat.var(), 1, 2), (stats.skew(flat), 0, 6), (stats.kurtosis(flat), 0, 24)):
        assert abs(value - exact) < 4 * (variance / n) ** 0.5
    assert stats.kstest(flat, "norm").pvalue > 0.001
    next_draw, next_seed = noise(z), image_noise(12, torch.arange(600))(z)
    for a, b in ((z[:-1], z[1:]), (z, next_draw), (z, next_seed), (z[:, :-1], z[:, 1:]), (z[:, :250], z[:, 251:])):
        assert abs((a * b).sum() / (a * a).sum() * a.numel() ** 0.5) < 4
        assert abs(((a**2 - 1) * (b**2 - 1)).sum() / ((a**2 - 1) ** 2).sum() * a.numel() ** 0.5) < 4
    assert len({*z.flatten().tolist()}) > 0.999 * n and math.isfinite(abs(flat).max())


def test_pc_draws_each_images_noise_by_default():
    x = 50 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    sigmas = VESchedule(0.1, 50.).levels(20)
    given = pc_sample(gaussian(0., 1.), x, sigmas, noise=image_noise(0, torch.arange(5)))
    assert torch.equal(pc_sample(gaussian(0., 1.), x, sigmas), given)


@pytest.mark.parametrize("sample, message", [
    (lambda s, x, l: heun_sample(s, x, l.flip(0)), "must decrease strictly"),
    (lambda s, x, l: multistep_sample(s, x, torch.ones(3)), "must decrease strictly"),
    (lambda s, x, l: pc_sample(s, x, l, final=1.), "must decrease strictly"),
    (lambda s, x, l: pc_sample(s, x, torch.tensor([1., math.nan])), "must decrease strictly"),
    (lambda s, x, l: pc_sample(s, x, l, snr=-1.), "expected a signal-to-noise ratio > 0"),
    (lambda s, x, l: heun_sample(posterior_score(s, lambda x, sigma: x, torch.tensor([0, 1, 2])), x, l), "labels outside 0…1"),
    (lambda s, x, l: heun_sample(posterior_score(s, lambda x, sigma: x, torch.zeros(3)), x, l), "expected integer labels"),
    (lambda s, x, l: heun_sample(posterior_score(s, lambda x, sigma: x, 1, torch.ones(2)), x, l), "scale has shape (2,)"),
    (lambda s, x, l: heun_sample(lambda x, sigma: x[:, :1], x, l), "score gave shape (3, 1)"),
    (lambda s, x, l: karras_levels(1., 0.1, 9), "expected 0 < sigma_min < sigma_max"),
    *((lambda s, x, l, rho=rho: karras_levels(0.1, 1., 9, rho), f"rho={rho}; expected an exponent > 0") for rho in (0., -7., math.nan, math.inf)),
    (lambda s, x, l: image_noise(2**63, torch.arange(3)), "seed=9223372036854775808; expected a number of 64 bits"),
    (lambda s, x, l: guide_between(s, s, 3., 2.), "expected an interval"),
    (lambda s, x, l: image_noise(0, torch.arange(2))(x), "expected one item for each of 2 images"),
])
def test_bad_input_is_one_line(sample, message):
    with pytest.raises(ValueError) as e: sample(gaussian(0., 1.), torch.zeros(3, 2), karras_levels(0.1, 1., 5))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_langevin_keeps_no_graph():
    "A network that is trained further on, or was never frozen: 200 steps would keep every activation."
    net = torch.nn.Linear(2, 2)
    x = langevin(lambda x, sigma: net(x), torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), 1., 5, 0.1, gaussian_noise(torch.Generator().manual_seed(1)))
    assert not x.requires_grad and all(p.requires_grad for p in net.parameters())


def walks(score, x, noise=None):
    "All samplers from one start."
    noise, levels = noise or gaussian_noise(torch.Generator().manual_seed(0)), karras_levels(0.1, 10., 9)
    yield lambda: langevin(score, x, 1., 3, 0.1, noise)
    yield lambda: pc_sample(score, x, levels, noise=noise)
    yield lambda: heun_sample(score, x, levels)
    yield lambda: multistep_sample(score, x, levels)


def test_a_walk_that_ends_nowhere_is_an_error():
    x = torch.ones(4, 2)
    for walk in walks(lambda x, s: torch.where(torch.arange(4)[:, None] == 1, math.nan, -x / 100), x):
        with pytest.raises(FloatingPointError, match="[14] of 4 items are not finite after the walk"): walk()


@pytest.mark.parametrize("shape", [(0, 2), (0, 3, 4, 4)])
def test_an_empty_batch_stays_empty(shape):
    x = torch.empty(shape)
    for walk in (*walks(lambda x, s: -x, x), lambda: pc_sample(lambda x, s: -x, x, karras_levels(0.1, 10., 9))): assert walk().shape == shape


def test_shapes_that_would_broadcast_are_refused():
    x = torch.ones(4, 2)
    for walk in walks(lambda x, s: -x[:, :1], x):
        with pytest.raises(ValueError, match=r"score gave shape \(4, 1\)"): walk()
    for walk in list(walks(lambda x, s: -x, x, noise=lambda x: torch.randn(len(x), 1)))[:2]:
        with pytest.raises(ValueError, match=r"noise gave shape \(4, 1\); expected that of x: \(4, 2\)"): walk()


def test_the_start_keeps_its_graph_to_itself():
    x = torch.ones(4, 2, requires_grad=True)
    for walk in walks(lambda x, s: -x / 200, x): assert not walk().requires_grad
