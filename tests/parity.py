"""Weights filled by rule and inputs, of which the reference implementation's outputs are known (parity_nets.npz)."""
import json
import math
from pathlib import Path

import numpy as np
import torch

from dlsm.ncsnpp import NCSNpp
from dlsm.resnet import SigmaResNet

DATA = Path(__file__).parent/"data"
PARITY = {  # name: (network, shape and phase of x, sigma, bar)
    "ncsnpp_small": (lambda: NCSNpp(nf=16, num_res_blocks=1), (2, 3, 32, 32), 0, (0.05, 7.), 2e-5),
    "ncsnpp_cifar": (NCSNpp, (1, 3, 32, 32), 1, (0.7,), 2e-5),
    "resnet18": (SigmaResNet, (2, 3, 32, 32), 2, (0.1, 3.), 1e-5),
    "resnet34": (lambda: SigmaResNet(34, 100), (2, 3, 32, 32), 2, (0.1, 3.), 1e-5),
}


@torch.no_grad()
def fill(net):
    "Fill the weights by the rule of the parity data."
    for i, (name, tensor) in enumerate(net.state_dict().items()):
        if not tensor.is_floating_point() or name == "sigmas": continue
        a = torch.cos(0.37*torch.arange(tensor.numel(), dtype=torch.float64) + i).reshape(tensor.shape)
        if tensor.ndim >= 2: a = a*math.sqrt(2*len(tensor)/tensor.numel())*(1000 if ".dense_" in name else 1)
        elif name == "all_modules.0.W" or name.endswith("condition_modules.0.W"): a = 16*a
        else: a = 0.1*a + (1 if name.endswith(("weight", "running_var")) else 0)
        tensor.copy_(a)
    return net.eval()


def wave(shape, phase):
    return (0.5 + 0.5*torch.sin(0.11*torch.arange(math.prod(shape), dtype=torch.float64) + phase)).float().reshape(shape)


def relative_error(a, b): return ((a - b).flatten(1).norm(dim=1)/b.flatten(1).norm(dim=1)).max().item()


def published_names(name):
    "The names and shapes of a network's tensors, in their order."
    return {key: tuple(shape) for key, shape in json.loads((DATA/"parity_keys.json").read_text())[name]}


def bar_in_float32(name):
    """The bar, or four times the bar for the ResNets where kernels are not AVX-512.

    The rule gives the ResNets embeddings a thousand times larger than their features. What cancels costs digits, so that float32
    rounds to about 1e-5 (ResNet-18), differently on each processor: the bar holds for AVX-512 kernels, and in float64 anywhere."""
    exact = "resnet" not in name or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return PARITY[name][-1]*(1 if exact else 4)


def case(name):
    "Inputs x and sigma, and the output of the reference implementation."
    _, shape, phase, sigma, _ = PARITY[name]
    return wave(shape, phase), torch.tensor(sigma), torch.from_numpy(np.load(DATA/"parity_nets.npz")[name])
