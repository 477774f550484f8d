"""The networks for images: published names and outputs, double backward, sizes, mixed precision, preconditioning."""

import pytest
import torch
from parity import PARITY, bar_in_float32, case, fill, published_names, relative_error
from torch import nn

from dlsm.dsm import dsm_loss
from dlsm.float32 import full_float32
from dlsm.guidance import likelihood_score
from dlsm.ncsnpp import NCSNpp, PyramidDown, Resample
from dlsm.networks import MLPClassifier, MLPScore
from dlsm.precond import EDMPrecond, PrecondClassifier, edm_coefficients
from dlsm.resnet import BatchNorm, SigmaResNet
from dlsm.schedule import expand

# ---- the published networks

@pytest.mark.parametrize("name", PARITY)
def test_published_names_shapes_and_outputs(name):
    net, (x, sigma, out) = PARITY[name][0](), case(name)
    assert [(k, tuple(v.shape)) for k, v in net.state_dict().items()] == list(published_names(name).items())
    with torch.no_grad():
        assert relative_error(fill(net)(x, sigma), out) < bar_in_float32(name)
        assert relative_error(net.double()(x.double(), sigma.double()), out) < PARITY[name][-1]


def test_parameter_counts():
    score, classifier = NCSNpp(), SigmaResNet()
    assert sum(p.numel() for p in score.parameters()) == 107_587_075
    assert sum(p.numel() for p in score.parameters() if p.requires_grad) == 107_587_075 - 128  # the frequencies are not trained
    assert sum(p.numel() for p in classifier.parameters()) == 11_322_666


def test_sigmas_are_the_published_levels():
    sigmas = NCSNpp(nf=4, num_res_blocks=1).sigmas
    assert sigmas.dtype == torch.float32 and len(sigmas) == 1000 and sigmas.diff().max() < 0
    assert torch.allclose(sigmas[[0, -1]], torch.tensor([50., 0.01]))


# ---- resampling

@pytest.mark.parametrize("mode", ["up", "down"])
def test_resample_is_the_filter_and_a_grid(mode):
    "Against zero insertion, padding and a direct sum over the 16 taps."
    x, taps = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1., 3., 3., 1.], dtype=torch.float64)/8
    if mode == "up":
        fine = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
        fine[..., ::2, ::2] = 4*x
        padded, n, step = nn.functional.pad(fine, (2, 1, 2, 1)), 16, 1
    else: padded, n, step = nn.functional.pad(x, (1, 1, 1, 1)), 4, 2
    at = [slice(i, i + step*(n - 1) + 1, step) for i in range(4)]
    expected = sum(taps[i]*taps[j]*padded[..., at[i], at[j]] for i in range(4) for j in range(4))
    resample = Resample(mode).double()
    for way in (resample, resample.convolved, resample.shifted): assert torch.allclose(way(x), expected, atol=1e-7)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_shifted_pixels_filter_as_convolutions_do(size):
    "On a GPU maps are resampled by sums of shifted pixels: values, gradients and autocast's precision are those of the convolutions."
    x = torch.randn(2, 3, size, size + 4, dtype=torch.float64, requires_grad=True)
    for module in (Resample("up"), Resample("down"), PyramidDown(3, 4)):
        one, other = (way(x) for way in (module.double().convolved, module.shifted))
        weight = torch.randn_like(one)
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        assert module.shifted(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(*(torch.autograd.grad(out, x, weight)[0] for out in (other, one)), rtol=1e-12, atol=1e-12)
        with torch.autocast("cpu", torch.bfloat16):
            one, other = (way(x.float()) for way in (module.float().convolved, module.shifted))
            assert one.dtype == other.dtype == torch.bfloat16
            torch.testing.assert_close(other, one, rtol=0.05, atol=0.05)


# ---- sizes and refusals

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_sizes(size, channels):
    x, sigma = torch.rand(2, channels, size, size), torch.tensor([0.02, 20.])
    score = NCSNpp(channels, size, nf=8, ch_mult=(1, 2, 2, 2), num_res_blocks=1)
    assert score(x, sigma).shape == x.shape and score(x, sigma).isfinite().all()
    for norm in ("batch", "group"): assert SigmaResNet(18, 7, channels, norm, width=8)(x, sigma).shape == (2, 7)


@pytest.mark.parametrize("nf, ch_mult, blocks", [(6, (1,), 2), (36, (1, 5), 1), (16, (2, 1, 3), 2)])
def test_any_width_and_depth(nf, ch_mult, blocks):
    net, x = NCSNpp(1, 8, nf, ch_mult, blocks, attn_resolutions=(8, 4)), torch.rand(2, 1, 8, 8)
    assert net(x, torch.ones(2)).shape == x.shape


@pytest.mark.parametrize("build, words", [
    (lambda: NCSNpp(image_size=28), "image_size=28"),
    (lambda: NCSNpp(image_size=0, ch_mult=(1,)), "image_size=0"),
    (lambda: NCSNpp(ch_mult=()), "ch_mult"),
    (lambda: NCSNpp(nf=0), "nf=0"),
    (lambda: NCSNpp(dropout=1.5), "[Dd]ropout"),
    (lambda: Resample("left"), "'up' or 'down'"),
    (lambda: SigmaResNet(50), "depth=50"),
    (lambda: SigmaResNet(norm="layer"), "norm='layer'"),
    (lambda: SigmaResNet(n_classes=0), "n_classes=0"),
    (lambda: EDMPrecond(nn.Identity(), 0.), "sigma_data=0"),
    (lambda: PrecondClassifier(nn.Identity(), -1.), "sigma_data=-1"),
])
def test_refused_at_construction(build, words):
    with pytest.raises(ValueError, match=words) as error: build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape, n, words", [
    ((2, 1, 8, 8), 2, r"\(2, 1, 8, 8\)"), ((2, 3, 4, 4), 2, r"\(2, 3, 4, 4\)"), ((3, 8, 8), 3, r"\(3, 8, 8\)"), ((2, 3, 8, 8), 3, "sigma"),
])
def test_refused_inputs(shape, n, words):
    for net in (NCSNpp(3, 8, 4, (1,), 1), SigmaResNet(18, 3, 3, width=4)):
        with pytest.raises(ValueError, match=words): net(torch.rand(shape), torch.ones(n))


