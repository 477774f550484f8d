"""Precision, recall, density and coverage: equal to prdc and torch-fidelity, exact, chunked, on known distributions; halves and claims."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from dlsm import neighbours
from dlsm.classwise import check_balanced, classwise, released, stream
from dlsm.features import Features
from dlsm.frechet import fid, moments
from dlsm.intervals import accuracy_interval, halves, interval
from dlsm.metrics import (
    CLAIMS,
    FAIR,
    NOT_TESTABLE,
    OPEN,
    ROWS,
    Measured,
    check_claim,
    class_differences,
    estimate,
    estimate_accuracy,
    far_from_data,
    measure,
    measure_halves,
    not_testable,
    row_titles,
)
from dlsm.neighbours import PRDC, expected_coverage, nearest, prdc, prdc_points, radii


def random(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(x, y=None, network="plane", logits=None):
    y = torch.arange(len(x)) % 10 if y is None else y
    return Features(x, y, network, logits=logits, scorer=network if logits is not None else None)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize(("d", "k"), ((2, 5), (64, 3), (512, 3)))
def test_prdc_equals_the_reference(dtype, d, k):
    compute = pytest.importorskip("prdc").compute_prdc
    real, fake = random(2000, d, dtype=dtype), 0.9 * random(2000, d, seed=1, dtype=dtype) + 0.05
    ours, theirs = prdc(real, fake, k), compute(real.numpy(), fake.numpy(), k)
    for name in PRDC: assert ours[name] == pytest.approx(theirs[name], abs=1e-12), name


def test_rim_inside_equals_torch_fidelity():
    reference = pytest.importorskip("torch_fidelity.metric_prc").calculate_precision_recall_full
    lattice = torch.randint(0, 3, (2, 400, 5), generator=torch.Generator().manual_seed(0)).double()
    ours = prdc(*lattice, 3, ["precision", "recall"], inclusive=True)
    assert (ours["precision"], ours["recall"]) == pytest.approx(reference(lattice[1], lattice[0], 3), abs=1e-6)  # its means are float32
    assert prdc(*lattice, 3)["precision"] < ours["precision"]


@pytest.mark.parametrize("budget", (50, 1000, 2**21))
def test_chunks_do_not_matter(monkeypatch, budget):
    real, fake = random(130, 7), random(90, 7, seed=1)
    whole = prdc_points(real, fake, 4)
    monkeypatch.setattr(neighbours, "BUDGET", budget)
    assert all(torch.equal(whole[name], values) for name, values in prdc_points(real, fake, 4).items())


def test_each_metric_alone():
    real, fake = random(300, 8), random(200, 8, seed=1)
    together = prdc(real, fake, 3)
    for name in PRDC: assert prdc(real, fake, 3, [name]) == {name: together[name]}
    points = prdc_points(real, fake, 3)
    assert [len(points[name]) for name in PRDC] == [200, 300, 200, 300]
    assert all(points[name].mean().item() == together[name] for name in PRDC)


def test_exact_where_float32_is_not():
    "A cloud so far from the origin that float32 products see nothing, and near ties that only float64 tells apart."
    far = random(400, 16, dtype=torch.float64) + 1e6
    fake = random(400, 16, seed=1, dtype=torch.float64) + 1e6
    assert prdc(far, fake, 3) == prdc(far - 1e6, fake - 1e6, 3)
    line = torch.tensor([[0.], [1.], [2.], [3.]], dtype=torch.float64)
    for shift, inside in ((1e-12, 0.), (-1e-12, 1.)):  # 1 beyond or before the rim of the ball about 3
        assert prdc(line, torch.full((2, 1), 4. + shift, dtype=torch.float64), 1, ["precision"])["precision"] == inside


def test_an_outer_autocast_changes_nothing():
    real, fake = random(300, 16), random(300, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16): inside = prdc(real, fake, 3), radii(real, 3)
    assert inside[0] == prdc(real, fake, 3) and torch.equal(inside[1], radii(real, 3))


def test_copies_and_duplicates():
    real, one = random(200, 12), random(1, 12, seed=2).expand(200, -1)
    found = prdc(real, one, 3)
    assert found["recall"] == 0 and found["precision"] in (0., 1.)
    assert radii(one, 3).max() == 0
    assert prdc(real, real, 5) == dict.fromkeys(PRDC, 1.)


def test_radii_and_nearest():
    a, b = random(100, 9, dtype=torch.float64), random(150, 9, seed=1, dtype=torch.float64)
    d = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    distance, index = nearest(a, b)
    assert torch.equal(index, d.argmin(1)) and torch.allclose(distance, d.min(1).values, rtol=1e-12)
    own = torch.cdist(b, b, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values
    assert torch.allclose(radii(b, 4), own[:, 4], rtol=1e-12)


@pytest.mark.parametrize("unit", (2.**70, 2.**-90))
def test_the_unit_does_not_matter(unit):
    "Float32 holds these features, but not their squares."
    real, fake = random(300, 8), random(200, 8, seed=1)
    there, here = prdc_points(unit * real, unit * fake, 3), prdc_points(real, fake, 3)
    assert all(torch.equal(there[name], here[name]) for name in PRDC)
    assert torch.equal(radii(unit * real, 3), unit * radii(real, 3)) and torch.equal(nearest(unit * fake, unit * real)[1], nearest(fake, real)[1])


def test_radii_take_what_prdc_takes():
    x = random(30, 4).requires_grad_()
    found = radii(x, 2)
    assert not found.requires_grad and torch.equal(found, radii(features(x.detach()), 2)) and torch.equal(found, radii(x.detach().numpy(), 2))


def test_expected_coverage_and_mode_collapse():
    values = [prdc(random(400, 6, seed=i), random(500, 6, seed=100 + i), 3, ["coverage"])["coverage"] for i in range(30)]
    assert np.mean(values) == pytest.approx(expected_coverage(400, 500, 3), abs=4 * np.std(values) / 30**0.5)
    assert expected_coverage(50_000, 50_000, 3) == pytest.approx(0.875, abs=1e-4)
    centres = 20 * random(8, 10, seed=7)
    def sample(modes, seed): return centres[torch.arange(800) % modes] + random(800, 10, seed=seed)
    whole, collapsed = (prdc(sample(8, 1), sample(modes, 2), 3) for modes in (8, 2))
    assert abs(collapsed["precision"] - whole["precision"]) < 0.06 and collapsed["recall"] < 0.3 * whole["recall"] < whole["recall"]


PEAK = """
import sys
import torch
from dlsm import neighbours

