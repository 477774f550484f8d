"""Full float32: where gradients of a classifier are trained, measured or followed, TF32 is kept out, and the settings come back."""
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dlsm.float32 import full_float32
from dlsm.guidance import likelihood_score, posterior_score
from dlsm.mismatch import image_oracle, mismatch
from dlsm.samplers import in_bf16
from dlsm.training import fit

CONV = torch.backends.cudnn.conv


SEEN = []  # whether convolutions may use TF32, in each forward and backward pass


def may_round(): return CONV.fp32_precision == "tf32"


class Note(torch.autograd.Function):
    "Give what it gets, and write down the settings on the way, forwards and backwards."
    @staticmethod
    def forward(x):
        SEEN.append(may_round())
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output): pass

    @staticmethod
    def backward(ctx, g):
        SEEN.append(may_round())
        return g


class Watched(nn.Module):
    "A classifier."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, sigma): return Note.apply(self.layer(x))


@pytest.fixture(autouse=True)
def fresh(): SEEN.clear()


def settings():
    "All that says how float32 is multiplied."
    layers = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, CONV, torch.backends.cudnn.rnn, torch.backends.mkldnn.conv
    return [layer.fp32_precision for layer in layers]


X, SIGMA, Y = torch.ones(4, 2), torch.ones(4), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("convolutions", [True, False])
def test_settings_come_back(convolutions):
    before = settings()
    with pytest.raises(KeyError), full_float32(convolutions):
        assert may_round() is not convolutions and torch.get_float32_matmul_precision() == "highest"
        raise KeyError
    assert settings() == before and may_round()


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("change", ["older", "newer"])
def test_settings_of_either_interface_come_back(convolutions, change):
    matmul, kept = torch.backends.cuda.matmul, settings()
    try:
        if change == "older": matmul.allow_tf32 = True
        else: matmul.fp32_precision = CONV.fp32_precision = "tf32"
        before = settings()
        with full_float32(convolutions): assert matmul.fp32_precision == "ieee" and may_round() is not convolutions
        assert settings() == before and matmul.fp32_precision == "tf32"
    finally:
        matmul.allow_tf32 = False
        for layer, value in zip((matmul, torch.backends.mkldnn.matmul), kept): layer.fp32_precision = value


def test_flags_of_cudnn_can_be_set_inside():
    "A classifier may switch cuDNN off in its forward pass (which by PyTorch's default brings TF32 back, for that block)."
    with full_float32():
        with torch.backends.cudnn.flags(enabled=False): assert not torch.backends.cudnn.enabled
        assert not may_round()
    assert may_round()


def test_guidance_runs_in_it():
    net = Watched()
    likelihood_score(net, X, SIGMA, Y)
    posterior_score(lambda x, sigma: -x, net, Y)(X, SIGMA)
    assert SEEN == [False] * 4 and may_round()  # two forward and two backward passes


class Smooth(nn.Module):
    "A score, or with four outputs a classifier, whose layers bfloat16 changes visibly."
    def __init__(self, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, outputs)), []

    def forward(self, x, sigma):
        z = self.net(x)
        self.seen.append(z.dtype)
        return z


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_an_outer_autocast_does_not_reach_a_gradient(compiled, where):
    "Neither one around what is compiled nor one that is compiled too. A score may have an autocast of its own."
    classifier, score = Smooth(4), Smooth(2)
    def autocast(): return torch.autocast("cpu", torch.bfloat16)
    def compute(x):
        with autocast() if where == "inside" else nullcontext(): return likelihood_score(classifier, x, SIGMA, Y), posterior_score(in_bf16(score), classifier, Y)(x, SIGMA)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    exact = likelihood_score(classifier, x, SIGMA, Y)
    with autocast(): prior = score(x, SIGMA).float()
    computed = torch.compile(compute, backend="aot_eager", fullgraph=True) if compiled else compute
    with autocast() if where == "outside" else nullcontext(): found, guided = computed(x)
    torch._dynamo.reset()
    assert set(classifier.seen) == {torch.float32} and set(score.seen) == {torch.bfloat16}
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(guided, prior + exact, rtol=1e-6, atol=1e-6)


def test_an_outer_autocast_does_not_reach_the_block():
    a = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        with full_float32(): assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_errors_are_measured_in_it():
    def score(x, sigma):
        SEEN.append(may_round())
        return -x
    x = torch.rand(6, 1, 2, 2)
    oracle = image_oracle(x, torch.arange(6) % 2, 2)
    mismatch(score, {}, oracle, x[:4], torch.randn(4, 1, 2, 2), Y[None], 1.)
    assert SEEN == [False]


@pytest.mark.parametrize("tf32", [True, False])
def test_fit_trains_in_it_where_it_is_told_to(tf32):
    "Forwards and backwards; between two steps the settings are the caller's."
    net = Watched()
    def loss(model, x, y): return nn.functional.cross_entropy(model(x, SIGMA), y, reduction="none")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in fit(net, loss, 2, optimizer, seed=0, draw=lambda step, generator: {"x": X, "y": Y}, tf32=tf32): assert may_round()
    assert SEEN == [tf32] * 4


@pytest.mark.gpu
def test_float32_on_a_gpu_has_its_digits():
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 16, 16, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    exact = nn.functional.conv2d(x.double(), weight.double())
    with full_float32(): full = nn.functional.conv2d(x, weight)
    rounded = nn.functional.conv2d(x, weight)
    error = {name: ((t - exact).norm() / exact.norm()).item() for name, t in (("full", full), ("rounded", rounded))}
    assert error["full"] < 1e-6
    if torch.cuda.get_device_capability() >= (8, 0): assert error["rounded"] > 1e-5