# ---- derivatives

def dlsm_like(net, x, sigma, y, target, form):
    "Half the mean squared difference of the likelihood score and a target."
    log_p = lambda x: net(x, sigma).log_softmax(1).gather(1, y[:, None]).sum()
    if form == "func": score = torch.func.grad(log_p)(x)
    else:
        x = x.clone().requires_grad_()
        score, = torch.autograd.grad(log_p(x), x, create_graph=True)
    return 0.5*(score + target).square().mean()


@pytest.mark.parametrize("form", ["func", "autograd"])
@pytest.mark.parametrize("norm, training", [("batch", True), ("batch", False), ("group", True)])
def test_double_backward_against_differences(norm, training, form):
    torch.manual_seed(0)
    x, target = torch.rand(2, 6, 1, 8, 8, dtype=torch.float64).unbind()
    sigma, y = torch.logspace(-1, 0.5, 6, dtype=torch.float64), torch.arange(6) % 3
    net = PrecondClassifier(SigmaResNet(18, 3, 1, norm, width=4, fourier_scale=1.), 0.3).double().train(training)
    weights = {k: p for k, p in net.named_parameters() if p.requires_grad}
    gradient = dict(zip(weights, torch.autograd.grad(dlsm_like(net, x, sigma, y, target, form), weights.values())))
    for part in ("conv1", "bn2", "dense_", "condition_modules", "linear.weight"):  # each kind of weight by itself
        direction = {k: torch.randn_like(p) for k, p in weights.items() if part in k}
        exact, ends = sum((gradient[k]*d).sum() for k, d in direction.items()).item(), []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for k, d in direction.items(): weights[k] += sign*1e-6*d
            ends.append(dlsm_like(net, x, sigma, y, target, form).item())
        assert abs((ends[0] - ends[1])/2e-6 - exact) < 1e-4*abs(exact) + 1e-8, part


def test_both_forms_give_the_same_gradients():
    torch.manual_seed(0)
    x, target = torch.rand(2, 6, 1, 8, 8, dtype=torch.float64).unbind()
    sigma, y = torch.ones(6, dtype=torch.float64), torch.arange(6) % 3
    net = SigmaResNet(18, 3, 1, width=4).double()
    gradients = []
    for form in ("func", "autograd"):
        net.zero_grad()
        dlsm_like(net, x, sigma, y, target, form).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert relative_error(gradients[0][None], gradients[1][None]) < 1e-10


def test_running_statistics_move_once_a_forward_pass():
    "As those of nn.BatchNorm2d, inside torch.func.grad as outside, and not in eval mode."
    torch.manual_seed(0)
    x, y, sigma = torch.rand(6, 3, 8, 8), torch.arange(6) % 3, torch.ones(6)
    states = []
    for form in ("plain", "func", "eval"):
        torch.manual_seed(1)
        net = SigmaResNet(18, 3, width=4)
        if form == "plain":
            for module in net.modules():
                if isinstance(module, BatchNorm): module.__class__ = nn.BatchNorm2d
            net(x, sigma)
        elif form == "func": likelihood_score(net, x, sigma, y)
        else: likelihood_score(net.eval(), x, sigma, y)
        states.append({k: v.clone() for k, v in net.state_dict().items() if "running" in k or "tracked" in k})
    plain, func, kept = states
    for k in plain:
        assert torch.allclose(plain[k].double(), func[k].double(), rtol=1e-6), k
        if k.endswith("num_batches_tracked"): assert func[k] == 1 and kept[k] == 0


