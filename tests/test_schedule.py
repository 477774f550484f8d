"""Noise levels: their distribution, their order, and the checks at the door of every function."""
import math

import pytest
import torch

from dlsm.guidance import likelihood_score
from dlsm.losses import ce_loss
from dlsm.networks import MLPClassifier, seeded
from dlsm.schedule import VESchedule, check_batch, expand

SCHEDULE = VESchedule(1e-3, 10.)


@pytest.mark.parametrize("stratified", [False, True])
def test_draws_are_log_uniform(stratified):
    n = 20_000
    levels = SCHEDULE.draw(n, torch.Generator().manual_seed(0), stratified).double()
    assert levels.shape == (n,) and levels.min() >= 1e-3*(1 - 1e-5) and levels.max() <= 10*(1 + 1e-5)
    u = (levels/1e-3).log()/math.log(1e4)
    distance = (u.sort().values - (torch.arange(n, dtype=torch.float64) + 0.5)/n).abs().max()
    assert distance < (1.01/n + 1e-6 if stratified else math.sqrt(math.log(2/1e-4)/2/n) + 1/n)  # Kolmogorov-Smirnov, one in 10,000


def test_stratified_draws_are_in_random_order():
    levels = SCHEDULE.draw(1000, torch.Generator().manual_seed(0), stratified=True).log()
    assert abs(torch.corrcoef(torch.stack([levels, torch.arange(1000.)]))[0, 1]) < 0.15


def test_draws_depend_on_the_generator_alone():
    torch.manual_seed(0)
    a = SCHEDULE.draw(8, torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    assert torch.equal(a, SCHEDULE.draw(8, torch.Generator().manual_seed(3)))
    assert not torch.equal(a, SCHEDULE.draw(8, torch.Generator().manual_seed(4)))


def test_levels_descend_from_the_largest_to_the_smallest():
    levels = SCHEDULE.levels(1000)
    assert levels.shape == (1000,) and levels.dtype == torch.float64 and (levels.diff() < 0).all()
    assert torch.allclose(levels[[0, -1]], torch.tensor([10., 1e-3], dtype=torch.float64), rtol=1e-12)
    ratio = levels[1:]/levels[:-1]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-12)


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (1, 1), (2, 1), (1, math.inf), (math.nan, 1), (1, math.nan)])
def test_a_schedule_needs_two_positive_levels_in_order(low, high):
    with pytest.raises(ValueError, match="sigma_min=.*sigma_max="): VESchedule(low, high)


def test_a_ladder_has_two_levels():
    with pytest.raises(ValueError, match="n=1"): SCHEDULE.levels(1)


def test_expand():
    sigma = torch.tensor([1., 2.])
    for shape in ((2,), (2, 3), (2, 3, 8, 8)):
        x = torch.ones(shape)
        assert (expand(sigma, x)*x).shape == shape and torch.equal((expand(sigma, x)*x).reshape(2, -1)[:, 0], sigma)
    assert expand(torch.tensor(3.), torch.ones(2, 3)).shape == (1, 1)


X, ONES, Y = torch.zeros(4, 2), torch.ones(4), torch.tensor([0, 1, 2, 0])


def test_what_is_right_passes():
    check_batch(X, ONES)
    check_batch(X, ONES, Y, 3)
    check_batch(torch.zeros(4, 3, 8, 8), ONES, Y.to(torch.uint8), 3)
    check_batch(X[:0], ONES[:0], Y[:0], 3)


@pytest.mark.parametrize("arguments, words", [
    ((torch.zeros(4), ONES), ["x_noisy", "(4,)"]),
    ((X, ONES[:3]), ["sigma", "(3,)", "x_noisy (4, 2)"]),
    ((X, torch.tensor(1.)), ["sigma", "()"]),
    ((X, ONES*0), ["sigma (4,)", "positive"]),
    ((X, torch.tensor([1., 1., math.nan, 1.])), ["sigma (4,)", "positive"]),
    ((X, torch.tensor([1., math.inf, 1., 1.])), ["sigma (4,)", "finite"]),
    ((X, ONES, Y[:3]), ["y", "(3,)"]),
    ((X, ONES, Y[:, None]), ["y", "(4, 1)"]),
    ((X, ONES, Y.float()), ["y (4,)", "float32"]),
    ((X, ONES, Y == 0), ["y (4,)", "bool"]),
    ((X, ONES, Y, 2), ["y (4,)", "0…1"]),
    ((X, ONES, Y - 1, 3), ["y (4,)", "0…2"]),
], ids=lambda v: v[0] if isinstance(v, list) else None)
def test_what_is_wrong_is_named(arguments, words):
    with pytest.raises(ValueError) as error: check_batch(*arguments)
    assert all(word in str(error.value) for word in words)


def test_the_callers_name_is_used():
    with pytest.raises(ValueError, match=r"^data has shape \(4,\)"): check_batch(torch.zeros(4), ONES, name="data")


def test_values_are_left_alone_inside_vmap_and_shapes_are_not():
    def checked(x, sigma):
        check_batch(x, sigma)
        return x
    assert torch.vmap(checked)(X[None], -ONES[None]).shape == (1, 4, 2)
    with pytest.raises(ValueError, match="sigma"): torch.vmap(checked)(X[None], ONES[None, :3])


def test_what_is_no_tensor_is_named():
    with pytest.raises(ValueError, match="^sigma is a float; expected a tensor"): check_batch(X, 1.0)
    with pytest.raises(ValueError, match="^y is a list; expected a tensor"): check_batch(X, ONES, [0, 1, 0, 1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    "As data sets give them."
    net = seeded(lambda: MLPClassifier(n_classes=3), 0)
    same = [ce_loss(net, X, ONES, y) for y in (Y, Y.to(dtype))] + [likelihood_score(net, X, ONES, y)[:, 0] for y in (Y, Y.to(dtype))]
    assert torch.equal(same[0], same[1]) and torch.equal(same[2], same[3])
