"""The networks for points, and many of them as one."""
import dataclasses

import pytest
import torch
from torch import nn

from dlsm.guidance import likelihood_score
from dlsm.networks import Ensemble, MLPClassifier, MLPScore, seeded
from dlsm.training import fit

JOINT = dict(widths=(16, 8), sigma_widths=(8,), joint=12, scale=15., log_sigma=True, activation=nn.SiLU)


def test_the_papers_layers():
    score, classifier = MLPScore(), MLPClassifier()
    shapes = [tuple(w.shape) for w in score.state_dict().values() if w.ndim == 2]
    assert shapes == [(256, 2), (128, 256), (64, 128), (64, 1), (32, 64), (16, 32), (2, 80)]
    assert [w.shape for w in classifier.parameters()] == [w.shape for w in score.parameters()]
    assert [type(m) for m in score.x_branch] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]  # none after the last


@pytest.mark.parametrize("options", [{}, JOINT, {"activation": nn.SiLU, "scale": 2.}])
def test_shapes_and_dtype(options):
    for dtype in (torch.float32, torch.float64):
        x, sigma = torch.randn(7, 3, dtype=dtype), torch.rand(7, dtype=dtype) + 0.1
        assert MLPScore(3, **options).to(dtype)(x, sigma).shape == (7, 3)
        logits = MLPClassifier(3, n_classes=5, **options).to(dtype)(x, sigma)
        assert logits.shape == (7, 5) and logits.dtype == dtype


def test_items_do_not_depend_on_each_other():
    net = seeded(lambda: MLPScore(**JOINT), 0)
    x, sigma = torch.randn(7, 2), torch.rand(7) + 0.1
    assert torch.allclose(net(x, sigma)[2:3], net(x[2:3], sigma[2:3]), atol=1e-6)


def test_scale_and_log_sigma():
    plain, scaled = (seeded(lambda o=o: MLPScore(**o), 0) for o in ({}, {"scale": 4., "log_sigma": True}))
    x, sigma = torch.randn(7, 2), torch.rand(7) + 0.1
    assert torch.allclose(scaled(x, sigma), plain(x / 4, sigma.log() / 4), atol=1e-6)


@pytest.mark.parametrize("joint", [0, 12])
def test_only_a_joint_layer_lets_the_gradient_depend_on_sigma(joint):
    net = seeded(lambda: MLPClassifier(joint=joint), 0)
    x, first = 10 * torch.randn(32, 2), torch.zeros(32, dtype=torch.long)
    def slope(sigma): # of the log-odds
        level = torch.full((32,), sigma)
        return likelihood_score(net, x, level, first) - likelihood_score(net, x, level, 1 - first)
    change = (slope(1e-3) - slope(10.)).norm() / slope(10.).norm()
    assert change > 1e-2 if joint else change < 1e-5