def test_group_norm_keeps_images_apart():
    torch.manual_seed(0)
    x, sigma, y = torch.rand(6, 1, 8, 8), torch.ones(6), torch.arange(6) % 3
    net = SigmaResNet(18, 3, 1, "group", width=8)
    together = likelihood_score(net, x, sigma, y)
    alone = torch.cat([likelihood_score(net, x[i:i + 1], sigma[i:i + 1], y[i:i + 1]) for i in range(6)])
    assert relative_error(together, alone) < 1e-4


def test_score_net_is_differentiable_in_image_and_weights():
    net, x = fill(NCSNpp(1, 8, 8, (1, 2), 1, attn_resolutions=(8,))).double(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.1, 2.], dtype=torch.float64)
    value = lambda x: net(x, sigma).square().sum()
    gradient, direction = torch.func.grad(value)(x), torch.randn_like(x)
    with torch.no_grad(): measured = (value(x + 1e-6*direction) - value(x - 1e-6*direction))/2e-6
    assert abs((gradient*direction).sum() - measured) < 1e-5*abs(measured)
    value(x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


# ---- precision, memory format, compilation

def test_bf16_autocast_and_channels_last():
    x, sigma = torch.rand(2, 3, 16, 16), torch.tensor([0.02, 20.])
    for net in (fill(NCSNpp(3, 16, 16, (1, 2), 1)), SigmaResNet(18, 10, width=16).eval()):
        with torch.no_grad():
            plain = net(x, sigma)
            last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), sigma)
            with torch.autocast("cpu", torch.bfloat16): half = net(x, sigma)
        assert relative_error(last, plain) < 1e-4
        assert half.isfinite().all() and relative_error(half.float(), plain) < 0.1


def test_bf16_autocast_trains():
    x, noise = torch.rand(2, 4, 1, 8, 8).unbind()
    sigma = torch.logspace(-2, 1.7, 4)
    net = EDMPrecond(NCSNpp(1, 8, 8, (1, 2), 1, raw=True), 0.4)
    with torch.autocast("cpu", torch.bfloat16): loss = dsm_loss(net, x, sigma, noise)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    classifier = PrecondClassifier(SigmaResNet(18, 3, 1, "group", width=8), 0.4)
    with torch.autocast("cpu", torch.bfloat16): score = likelihood_score(classifier, x, sigma, torch.arange(4) % 3, create_graph=True)
    score.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in classifier.parameters() if p.grad is not None)


# ---- preconditioning

class Const(nn.Module):
    "A network that returns a fixed number and remembers what it was given."
    def __init__(self, value): super().__init__(); self.value = value
    def forward(self, x, sigma):
        self.x, self.sigma = x, sigma
        return torch.full_like(x, self.value)


def test_denoiser_limits():
    "σ → 0: the image itself; σ → ∞: mean + σ_d F, whatever the image; and in between the definition."
    x, sigma_data, net = torch.rand(3, 1, 8, 8, dtype=torch.float64), 0.3, Const(0.7)
    model = EDMPrecond(net, sigma_data)
    level = lambda s: torch.full((3,), s, dtype=torch.float64)
    assert torch.allclose(model.denoise(x, level(1e-8)), x, atol=1e-7)
    assert torch.allclose(model.denoise(x, level(1e8)), torch.full_like(x, 0.5 + 0.7*sigma_data), atol=1e-6)
    c_skip, c_out, c_in = edm_coefficients(torch.tensor(0.2, dtype=torch.float64), sigma_data)
    assert torch.allclose(model.denoise(x, level(0.2)), 0.5 + c_skip*(x - 0.5) + c_out*0.7)
    assert torch.allclose(net.x, c_in*(x - 0.5)) and torch.allclose(net.sigma, level(0.2**0.25))


def test_score_keeps_its_digits_at_small_sigma():
    x, sigma = torch.rand(3, 1, 8, 8), torch.tensor([1e-3, 1e-2, 1.])
    model = EDMPrecond(Const(0.3), 0.4)
    assert relative_error(model(x, sigma).double(), model(x.double(), sigma.double())) < 1e-6


