"""The oracle of labelled images and the errors against it: what it agrees with, and what is refused."""
import subprocess
import sys
import textwrap

import pytest
import torch

from dlsm.data import image_data, moons
from dlsm.dsm import perturb
from dlsm.guidance import likelihood_score
from dlsm.mismatch import (
    SCALES,
    Exact,
    best_scale,
    calibration_error,
    check_oracle,
    collapsed,
    compared,
    image_oracle,
    mismatch,
    scaled_errors,
    score_errors,
)
from dlsm.moons_measures import _at_best_scale, by_level
from dlsm.parzen import parzen_classifier, parzen_score
from dlsm.presets import MOONS

G = torch.Generator().manual_seed(0)
X, Y = torch.rand(30, 1, 3, 3, generator=G), torch.arange(30) % 3
NOISE, LABELS = torch.randn(8, 1, 3, 3, generator=G), torch.stack([Y[:8], (Y[:8] + 1) % 3])
oracle = image_oracle(X, Y, 3)


def test_the_oracle_is_the_parzen_density():
    sigma = torch.full((8,), 0.4)
    noisy = perturb(X[:8], sigma, NOISE)
    exact = oracle(noisy, sigma, LABELS)
    torch.testing.assert_close(exact.prior, parzen_score(X)(noisy, sigma).double(), rtol=1e-6, atol=1e-6)
    judge = parzen_classifier(X, Y, 3)
    for own, labels in zip(exact.posterior, LABELS):
        torch.testing.assert_close((own - exact.prior).float(), likelihood_score(judge, noisy, sigma, labels).float(), rtol=1e-4, atol=1e-4)


def test_exact_networks_have_no_error_whatever_they_are_called():
    found = mismatch(parzen_score(X), {"mine": parzen_classifier(X, Y, 3)}, oracle, X[:8], NOISE, LABELS, 0.4)
    assert set(found) == {"mine", "zero", "prior", "oracle"} and found["mine"]["D_L"].shape == (2, 8)
    assert found["mine"]["D_L"].max() < 1e-4 * found["zero"]["D_L"].max() and found["prior"]["error"].max() < 1e-4
    both = mismatch(parzen_score(X), {"ce": parzen_classifier(X, Y, 3)}, oracle, X[:8], NOISE, LABELS, 0.4)
    assert set(both) == {"ce", "scaling", "zero", "prior", "oracle"} and torch.allclose(both["scaling"]["D_L"], 9 * both["zero"]["D_L"], rtol=1e-3)


@pytest.mark.parametrize("call, says", [
    (lambda: image_oracle(X, Y, 2), "y has labels 0 … 2; expected 0 … 1"), (lambda: image_oracle(X, Y, 5), "no image of class 3, 4"),
    (lambda: image_oracle(X, Y.float(), 3), "torch.float32; expected an integer label"), (lambda: image_oracle(X, Y[:4], 3), r"y \(4,\)"),
    (lambda: image_oracle((255 * X).byte(), Y, 3), "data has dtype torch.uint8"),
    (lambda: mismatch(parzen_score(X), {"a": parzen_classifier(X, Y, 3)}, oracle, X[:8], NOISE, LABELS[0], 0.4), r"labels have shape \(8,\); expected \[L, 8\]"),
    (lambda: mismatch(parzen_score(X), {"a": parzen_classifier(X, Y, 3)}, oracle, X[:8], NOISE, LABELS - 1, 0.4), "labels -1 … 1; expected 0 … 2"),
    (lambda: mismatch(lambda x, s: x[..., :1], {"a": parzen_classifier(X, Y, 3)}, oracle, X[:8], NOISE, LABELS, 0.4), "score gave shape"),
    (lambda: calibration_error(torch.zeros(9, 3), torch.zeros(1)), r"logits \(9, 3\) and y \(1,\); expected \[N, K\] and \[N\]"),
])
def test_mistakes_are_one_line_each(call, says):
    with pytest.raises(ValueError, match=says) as e: call()
    assert "\n" not in str(e.value)


# ---- the moons, level by level

def test_by_level_knows_the_exact_classifier_and_the_one_that_knows_nothing():
    x, y = moons(MOONS["smoke"].n_points, dtype=torch.float64)
    exact = parzen_classifier(x, y, 2)
    nets = {"exact": lambda x, sigma: exact(x.double(), sigma.double()), "nothing": lambda x, sigma: 0 * x}
    found = by_level(MOONS["smoke"], (3., 7.5), nets, "cpu", n=50)
    assert max(found["relative"]["exact"]) < 1e-5 and found["length"]["exact"] == pytest.approx([1, 1], abs=1e-5)
    assert found["alpha"]["exact"] == [1, 1] and max(found["at_best"]["exact"]) < 1e-5 and found["cosine"]["exact"] == pytest.approx([1, 1])
    assert found["at_best"]["nothing"] == pytest.approx([1, 1])
    assert found["relative"]["nothing"] == pytest.approx([1, 1]) and found["length"]["nothing"] == [0, 0] and found["zero"][0] > found["zero"][1] > 0