def test_seeded():
    before = torch.get_rng_state()
    a, b, c = (seeded(MLPScore, s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.out.weight, c.out.weight)


@pytest.mark.parametrize("options", [{}, JOINT])
def test_ensemble_equals_its_members(options):
    nets = [seeded(lambda: MLPClassifier(**options), s) for s in range(3)]
    ensemble = Ensemble(nets)
    x, sigma = torch.randn(3, 7, 2), torch.rand(3, 7) + 0.1
    together = ensemble(x, sigma)
    assert len(ensemble) == 3 and together.shape == (3, 7, 2)
    for i, net in enumerate(nets):
        assert torch.allclose(together[i], net(x[i], sigma[i]), atol=1e-6)
        assert torch.allclose(ensemble.member(i)(x[i], sigma[i]), net(x[i], sigma[i]), atol=1e-6)


def test_ensemble_holds_its_own_weights():
    nets = [seeded(MLPScore, s) for s in range(2)]
    ensemble = Ensemble(nets)
    x, sigma = torch.randn(2, 5, 2), torch.ones(2, 5)
    before = ensemble(x, sigma)
    with torch.no_grad(): nets[0].out.weight.zero_()
    assert torch.equal(ensemble(x, sigma), before)
    assert sum(p.numel() for p in ensemble.parameters()) == 2 * sum(p.numel() for p in nets[0].parameters())


def test_ensemble_gradients_stay_apart():
    ensemble = Ensemble([seeded(MLPScore, s) for s in range(2)])
    ensemble(torch.randn(2, 5, 2), torch.ones(2, 5))[0].sum().backward()
    assert all(p.grad[1].abs().max() == 0 for p in ensemble.parameters()) and any(p.grad[0].abs().max() > 0 for p in ensemble.parameters())


def test_ensemble_state_round_trip():
    one, other = (Ensemble([seeded(MLPScore, s + k) for s in range(2)]) for k in (0, 10))
    other.load_state_dict(one.state_dict())
    x, sigma = torch.randn(2, 5, 2), torch.ones(2, 5)
    assert torch.equal(one(x, sigma), other(x, sigma))


def test_ensemble_refuses_buffers():
    with pytest.raises(ValueError, match="buffers"): Ensemble([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])


class Dropping(nn.Module):
    "A network with a layer that depends on the mode."
    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.out = nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 2)

    def forward(self, x, sigma): return self.out(self.drop(self.inner(x)))


def test_ensemble_in_eval_mode_has_no_dropout_and_in_train_mode_has():
    nets = [seeded(Dropping, s) for s in range(2)]
    ensemble, x, sigma = Ensemble(nets), torch.ones(2, 5, 2), torch.ones(2, 5)
    def same(): return [torch.equal(once(), once()) for once in (lambda: ensemble.member(0)(x[0], sigma[0]), lambda: ensemble(x, sigma))]
    assert ensemble.training and same() == [False, False]
    ensemble.eval()
    assert same() == [True, True] and all(net.drop.training for net in nets)  # their own modes stay
    for i, net in enumerate(nets):
        net.eval()
        torch.testing.assert_close(ensemble(x, sigma)[i], net(x[i], sigma[i]))
        torch.testing.assert_close(ensemble.member(i)(x[i], sigma[i]), net(x[i], sigma[i]))
    ensemble.train()
    assert same() == [False, False] and not Ensemble(nets).training and not Ensemble(nets)._member.drop.training


def test_an_ensemble_is_trained_in_train_mode_and_left_in_eval_mode():
    ensemble, seen = Ensemble([seeded(Dropping, s) for s in range(2)]), []
    def loss(model, generator):
        seen.append(model._member.drop.training)
        return model(torch.ones(2, 5, 2), torch.ones(2, 5)).square().mean()
    for state in fit(ensemble, loss, 3, torch.optim.Adam(ensemble.parameters()), 0, ema=0.9, evaluate=lambda state: {"mode": state.ema._member.drop.training}, every=1): pass
    assert seen == [True] * 3 and not ensemble._member.drop.training and not any(r["mode"] for r in state.record)


def test_what_is_frozen_in_the_members_is_frozen_in_the_ensemble():
    nets = [seeded(MLPScore, s) for s in range(2)]
    for net in nets: net.x_branch.requires_grad_(False)
    ensemble = Ensemble(nets)
    assert [p.requires_grad for p in ensemble.parameters()] == [p.requires_grad for p in nets[0].parameters()]
    ensemble(torch.randn(2, 5, 2), torch.ones(2, 5)).sum().backward()
    assert [p.grad is None for p in ensemble.parameters()] == [not p.requires_grad for p in nets[0].parameters()]


