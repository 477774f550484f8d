"""What training on the moons costs, as ratios from one run: many trainings together, and the demo's recipe against the paper's.

`make bench` runs it, on a GPU if there is one. Not part of the tests.
"""
import dataclasses
import time

import pytest
import torch

from dlsm.data import moons
from dlsm.dsm import dsm_loss, perturb
from dlsm.losses import ce_loss, total_loss
from dlsm.moons import FORMS, LOSSES, fit_classifiers, score_net
from dlsm.moons_measures import curves
from dlsm.networks import Ensemble, MLPClassifier, seeded
from dlsm.presets import MOONS
from dlsm.runs import load_result, pick_device
from dlsm.schedule import VESchedule
from dlsm.training import fit

DEVICE = pick_device()
ERROR = 0.06  # the D_L that the second benchmark waits for
try: ENDS = load_result("fig5", "moons", "paper")["values"]["final"]["paper"]["d_l"]["total"]  # read before the root is moved
except FileNotFoundError: ENDS = None


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "Write checkpoints where nobody looks for them."
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))


def clock():
    if DEVICE.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def seconds_per_step(states, steps, warmup=2):
    "Run a training for a few steps and time those after the first."
    states = iter(states)
    for _ in range(warmup): next(states)
    start = clock()
    for _ in range(steps): next(states)
    return (clock() - start) / steps


def batch(preset, x, generator):
    "Draw points and levels for one network, as `dlsm.moons` does for many."
    index = torch.randint(len(x), (preset.batch,), generator=generator, device=DEVICE)
    sigma = VESchedule(preset.sigma_min, preset.sigma_max).draw(preset.batch, generator, stratified=preset.stratified)
    return index, sigma, torch.randn(preset.batch, 2, generator=generator, device=DEVICE)


def train_score(preset, steps):
    "Train one prior score model."
    x = moons(preset.n_points)[0].to(DEVICE)
    def loss(model, generator):
        index, sigma, noise = batch(preset, x, generator)
        return dsm_loss(model, x[index], sigma, noise, preset.power).mean()
    model = seeded(lambda: score_net(preset), 0).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), preset.lr_prior)
    return fit(model, loss, steps, optimizer, 0, decay=preset.lr_decay, ema=preset.ema)


def train_classifier(preset, form, name, score, steps):
    "Train one classifier under L_CE, L_DLSM′ or L_Total."
    x, y = (t.to(DEVICE) for t in moons(preset.n_points))
    def loss(model, generator):
        index, sigma, noise = batch(preset, x, generator)
        if name == "ce": return ce_loss(model, perturb(x[index], sigma, noise), sigma, y[index]).mean()
        return total_loss(model, score, x[index], y[index], sigma, noise, preset.lam if name == "total" else 0., preset.power).mean()
    model = seeded(lambda: MLPClassifier(**FORMS[form]), 0).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), preset.lr_joint if form == "joint" else preset.lr_total)
    return fit(model, loss, steps, optimizer, 0, decay=preset.lr_decay, ema=preset.ema)


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_fifteen_trainings_together(benchmark, compare, capsys, name):
    "Five seeds of three losses, as one batched computation (on a GPU compiled where the preset is long) against one after the other, as PyTorch runs it."
    steps = 10 if DEVICE.type == "cpu" else 100
    preset = dataclasses.replace(MOONS[name], eval_every=10**9, checkpoint_every=10**9)
    scores = Ensemble([score_net(preset)] * 3 * preset.n_seeds).to(DEVICE)

    def both():
        together = seconds_per_step(fit_classifiers(preset, "paper", 0, scores, DEVICE), steps)
        alone = [seconds_per_step(train_classifier(preset, "paper", loss, scores.member(0), preset.steps), steps) for loss in LOSSES]
        return together, preset.n_seeds * sum(alone)
    together, alone = benchmark.pedantic(both, rounds=1)
    compare(f"a step of fifteen trainings, preset {name}, batch {preset.batch:,}", together, "one after the other", alone, aim=10 if DEVICE.type == "cuda" else None)
    with capsys.disabled():
        print(f"\n{3 * preset.n_seeds} trainings, preset {name}, batch {preset.batch:,}, {DEVICE}: {1e3 * together:.1f} ms a step together, "
              f"{1e3 * alone:.1f} ms one at a time, ratio {alone / together:.1f}")


def time_to_error(preset):
    "Train one prior and one joint classifier under L_Total, until its moving average reaches the error."
    measure = curves(preset, DEVICE)
    start = clock()
    *_, prior = train_score(preset, preset.steps_prior)
    for state in train_classifier(preset, "joint", "total", prior.ema, preset.steps_joint):
        if state.step % preset.eval_every == 0 and (error := measure([Ensemble([state.ema])])["d_l"][0]) <= ERROR:
            return clock() - start, state.step, error
    raise AssertionError(f"D_L is {error:.3f} after {preset.steps_joint} steps; expected {ERROR}")


def test_time_to_error(benchmark, compare, capsys):
    """The demo's recipe and the joint network, trained until D_L ≤ 0.06, beside the paper's recipe and network at their own step count, which end about there.

    The paper's 40,000 + 40,000 steps are not run: its seconds per step are measured on a few, and multiplied."""
    demo, paper, few = MOONS["demo"], MOONS["paper"], 10 if DEVICE.type == "cpu" else 100

    def both():
        first = seconds_per_step(train_score(paper, few + 3), few)
        prior = seeded(lambda: score_net(paper), 0).to(DEVICE)
        second = seconds_per_step(train_classifier(paper, "paper", "total", prior, few + 3), few)
        return (*time_to_error(demo), first, second)
    ours, step, error, first, second = benchmark.pedantic(both, rounds=1)
    theirs = first * paper.steps_prior + second * paper.steps
    ends = f", which end at {ENDS:.3f}" if ENDS else ""
    compare(f"moons: demo's recipe, joint network, until D_L ≤ {ERROR}", ours,
            f"the paper's recipe and network, its {paper.steps_prior:,} + {paper.steps:,} steps{ends} (extrapolated from {few})", theirs)
    with capsys.disabled():
        print(f"\n{DEVICE}: D_L = {error:.3f} after {ours:.1f} s ({demo.steps_prior:,} + {step:,} steps, batch {demo.batch}); the paper's "
              f"recipe takes {theirs:.0f} s ({paper.steps_prior:,} × {1e3 * first:.1f} ms + {paper.steps:,} × {1e3 * second:.1f} ms, "
              f"extrapolated from {few} steps each), ratio {theirs / ours:.0f}")
