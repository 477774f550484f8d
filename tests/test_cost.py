"""Counted operations against counts by hand, and trainings' times from their logs."""
import pytest
import torch
from torch import nn

from dlsm.cost import cas_flops, count_flops, evaluation_flops, preset_flops, trained, training_flops
from dlsm.image_presets import IMAGES


def test_convolution_and_its_gradients_by_hand():
    "A convolution of 3 to 8 channels, 3 × 3, on 2 images of 16 × 16; its backward pass takes as much for the weights, and again for the input."
    net, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 16, 16)
    forward = 2 * 2 * 16 * 16 * 8 * 3 * 9
    assert count_flops(lambda: net(x)) == forward
    assert count_flops(lambda: net(x).sum().backward()) == 2 * forward
    assert count_flops(lambda: net(x.requires_grad_()).sum().backward()) == 3 * forward


def test_double_backward_is_counted():
    "The gradient of a gradient's square is more than three forward passes' worth, and a product without gradients exactly one."
    weight, x = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    forward = 2 * 3 * 7 * 5
    def work():
        grad, = torch.autograd.grad((x @ weight.T).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert count_flops(lambda: x.detach() @ weight.detach().T) == forward
    assert count_flops(work) > 3 * forward


def test_stages_of_a_preset_in_order_of_their_cost():
    "The double backward costs more than cross-entropy, L_Total as much as DLSM′, and twice the images cost twice as much."
    preset = IMAGES["digits"]["smoke"]
    ce, dlsm, total = (training_flops(preset, name) for name in ("ce", "dlsm_prime", "total"))
    assert 0 < ce < evaluation_flops(preset) < dlsm <= total
    with pytest.raises(ValueError, match="score, ce"): training_flops(preset, "cross-entropy")
    parts = preset_flops("digits", "smoke")
    assert parts["stage 1"] == training_flops(preset, "score") * preset.score.steps * preset.score.batch
    assert all(value > 0 for value in parts.values()) and cas_flops(preset, "small") > 0


def test_time_of_a_training_from_its_log():
    "In pieces, with other lines between; nothing is known from a log without rates."
    log = [{"step": 0}, {"step": 10, "images_per_s": 80.}, {"step": 15}, {"step": 30, "images_per_s": 320.}]
    assert trained(log, 8) == {"steps": 30, "seconds": 10 * 8 / 80 + 20 * 8 / 320, "images_per_s": 30 * 8 / 1.5}
    assert trained([{"step": 0}, {"step": 4}], 8) is None