def peak():
    "Most memory so far, in MB. (On Linux ru_maxrss of a child begins at its parent's peak.)"
    try: return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**10
    except FileNotFoundError:
        from resource import RUSAGE_SELF, getrusage
        return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

n, neighbours.BUDGET = map(int, sys.argv[1:])
a, b = torch.randn(2, n, 8)
neighbours.prdc(a[:99], b[:99], 3)
before = peak()
neighbours.prdc(a, b, 3)
print(peak() - before)
"""


def test_memory_depends_on_the_tile_not_on_the_square():
    "The working memory for twice the points grows like the points, far below N² numbers (64 and 256 MB); in one tile it does not. What this process has held does not matter."
    def working(n, budget=neighbours.BUDGET):
        return float(subprocess.run([sys.executable, "-c", PEAK, str(n), str(budget)], capture_output=True, text=True, check=True).stdout)
    torch.ones(2**28)  # 1 GB, more than any of these processes adds
    small, large, one_tile = working(4000), working(8000), working(8000, 10**12)
    assert large < 150 and large - small < 50 and one_tile > 300, (small, large, one_tile)


@pytest.mark.gpu
def test_prdc_on_a_gpu():
    """Each point counts alike; the means over the points may differ in their last digit, since a GPU adds up in another order.
    (Density is a count over k, and PyTorch divides by a number on a GPU by multiplying with its reciprocal: the last digit differs.)"""
    real, fake = random(3000, 64), random(3000, 64, seed=1)
    there, here = prdc_points(real.cuda(), fake.cuda(), 3), prdc_points(real, fake, 3)
    assert all(torch.equal(there[name].cpu(), here[name]) for name in ("precision", "recall", "coverage"))
    torch.testing.assert_close(there["density"].cpu(), here["density"], rtol=1e-12, atol=1e-12)
    assert prdc(real.cuda(), fake.cuda(), 3) == pytest.approx(prdc(real, fake, 3), rel=1e-12)


@pytest.mark.parametrize(("call", "told"), (
    (lambda: prdc(random(10, 3), random(10, 4)), "real has shape (10, 3) and fake (10, 4); expected [N, D] and [M, D]"),
    (lambda: prdc(random(4, 3), random(9, 3), 4), "k=4 with 4 points of real: a k-th neighbour among the others needs 0 < k < number of points"),
    (lambda: prdc(random(9, 3), random(9, 3) / 0, 4), "fake (9, 3) has values that are NaN or infinite"),
    (lambda: radii(torch.where(torch.arange(9)[:, None] == 4, torch.nan, random(9, 3)), 2), "points (9, 3) has values that are NaN or infinite"),
    (lambda: radii(random(9, 3).long(), 2), "points (9, 3) has dtype torch.int64; expected features, floating-point numbers"),
    (lambda: radii(random(9), 2), "points has shape (9,); expected [N, D]"),
    (lambda: prdc(1e200 * random(9, 3, dtype=torch.float64), random(9, 3), 4),
     "points reach inf from their mean: the squares of distances overflow float64; divide all points by a number first"),
    (lambda: prdc(random(9, 3).long(), random(9, 3), 4), "real (9, 3) has dtype torch.int64; expected features, floating-point numbers"),
    (lambda: prdc(random(9, 3), random(9, 3), 4, ["precison"]), "no such metric: precison; there are precision, recall, density, coverage"),
    (lambda: prdc(features(random(20, 3)), features(random(20, 3), network="space"), 3),
     "real features are from plane (weights none) and fake ones from space (weights none): only features of one network can be compared"),
    (lambda: check_balanced(torch.tensor([0, 0, 1])), "class 1 has 1 generated images and class 0 has 2: metrics depend on the number; take as many of each class, "
     "or say balanced=False"),
    (lambda: classwise(features(random(30, 3), torch.arange(30) % 3), features(random(30, 3), torch.arange(30) % 5)),
     "generated images are of class 3, 4, of which there are no real ones; real classes are 0 … 2"),
    (lambda: classwise(features(random(30, 3)), features(random(30, 3)), as_released=True),
     "none of 10 classes has more than k=3 real and generated images as the released code sees them; take more images"),
    (lambda: accuracy_interval([[True]]), "right has shape (1, 1); expected [S, T], S trainings and T ≥ 2 test images"),
    (lambda: accuracy_interval(torch.ones(9)), "right has shape (9,); expected [S, T], S trainings and T ≥ 2 test images"),
    (lambda: classwise(features(random(30, 3)), features(random(30, 3))), "class 0 has 3 real and 3 generated images; k=3 needs at least 4 of each"),
))
def test_mistakes_are_one_line_each(call, told):
    with pytest.raises(ValueError) as error: call()
    assert str(error.value) == told


# ---- class by class

def test_classwise_is_prdc_of_each_class():
    real, fake = features(random(400, 6)), features(random(300, 6, seed=1))
    found = classwise(real, fake, 3)
    for c in found["classes"]:
        own = prdc(real.x[real.y == c], fake.x[fake.y == c], 3)
        assert all(found[name][c] == own[name] for name in PRDC)
    assert found["average"]["recall"] == pytest.approx(np.mean(found["recall"])) and found["dropped"] == [] and found["n_fake"] == [30] * 10
    assert classwise(real, fake.take(torch.arange(299)), balanced=False)["n_fake"][9] == 29
    assert classwise(real, fake, 3, distance=False)["average"] == {name: found["average"][name] for name in PRDC}


def test_released_protocol():
    index = stream(5000, 0)
    assert len(index) == 5000 and 4600 < len(index.unique()) < 4700  # 93% distinct, as of 50,000
    assert not torch.equal(index, stream(5000, 1)) and torch.equal(index, stream(5000, 0))
    real = features(random(2000, 6), torch.arange(2000) % 100)
    fake = features(random(1200, 6, seed=1), torch.arange(1200) % 100)
    _, kept = released(real, fake)
    assert len(kept) == 1000 and kept.y.max() == 83 and (kept.y == 83).sum() == 4 and (kept.y == 82).sum() == 12
    found = classwise(real, fake, 3, as_released=True)
    assert found["dropped"][-16:] == list(range(84, 100)) and 82 in found["classes"]
    with pytest.raises(ValueError, match="metrics depend on the number"): classwise(real, kept)
    few = torch.cat([torch.arange(200) % 2, torch.tensor([2])])  # seed 0 draws no image of the last class
    assert classwise(features(random(201, 6), few), features(random(201, 6, seed=1), few), 3, as_released=True)["dropped"] == [2]


# ---- intervals

def test_halves_are_halves_of_each_class():
    y = torch.tensor([0] * 10 + [1] * 7 + [2] * 4)
    for half in halves(y, 5, 0): assert y[half].bincount().tolist() == [5, 3, 2] and len(half.unique()) == 10
    assert [len(half) for half in halves(torch.arange(9), 2, 0)] == [4, 4]
    assert not torch.equal(*halves(y, 2, 0)) and torch.equal(halves(y, 2, 0)[1], halves(y, 2, 0)[1])


def test_intervals_have_the_right_size():
    "The spread over halves is the standard error of the whole sample, for a mean."
    x = random(1000, 1)[:, 0]
    low, high = interval(x.mean().item(), [x[h].mean().item() for h in halves(torch.zeros(1000), 400, 0)])
    assert (high - low) / 2 == pytest.approx(1.96 * x.std().item() / 1000**0.5, rel=0.12)
    right = torch.rand(3, 500, generator=torch.Generator().manual_seed(0)) < 0.7
    assert np.mean(accuracy_interval(right)) == pytest.approx(right.double().mean().item())
    assert estimate_accuracy(right, right)["value"] == 0 and estimate_accuracy(right, right)["high"] == 0  # subtracted image by image
    runs = torch.tensor([[True] * 80 + [False] * 20, [True] * 60 + [False] * 40])
    one, two = (accuracy_interval(r) for r in (runs[:1], runs))
    assert two[1] - two[0] > 10 * (one[1] - one[0])  # two trainings that disagree say little: Student's t with one degree of freedom is 12.7


def test_few_halves_make_wide_intervals():
    "Student's t: as few halves as there may be."
    assert interval(0., [-1., 1.])[1] == pytest.approx(12.706 * 2**0.5, rel=1e-4) and interval(0., [-1., 1.] * 500)[1] == pytest.approx(1.962, abs=2e-3)
    with pytest.raises(ValueError, match="1 halves given; expected at least 2"): interval(0., [1.])


def test_measure_and_differences():
    y = torch.arange(300) % 10
    real, good, poor = (features(random(300, 5, seed=i) * scale, y, logits=random(300, 10, seed=i)) for i, scale in ((0, 1), (1, 1), (2, 3)))
    rows, classes = measure(real, good)
    assert set(rows) == set(ROWS) - {"CAS"} and rows["cw_recall"] == classes["average"]["recall"]
    a, b = (measure_halves(real, fake, 3, 1, 8, 0) for fake in (good, poor))
    difference = estimate(b, "precision", a)
    assert difference["value"] == b.rows["precision"] - a.rows["precision"] and difference["high"] < 0
    assert estimate(a, "FID", a) == {"value": 0, "low": 0, "high": 0}
    table = class_differences(b, a)
    assert np.mean(table["density"]["value"]) == pytest.approx(b.rows["cw_density"] - a.rows["cw_density"])
    assert all(low <= value <= high for row in table.values() for low, value, high in zip(row["low"], row["value"], row["high"]))
    assert all(0 <= row["share"]["low"] <= row["share"]["value"] <= row["share"]["high"] <= 1 for row in table.values())
    few = measure_halves(real.take(torch.arange(40)), good.take(torch.arange(30)), 3, 1, 2, 0, by_class=False)
    assert estimate(few, "cw_recall") is None and math.isfinite(estimate(few, "FID")["value"])


def test_equal_classes_count_half_and_keep_their_order():
    def of(values): return {"classes": [3, 5, 7, 9], **dict.fromkeys(("precision", "recall", "density", "coverage"), values)}
    def measured(whole, *halves): return Measured({}, of(whole), [], [of(values) for values in halves])
    found, base = measured([0.5, 0.75, 0.25, 0.5], *4 * [[1., 1., 0., 0.], [1., 0., 0., 0.]]), measured([0.5, 0.25, 0.75, 0.5], *4 * [[1., 0., 1., 0.], [0., 0., 0., 0.]])
    for row in class_differences(found, base).values():
        assert row["classes"] == [7, 3, 9, 5] and row["value"] == [-0.5, 0., 0., 0.5]
        low, high = interval(0.5, 4 * [0.5, 0.625])  # (½ + 1 + 0 + ½)/4 and (1 + ½ + ½ + ½)/4
        assert 0 < low and high < 1 and row["share"] == {"value": 0.5, "low": pytest.approx(low), "high": pytest.approx(high)}


def test_names_and_claims():
    assert row_titles("Inception-v3 (FID)", "Inception-v3 (FID)")["FID"] == "FID" and row_titles("Inception-v3 (FID)", "Inception-v3 (FID)")["IS"] == "IS"
    other = row_titles("pixels", "digits classifier")
    assert other["FID"] == "Fréchet distance, pixels" and other["IS"] == "Inception-like score, digits classifier" and other["cw_recall"] == "(CW) Recall"
    assert list(other) == list(ROWS) and len(CLAIMS) == 14
    claim = next(c for c in CLAIMS if c.row == "FID" and c.method == "dlsm")
    printed = {"FID": [4., 12., 2.], "CAS": [0.4, 0.5, 0.6]}
    against = {c.text: check_claim(c, None, printed)["paper"] for c in CLAIMS if c.other == "scaling"}
    assert against == {"against scaling too, DLSM has the lower FID": -10, "against scaling too, DLSM has the higher CAS": pytest.approx(0.1)}
    fair = check_claim(FAIR, {"value": -1., "low": -2., "high": -0.1}, printed)
    assert fair["outcome"] == "holds" and fair["paper"] is None and not fair["of_paper"]  # the paper has one α for each
    assert check_claim(claim, {"value": -1., "low": -2., "high": -0.1})["outcome"] == "holds"
    assert check_claim(claim, {"value": -1., "low": -2., "high": 0.1})["why"].startswith("the interval contains 0: the sign is as claimed")
    against = check_claim(claim, {"value": 1., "low": 0.5, "high": 2.})
    assert against["outcome"] == "the opposite holds" and against["why"] == "the whole interval has the opposite sign"
    assert check_claim(claim, {"value": -1., "low": -2., "high": 0.})["outcome"] == "undecided" and check_claim(claim, None)["outcome"] == "not measured"


@pytest.mark.parametrize("m, columns", [(1, 999), (8, 5003), (40, 12_800), (3, 2)])
def test_the_largest_of_each_row_are_found_by_blocks(m, columns):
    "In any block, in the columns left over at the end, and with equal numbers among them."
    generator, m = torch.Generator().manual_seed(0), min(m, columns)
    t = torch.randn(30, columns, generator=generator)
    t[:10] = t[:10].round()
    t[10] = torch.arange(columns)
    value, index = neighbours._largest(t, m)
    assert torch.equal(value, t.topk(m).values) and torch.equal(t.gather(1, index), value)
    assert all(len(set(row)) == m for row in index.tolist())


def test_more_points_than_a_few_blocks_give_what_prdc_gives():
    from prdc import compute_prdc
    real, fake = torch.randn(2, 4_000, 8, generator=torch.Generator().manual_seed(0)).unbind()
    theirs, ours = compute_prdc(real.numpy(), fake.numpy(), 5), prdc(real, fake, 5)
    assert all(abs(ours[name] - float(theirs[name])) < 1e-9 for name in theirs)


@pytest.mark.parametrize("d", [1, 64, 2048])
@pytest.mark.parametrize("size", [1e-3, 1.])
def test_the_product_is_within_its_bound(d, size):
    "The bound of every pair is below its distance, and less than 2c(‖a‖² + ‖b‖²) below it, for points near the centre too."
    generator = torch.Generator().manual_seed(0)
    a, b = neighbours._clouds(size * torch.randn(40, d, generator=generator).exp(), torch.randn(50, d, generator=generator).exp())
    ((_, base, t),) = neighbours._tiles(a, b, torch.arange(40))
    bound, exact = base[:, None] - t.double(), (torch.cdist(a.points.double(), b.points.double()) / a.scale).square()
    assert (bound <= exact).all() and (exact - bound < 2 * neighbours._slack(a) * (a.norm[:, None] + b.norm)).all()


def test_numpy_arrays_and_one_metric_by_name():
    real, fake = np.random.default_rng(0).normal(size=(2, 50, 4))
    tensors = torch.from_numpy(real), torch.from_numpy(fake)
    assert prdc(real, fake, 3) == prdc(*tensors, 3) and prdc(real, fake, 3, only="recall") == {"recall": prdc(*tensors, 3)["recall"]}
    with pytest.warns(UserWarning, match="biased upwards"): assert fid(real, fake) == fid(*tensors) == fid(moments(real), moments(fake))
    for images, says in ((torch.zeros(9, 3, 4, 4), "expected .N, D."), (torch.zeros(0, 4), "0 images: a covariance needs at least 2")):
        with pytest.raises(ValueError, match=says): moments(images)


def test_a_best_alpha_at_an_end_of_the_range_decides_nothing():
    for value, word in ((2., "the opposite holds"), (-2., "holds")):
        difference = {"value": value, "low": value - 1, "high": value + 1}
        told, open_end = check_claim(FAIR, difference), check_claim(FAIR, difference, open_end=True)
        assert told["outcome"] == word and open_end["outcome"] == OPEN and "may lie beyond" in open_end["why"]


def test_claims_that_these_images_cannot_test():
    "Too far from the data, or at the floor; a value that may rise from there, or fall to it, can be tested."
    higher, lower = (next(c for c in CLAIMS if (c.row, c.sign, c.method) == key) for key in (("cw_recall", 1, "dlsm"), ("recall", -1, "scaling")))
    small = {"value": 0., "low": -0.01, "high": 0.01}
    for claim, values, covered, word in ((higher, {"base": 0.5, "dlsm": 0.6}, 0.17, "17.0% coverage (real images: 90.0%)"), (FAIR, {"base": 9., "dlsm": 8.}, 0.17, "too far"),
                                         (FAIR, {"base": 0., "dlsm": 0.}, 0.5, ""),
                                         (lower, {"base": 0.005, "scaling": 0.5}, 0.5, "floor"), (lower, {"base": 0.5, "scaling": 0.005}, 0.5, ""),
                                         (higher, {"base": 0., "dlsm": 0.}, 0.5, "floor"), (higher, {"base": 0., "dlsm": 0.5}, 0.5, "")):
        why = not_testable(claim, small, values, far_from_data({"coverage": (covered, 0.9), "recall": (0.6, 0.7)}))
        assert (word in why if word else not why), (claim, why)
        told = check_claim(claim, small | {"low": 0.001} | ({"high": -0.001, "low": -0.01} if claim.sign < 0 else {}), open_end=claim is FAIR, untestable=why)
        assert told["outcome"] == (NOT_TESTABLE if word else OPEN if claim is FAIR else "holds") and (not word or told["why"] == why)
    wide = {"value": -0.2, "low": -0.9, "high": 0.5}  # two trainings: undecided, but by no floor
    assert not not_testable(lower, wide, {"base": 0.6, "scaling": 0.4}) and not not_testable(higher, wide, {"base": 0.7, "dlsm": 0.5})
    assert not not_testable(lower, {"value": 0.3, "low": 0.28, "high": 0.32}, {"base": 0.005, "scaling": 0.31})  # that is seen
    assert check_claim(higher, None, untestable="far")["outcome"] == "not measured" and not not_testable(higher, None, {})
    blurs = far_from_data({"coverage": (0.3, 0.88), "recall": (0.015, 0.73)})  # a small part of the data, well covered
    assert "1.5% recall (real images: 73.0%)" in blurs and "coverage" not in blurs and not_testable(higher, wide, {"base": 0.7, "dlsm": 0.5}, blurs) == blurs