def test_input_and_target_have_unit_variance():
    generator = torch.Generator().manual_seed(0)
    mean, sigma_data = 0.3, 0.2
    x = mean + sigma_data*torch.randn(200_000, generator=generator, dtype=torch.float64).sign()  # far from Gaussian
    for s in (1e-3, 0.05, 0.2, 1., 50.):
        c_skip, c_out, c_in = edm_coefficients(torch.tensor(s, dtype=torch.float64), sigma_data)
        u = x + s*torch.randn(x.shape, generator=generator, dtype=torch.float64) - mean
        assert abs((c_in*u).std() - 1) < 0.01 and abs(((x - mean - c_skip*u)/c_out).std() - 1) < 0.01


def test_gaussian_data_needs_no_network():
    x, sigma = torch.randn(5, 2, dtype=torch.float64), torch.logspace(-2, 2, 5, dtype=torch.float64)
    score = EDMPrecond(Const(0.), 2., mean=1.)(x, sigma)
    assert torch.allclose(score, -(x - 1)/(expand(sigma, x)**2 + 4), rtol=1e-12)


def test_raw_leaves_out_the_two_scalings_and_nothing_else():
    x, sigma = torch.rand(2, 1, 8, 8), torch.tensor([0.1, 5.])
    torch.manual_seed(0); net = fill(NCSNpp(1, 8, 8, (1, 2), 1))
    torch.manual_seed(0); raw = fill(NCSNpp(1, 8, 8, (1, 2), 1, raw=True))
    assert list(net.state_dict()) == list(raw.state_dict())
    with torch.no_grad(): assert relative_error(raw(2*x - 1, sigma)/expand(sigma, x), net(x, sigma)) < 1e-6


def test_classifier_sees_a_unit_input():
    seen = Const(0.)
    PrecondClassifier(seen, 0.3)(torch.full((2, 1, 8, 8), 0.8), torch.tensor([0.4, 0.4]))
    assert torch.allclose(seen.x, torch.tensor(0.3/0.5)) and torch.allclose(seen.sigma, torch.tensor(0.4**0.25))


# ---- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("name", PARITY)
def test_published_outputs_on_a_gpu(name):
    "In float64 to the bar; in float32, whose rounding depends on the card's kernels, to four times that."
    net, (x, sigma, out) = fill(PARITY[name][0]()).cuda(), case(name)
    with torch.no_grad(), full_float32(): found = net(x.cuda(), sigma.cuda()).cpu()
    assert relative_error(found, out) < 4 * PARITY[name][-1]
    with torch.no_grad(): exact = net.double()(x.double().cuda(), sigma.double().cuda()).cpu()
    assert relative_error(exact, out) < PARITY[name][-1]


@pytest.mark.gpu
def test_compiled_nets_give_the_same_on_a_gpu():
    torch.manual_seed(0)
    x, sigma, y = torch.rand(4, 3, 32, 32, device="cuda"), torch.logspace(-1, 1, 4, device="cuda"), torch.arange(4, device="cuda")
    score = fill(NCSNpp(nf=32, num_res_blocks=1)).cuda()
    with torch.no_grad(): assert relative_error(torch.compile(score)(x, sigma), score(x, sigma)) < 1e-2
    net = SigmaResNet(18, 10, width=16).cuda()
    loss = lambda x: likelihood_score(net, x, sigma, y, create_graph=True).square().sum()
    torch.testing.assert_close(torch.compile(loss)(x), loss(x), rtol=1e-2, atol=1e-3)


# ---- levels of another number type

@pytest.mark.parametrize("build, shape", [
    (MLPScore, (2,)), (MLPClassifier, (2,)), (lambda: SigmaResNet(18, 10, width=8), (3, 8, 8)),
    (lambda: NCSNpp(nf=8, ch_mult=(1, 2), num_res_blocks=1, image_size=8), (3, 8, 8)),
    (lambda: EDMPrecond(MLPScore(), 0.5, 0.), (2,)), (lambda: PrecondClassifier(SigmaResNet(18, 10, width=8), 0.5, 0.5), (3, 8, 8))])
def test_levels_in_float64_and_whole_numbers_meet_float32(build, shape):
    "numpy and torch.linspace(…, dtype=torch.float64) give such levels; the answer is that of float32, in float32."
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(3, *shape)
    for sigma in (torch.tensor([0.25, 1., 3.], dtype=torch.float64), torch.tensor([1, 2, 3])):
        with torch.no_grad(): found, expected = net(x, sigma), net(x, sigma.float())
        assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(): half = net.to(torch.bfloat16)(x.to(torch.bfloat16), torch.tensor([0.25, 1., 3.], dtype=torch.bfloat16))
    assert half.isfinite().all()  # a network that was cast as a whole still takes its own type