def test_an_ensemble_of_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight

        def forward(self, x, sigma): return self.b(self.a(x))
    nets, x, sigma = [seeded(Tied, s) for s in range(2)], torch.randn(2, 5, 2), torch.ones(2, 5)
    ensemble = Ensemble(nets)
    assert len(list(ensemble.parameters())) == 3
    for i, net in enumerate(nets):
        torch.testing.assert_close(ensemble(x, sigma)[i], net(x[i], sigma[i]))
        torch.testing.assert_close(ensemble.member(i)(x[i], sigma[i]), net(x[i], sigma[i]))


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["scores", "classifiers", "sweep", "causes"])
def test_compiled_trainings_go_as_plain_ones_on_a_gpu(part, tmp_path, monkeypatch):
    "Long trainings are compiled there; three steps of one give the weights of three plain ones, but for rounding."
    import dlsm.moons
    from dlsm.presets import MOONS
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    long = dataclasses.replace(MOONS["smoke"], steps=6_000, steps_prior=6_000, steps_sweep=6_000, steps_causes=6_000, eval_every=10**9, checkpoint_every=10**9)

    def after_three_steps():
        scores = Ensemble([seeded(lambda: dlsm.moons.score_net(long), 0)] * 3 * long.n_seeds).cuda()
        steps = {"scores": lambda: dlsm.moons.fit_scores(long, 0, "cuda"), "classifiers": lambda: dlsm.moons.fit_classifiers(long, "paper", 0, scores, "cuda"),
                 "causes": lambda: dlsm.moons.fit_causes(long, "paper", 0, scores, scores, "cuda"),
                 "sweep": lambda: dlsm.moons.fit_sweep(long, "paper", 0, scores.member(0), "cuda")}[part]()
        state = next(state for state in steps if state.step == 3)
        return [p.detach().clone() for p in state.model.parameters()]
    calls, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda loss: calls.append(loss) or compile(loss))
    compiled = after_three_steps()
    monkeypatch.setattr(dlsm.moons, "_compiled", lambda loss, *_: loss)
    assert len(calls) == 1
    for a, b in zip(compiled, after_three_steps()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_each_cause_has_its_own_prior_power_and_lambda(tmp_path, monkeypatch):
    "The loss of all trainings together is the sum of each one's, with what its name says; the networks differ, so that none can stand in for another."
    import dlsm.moons
    from dlsm.data import moons
    from dlsm.losses import ce_loss, total_loss
    from dlsm.parzen import parzen_score
    from dlsm.presets import MOONS
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    cfg, seeds = MOONS["smoke"], (0, 1)
    scores, even = (Ensemble([seeded(lambda: dlsm.moons.score_net(cfg), first + i) for i in range(6)]) for first in (5, 15))
    rates = dict.fromkeys(("ce", "dlsm_prime", "total", *dlsm.moons.CAUSES), 1e-3)
    given = dlsm.moons._trainings(cfg, {}, 1, rates, seeds, scores, "cpu", even)
    for k, net in enumerate(given["model"].values()):
        for p in net.parameters(): p.data.mul_(1 + 0.1 * k)

    x, y = moons(cfg.n_points)
    index, sigma, noise = dlsm.moons._draw(cfg, torch.zeros(2, dtype=torch.long), torch.full((2,), len(x)), torch.Generator().manual_seed(1))
    usual = {"total": ("learned", cfg.power, cfg.lam), "dlsm_prime": ("learned", cfg.power, 0.)}
    expected = 0.
    for i in seeds:
        batch, priors = (x[index[i]], y[index[i]], sigma[i], noise[i]), {"learned": scores.member(3 * i), "even": even.member(3 * i), "exact": parzen_score(x)}
        expected += ce_loss(given["model"]["ce"].member(i), batch[0] + sigma[i][:, None] * noise[i], sigma[i], batch[1]).mean()
        for name, (prior, power, lam) in (usual | dlsm.moons.CAUSES).items():
            expected += total_loss(given["model"][name].member(i), priors[prior], *batch, lam, power).mean()
    torch.testing.assert_close(given["loss"](given["model"], torch.Generator().manual_seed(1)), expected, rtol=1e-5, atol=0.)


def test_causes_are_named_by_what_they_change():
    "Beside L_Total with the learned prior score, power 2 and λ = 1/8; alone is without cross-entropy."
    from dlsm.moons import CAUSES
    assert len(CAUSES) == 9
    for name, cause in CAUSES.items():
        words = name.split("_")
        prior = next((word for word in words if word in ("exact", "even")), "learned")
        assert cause == (prior, 1. if "power" in words else 2., 0. if "alone" in words else 2. if "lam" in words else 1 / 8), name


def test_the_grid_of_the_sweep_has_power_fastest(tmp_path, monkeypatch):
    "All begin with the same weights, so the first gradient tells the λ and the power of each member."
    import dlsm.moons
    from dlsm.data import moons
    from dlsm.losses import total_loss
    from dlsm.presets import MOONS
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    cfg, given = dataclasses.replace(MOONS["smoke"], lams=(0.5, 2., 8.), powers=(0., 1.)), []
    monkeypatch.setattr(dlsm.moons, "fit", lambda *args, **more: given.append(args) or iter(()))
    def prior(x, sigma): return -x / 100
    list(dlsm.moons.fit_sweep(cfg, "paper", 3, prior, "cpu"))
    model, loss = given[0][:2]
    loss(model, torch.Generator().manual_seed(1)).backward()
    x, y = moons(cfg.n_points)
    index, sigma, noise = (t[0] for t in dlsm.moons._draw(cfg, torch.zeros(1, dtype=torch.long), torch.tensor([len(x)]), torch.Generator().manual_seed(1)))
    grid = [(0.5, 0.), (0.5, 1.), (2., 0.), (2., 1.), (8., 0.), (8., 1.)]
    assert len(model) == len(grid)
    for i, (lam, power) in enumerate(grid):
        net = seeded(MLPClassifier, 3)
        total_loss(net, prior, x[index], y[index], sigma, noise, lam, power).mean().backward()
        for stack, own in zip(model.parameters(), net.parameters()): torch.testing.assert_close(stack.grad[i], own.grad, rtol=1e-3, atol=1e-5 * own.grad.abs().max().item())


def test_methods_are_made_of_the_networks_they_name():
    from dlsm.moons_measures import methods
    scores = Ensemble([seeded(MLPScore, s) for s in range(6)])
    classifiers = nn.ModuleDict({name: Ensemble([seeded(MLPClassifier, s + 10 * k) for s in range(2)]) for k, name in enumerate(("ce", "dlsm_prime", "total"), 1)})
    x, sigma, i = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 3., 5), 1
    found, prior = methods(scores, classifiers, i), scores.member(3)(x, sigma)
    assert set(found) == {"base", "scaling", "posterior_sm", "dlsm"}
    for c in (0, 1):
        ce, total = (likelihood_score(classifiers[name].member(i), x, sigma, torch.full((5,), c)) for name in ("ce", "total"))
        for name, expected in {"base": prior + ce, "scaling": prior + 10 * ce, "posterior_sm": scores.member(4 + c)(x, sigma), "dlsm": prior + total}.items():
            torch.testing.assert_close(found[name](c)(x, sigma), expected)


def test_a_classifier_knows_whose_score_models_it_was_trained_with(tmp_path, monkeypatch):
    "What was trained beside others is refused by name, finished or not."
    import dlsm.moons
    from dlsm.presets import MOONS
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    preset = dataclasses.replace(MOONS["smoke"], steps_prior=2, steps=2, steps_parts=2, batch=8)
    for state in dlsm.moons.fit_scores(preset, 0, "cpu"): scores = state.ema
    trainings = (lambda: dlsm.moons.fit_classifiers(preset, "paper", 0, scores, "cpu"), lambda: dlsm.moons.fit_parts(preset, ["layer"], 0, scores, "cpu"))
    for states in trainings:
        for state in states(): pass
        assert [state.step for state in states()] == [2]  # finished, with the same score models
    with torch.no_grad(): scores.stacked[0][0] += 1e-3
    for states in trainings:
        with pytest.raises(ValueError, match="of another configuration: scores='[0-9a-f]{16}' there and '[0-9a-f]{16}' here"): next(states())
