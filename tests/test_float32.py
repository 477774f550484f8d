"""Full float32: where gradients of a classifier are trained, measured or followed, TF32 is kept out, and the settings come back."""
import pytest
import torch
from torch import nn

from dlsm.float32 import full_float32
from dlsm.guidance import likelihood_score, posterior_score
from dlsm.mismatch import image_oracle, mismatch
from dlsm.training import fit

CONV = torch.backends.cudnn.conv


class Watched(nn.Module):
    "A classifier that writes down the precision of convolutions whenever it is evaluated, and whenever its gradient is taken."
    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 2), []

    def forward(self, x, sigma):
        self.seen.append(CONV.fp32_precision)
        logits = self.layer(x)
        if logits.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(logits):
            logits.register_hook(lambda g: self.seen.append(CONV.fp32_precision))
        return logits


X, SIGMA, Y = torch.ones(4, 2), torch.ones(4), torch.tensor([0, 1, 0, 1])


def test_settings_come_back():
    before = CONV.fp32_precision, torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), full_float32():
        assert CONV.fp32_precision == "ieee" and torch.get_float32_matmul_precision() == "highest"
        raise KeyError
    torch.set_float32_matmul_precision("high")
    with full_float32(convolutions=False): assert CONV.fp32_precision == before[0] and torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before[1])
    assert (CONV.fp32_precision, torch.get_float32_matmul_precision()) == before


def test_settings_of_the_newer_interface_come_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_float32(): assert matmul.fp32_precision == CONV.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally: matmul.fp32_precision = before


def test_guidance_runs_in_it():
    outside, net = CONV.fp32_precision, Watched()
    likelihood_score(net, X, SIGMA, Y)
    posterior_score(lambda x, sigma: -x, net, Y)(X, SIGMA)
    assert outside != "ieee" and net.seen == ["ieee"] * 2 and CONV.fp32_precision == outside


def test_errors_are_measured_in_it():
    seen = []
    def score(x, sigma):
        seen.append(CONV.fp32_precision)
        return -x
    x = torch.rand(6, 1, 2, 2)
    oracle = image_oracle(x, torch.arange(6) % 2, 2)
    mismatch(score, {}, oracle, x[:4], torch.randn(4, 1, 2, 2), Y[None], 1.)
    assert seen == ["ieee"]


@pytest.mark.parametrize("tf32", [True, False])
def test_fit_trains_in_it_where_it_is_told_to(tf32):
    "Forwards and backwards; between two steps the settings are the caller's."
    outside, net = CONV.fp32_precision, Watched()
    def loss(model, x, y): return nn.functional.cross_entropy(model(x, SIGMA), y, reduction="none")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in fit(net, loss, 2, optimizer, seed=0, draw=lambda step, generator: {"x": X, "y": Y}, tf32=tf32): assert CONV.fp32_precision == outside
    assert net.seen == [outside if tf32 else "ieee"] * 4  # two forward and two backward passes


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