def test_the_best_scale_of_a_level_is_judged_on_other_points():
    "Twice too long on the first half, turned round on the second: chosen there, judged here."
    exact = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = torch.cat([2 * exact[:, :5], -2 * exact[:, 5:]], 1)
    error, alpha = _at_best_scale(gradient, exact)
    assert alpha == 0.5 and error == pytest.approx(2)
    with pytest.raises(ValueError, match="expected at least two"): _at_best_scale(gradient[:, :1], exact[:, :1])


def test_a_classifier_that_learned_nothing_is_told_from_one_that_is_unsure():
    def rows(accuracy, ece): return [{"accuracy": a, "nll": 9., "ece": ece} for a in accuracy]
    assert collapsed(rows((0.1, 0.1, 0.11), 0.9), 10, 0.02)
    assert not collapsed(rows((0.1, 0.1, 0.11), 0.01), 10, 0.02)  # knows that it does not know
    assert not collapsed(rows((0.1, 0.1, 0.4), 0.9), 10, 0.02) and not collapsed(rows((0.5, 0.5, 0.5), 0.6), 10, 0.02)
    assert not collapsed(rows((0.1, 0.1, 0.11), 0.9), 10, 0.5)  # its probabilities are lost, its gradients are not


def test_one_factor_mends_the_length_of_a_gradient_and_not_its_direction():
    generator = torch.Generator().manual_seed(0)
    exact, other = (torch.randn(2, 40, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    prior = torch.zeros(40, 3, 4, dtype=torch.float64)
    methods = {"long": 8 * exact, "askew": exact + other, "zero": 0 * exact}
    level = {name: score_errors(prior, g, Exact(prior, exact, prior, prior)) for name, g in methods.items()}
    for name, g in methods.items():
        for scale in (0.25, 1., 3.):
            torch.testing.assert_close(scaled_errors(level, name, scale), (scale * g - exact).flatten(2).norm(dim=2), rtol=1e-9, atol=1e-9)
    first, rest = slice(20), slice(20, None)
    chosen = {name: best_scale([level, level], [1., 2.], name, first) for name in ("long", "askew")}
    assert chosen["long"] == 1 / 8 and compared([level], [1.], "long", part=rest, scales=chosen)[0] == pytest.approx(-1)
    tried = {scale: scaled_errors(level, "askew", scale)[0, first].sum() for scale in SCALES}
    assert chosen["askew"] == min(tried, key=tried.get) and 0.3 < chosen["askew"] < 0.8  # ½ on average
    assert -0.5 < compared([level], [1.], "askew", part=rest, scales=chosen)[0] < compared([level], [1.], "askew", part=rest)[0]
    with pytest.raises(ValueError, match="scales with D_P; expected D_L"): compared([level], [1.], "long", what="D_P", scales=chosen)


def test_the_memory_of_an_oracle_is_known_before(monkeypatch):
    "That of the set and of two halves of it side by side, measured in a process of its own; and an oracle that does not fit is refused in one line."
    code = """
        import torch
        from dlsm.data import to_unit
        from dlsm.mismatch import ORACLE_BYTES, image_oracle
        from dlsm.monitor import peak_memory
        def most(): return peak_memory(torch.device("cpu"))
        torch.set_num_threads(1)
        bytes_, y = torch.randint(256, (20_000, 3, 16, 16), dtype=torch.uint8), torch.arange(20_000) % 10
        query, level, label = torch.rand(64, 3, 16, 16), torch.ones(64), y[None, :64]
        image_oracle(to_unit(bytes_[:100]), y[:100], 10)(query, level, label)
        before = most()
        whole = image_oracle(to_unit(bytes_), y, 10)
        whole(query, level, label)
        halves = [image_oracle(to_unit(bytes_[part]), y[part], 10) for part in (slice(10_000), slice(10_000, None))]
        for half in halves: half(query, level, label)
        print((most() - before) / bytes_.numel() / ORACLE_BYTES)"""
    share = float(subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout)
    assert 0.55 < share < 1, share
    monkeypatch.setattr("dlsm.monitor.free_memory", lambda device: 1e5)
    with pytest.raises(MemoryError, match="too little memory for the exact scores of 1,442 images on cpu: about .* use another device or fewer images") as error:
        check_oracle(image_data("digits"))
    assert "\n" not in str(error.value)
