"""Sample sets: balanced, the same whoever draws them and wherever a run was interrupted, and what is refused."""
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlsm.checkpoints import fingerprint
from dlsm.files import sha256
from dlsm.image_presets import IMAGES
from dlsm.images import classifier_net, score_net
from dlsm.networks import seeded
from dlsm.runs import ParameterError
from dlsm.samples import draw, evaluations, load_networks, load_samples, main, make_samples, sample_dir
from dlsm.sampling_presets import SAMPLING

SMOKE = IMAGES["digits"]["smoke"]
IMAGE = dataclasses.replace(SMOKE, score=dataclasses.replace(SMOKE.score, nf=4, ch_mult=(1, 1)), classifier=dataclasses.replace(SMOKE.classifier, width=4))
SETTINGS = dataclasses.replace(SAMPLING["digits"]["smoke"], n_per_class=7, shard=16, sampler="heun-4")
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["dlsm.samples"])


@pytest.fixture(autouse=True)
def runs(monkeypatch, tmp_path):
    "A root of its own for runs/."
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    return tmp_path


def networks(): return tuple(seeded(lambda net=net: net(IMAGE), 0).eval().requires_grad_(False) for net in (score_net, classifier_net))


def made(**more):
    "Draw a set in this process and load it."
    settings = more.pop("settings", SETTINGS)
    for _ in make_samples(IMAGE, settings, "base", *networks(), **more): pass
    return load_samples(sample_dir("digits", "smoke", "base", more.get("seed", 0), more.get("sampler") or settings.sampler, more.get("alpha")))


def test_a_set_is_balanced_and_says_what_it_is(runs):
    found, nets = made(alpha=2.5), networks()
    assert found.x.shape == (70, 1, 8, 8) and found.x.dtype == torch.uint8 and found.y.tolist() == [i % 10 for i in range(70)]
    expected = {"dataset": "digits", "preset": "smoke", "method": "base", "alpha": 2.5, "sampler": "heun-4", "nfe": 7, "seed": 0, "n_per_class": 7, "shard": 16,
                "histogram": [7] * 10, "checkpoints": {"score": fingerprint(nets[0]), "classifier": fingerprint(nets[1])}}
    assert {k: found.meta[k] for k in expected} == expected
    folder = sample_dir("digits", "smoke", "base", 0, "heun-4", 2.5)
    notes = [json.loads(path.read_text()) for path in sorted(folder.glob("shard-*.json"))]
    assert [sum(note["histogram"]) for note in notes] == [16, 16, 16, 16, 6] and notes[0]["histogram"] == [2] * 6 + [1] * 4
    assert not list(folder.glob(".part-*")) and len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one file may read all


def test_a_small_set_is_the_beginning_of_a_large_one():
    small, large = made(n_per_class=2), made(seed=0, sampler="heun-4", alpha=1.)
    assert (small.x.int() - large.x[:20].int()).abs().max() <= 1  # the last shard of the small one is a batch of another size


def test_lost_and_damaged_shards_are_drawn_again():
    before, folder = made(), sample_dir("digits", "smoke", "base", sampler="heun-4")
    shards = sorted(folder.glob("shard-*.safetensors"))
    times = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:-7])
    with pytest.raises(ValueError, match="has 2 of 5 shards missing or damaged .the first is shard-00001.safetensors"): load_samples(folder)
    after = made()
    assert torch.equal(after.x, before.x)
    assert [a == b for a, b in zip(times, [path.stat().st_mtime_ns for path in shards])] == [True, False, True, False, True]


def copied(source, target):
    "Put a shard and its note in the place of another."
    for suffix in (".safetensors", ".json"): target.with_suffix(suffix).write_bytes(source.with_suffix(suffix).read_bytes())


def test_a_shard_in_the_place_of_another_is_drawn_again():
    "Of other numbers, or of another set; its own checksum is right."
    before, other, folder = made(), made(seed=1), sample_dir("digits", "smoke", "base", sampler="heun-4")
    shards = sorted(folder.glob("shard-*.safetensors"))
    copied(shards[0], shards[1])
    copied(sample_dir("digits", "smoke", "base", 1, "heun-4")/shards[2].name, shards[2])
    assert not torch.equal(before.x, other.x)
    with pytest.raises(ValueError, match="has 2 of 5 shards missing or damaged .the first is shard-00001.safetensors"): load_samples(folder)
    assert torch.equal(made().x, before.x)


def test_images_of_other_numbers_are_refused():
    "Where the note says what it should, and the labels are balanced."
    made()
    folder = sample_dir("digits", "smoke", "base", sampler="heun-4")
    path = folder/"shard-00000.safetensors"
    save_file(load_file(path) | {"index": torch.arange(10, 26)}, path)
    note = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(note | {"sha256": sha256(path)}))
    with pytest.raises(ValueError, match="has images of other numbers than 0 … 69; remove that folder"): load_samples(folder)


def test_sets_from_before_shards_had_a_digest_are_loaded():
    before, folder = made(), sample_dir("digits", "smoke", "base", sampler="heun-4")
    for path in folder.glob("shard-*.json"):
        note = json.loads(path.read_text())
        assert len(note.pop("set")) == 16
        path.write_text(json.dumps(note))
    times = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert torch.equal(load_samples(folder).x, before.x)
    assert torch.equal(made(given={"score": {"file": "a"}}).x, before.x)  # files that are named later change set.json, not the set
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())][1:] == times[1:] and load_samples(folder).meta["given"]


@pytest.mark.parametrize("content", ["{}", "null", "[1]", "{", '{"sha256": "x"}'])
def test_broken_notes_are_damage_and_a_broken_set_is_told(content):
    before, folder = made(), sample_dir("digits", "smoke", "base", sampler="heun-4")
    (folder/"shard-00002.json").write_text(content)
    with pytest.raises(ValueError, match="has 1 of 5 shards missing or damaged .the first is shard-00002.safetensors"): load_samples(folder)
    assert torch.equal(made().x, before.x)
    (folder/"set.json").write_text(content)
    for call in (made, lambda: load_samples(folder)):
        with pytest.raises(ValueError, match="set.json is damaged .*: remove that folder and draw the set again") as e: call()
        assert "\n" not in str(e.value)


def work(environment):
    "Draw this process's part."
    os.environ.update(environment)
    torch.set_num_threads(1)
    for _ in make_samples(IMAGE, SETTINGS, "base", *networks()): time.sleep(float(environment.get("PAUSE", 0)))


def start(**environment):
    process = START.Process(target=work, args=({"DLSM_ROOT": os.environ["DLSM_ROOT"]} | environment,))
    process.start()
    return process


def test_two_processes_share_a_set(monkeypatch, tmp_path):
    alone = made()
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path/"two"))
    (tmp_path/"two").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pair = [start(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true") for i in (0, 1)]
    for process in pair: process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]
    assert torch.equal(load_samples(sample_dir("digits", "smoke", "base", sampler="heun-4")).x, alone.x)


def test_a_killed_run_goes_on(monkeypatch, tmp_path):
    alone = made()
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path/"killed"))
    (tmp_path/"killed").mkdir()
    folder, process = sample_dir("digits", "smoke", "base", sampler="heun-4"), start(PAUSE="30")
    deadline = time.monotonic() + 60
    while not list(folder.glob("shard-*.json")) and time.monotonic() < deadline: time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert len(list(folder.glob("shard-*.json"))) == 1
    assert torch.equal(made().x, alone.x)


def test_norms_as_published_belong_to_the_shard():
    published = dataclasses.replace(SETTINGS, per_image=False, sampler="pc-5")
    with pytest.raises(ValueError, match="norms are averaged over a shard of 16 images, draw them together"): made(settings=published, batch=8)
    assert made(settings=published).meta["per_image"] is False and evaluations("pc-5") == 10
    assert SAMPLING["cifar10"]["paper"].per_image is False and SAMPLING["digits"]["demo"].per_image is True


@pytest.mark.parametrize("sampler", ["pc-40", "heun-18", "2m-18"])
def test_a_batch_of_any_size_gives_the_same_images(sampler):
    "To 1e-4, by networks without jumps in their gradients."
    score, index = networks()[0], torch.arange(24)
    whole = draw(score, index, IMAGE, SETTINGS, sampler)
    parts = torch.cat([draw(score, part, IMAGE, SETTINGS, sampler) for part in index.split(5)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="shard-00000 .method base, α = 1e.30, heun-4.: 16 of 16 items are not finite .*; nothing was written"): made(alpha=1e30)
    assert not list(sample_dir("digits", "smoke", "base", 0, "heun-4", 1e30).glob("shard-*"))


@pytest.mark.parametrize(("given", "told"), [
    ({"n_per_class": -1}, "n_per_class=-1; expected a number ≥ 1, or None for the preset's"), ({"n_per_class": 0}, "n_per_class=0"),
    ({"batch": -1}, "batch=-1; expected a number ≥ 1, or None for the shard's"), ({"seed": 2**63}, "seed=9223372036854775808; expected a number of 64 bits"),
])
def test_numbers_that_make_no_set_are_refused_before_anything_is_written(given, told, runs):
    with pytest.raises(ValueError, match=told): made(**given)
    assert not list(runs.iterdir())


def test_another_set_in_the_folder_is_refused():
    made()
    with pytest.raises(ValueError, match="is another set: n_per_class=7 there and 8 here"): made(n_per_class=8)
    score, classifier = networks()
    other = seeded(lambda: classifier_net(IMAGE), 1).eval().requires_grad_(False)
    with pytest.raises(ValueError, match="is another set: checkpoints="): next(make_samples(IMAGE, SETTINGS, "base", score, other))


def test_checkpoints_of_another_data_set_are_refused():
    score, classifier = networks()
    for image, line in ((dataclasses.replace(IMAGE, channels=3), "a checkpoint is of another data set: it does not take images of digits, .3, 8, 8."),
                        (dataclasses.replace(IMAGE, n_classes=100), "the classifier is of another data set: it knows 10 classes, and digits has 100")):
        with pytest.raises(ValueError, match=line) as e: next(make_samples(image, SETTINGS, "base", score, classifier))
        assert "\n" not in str(e.value)
    assert not sample_dir("digits", "smoke", "base", sampler="heun-4").exists()


def test_missing_stages_say_which_notebook_to_run(runs):
    with pytest.raises(FileNotFoundError, match="runs/digits/demo/samples/dlsm-2m-18-0 is missing: run `papermill nbs/06_sampling.ipynb .* -p preset demo` first"):
        load_samples(sample_dir("digits", "demo", "dlsm"))
    for folder in ("nowhere", "a/b/c/d"):
        with pytest.raises(FileNotFoundError, match=f"{folder} is missing: run `papermill nbs/06_sampling.ipynb out.ipynb -k python3` first"): load_samples(folder)
    with pytest.raises(FileNotFoundError, match="score-0 of digits, preset smoke, has not been trained: run `papermill nbs/05_cifar.ipynb"): load_networks(SMOKE)
    with pytest.raises(SystemExit, match="FileNotFoundError: score-0 of digits"): main([])


@pytest.mark.parametrize("given, line", [
    ({"dataset": "mnist"}, "dataset = 'mnist' is not known: digits, cifar10, cifar100"), ({"preset": "paper"}, "preset = 'paper' is not known: smoke, demo"),
    ({"method": "ours"}, "method = 'ours' is not known: base, scaling, dlsm"), ({"sampler": "heun-1"}, "pc-N, heun-N or 2m-N with N levels, at least 2"),
    ({"sampler": "euler-9"}, "sampler = 'euler-9' is not known")])
def test_names_that_do_not_exist(given, line):
    with pytest.raises(ParameterError) as e: sample_dir(**{"dataset": "digits", "preset": "demo", "method": "base"} | given)
    assert line in str(e.value)


def test_published_checkpoints_are_loaded_where_a_path_is_given(monkeypatch):
    score, classifier = networks()
    stub = types.ModuleType("dlsm.official")
    asked = []
    stub.load_score = lambda path, dataset: asked.append((path, dataset)) or score
    stub.load_classifier = lambda path, dataset: asked.append((path, dataset)) or classifier
    monkeypatch.setitem(sys.modules, "dlsm.official", stub)
    monkeypatch.setattr("dlsm.official", stub, raising=False)
    found, nets = load_networks(SMOKE, 0, "cpu", "s.pth", "ce.pth", "total.pth")
    assert found is score and asked == [("s.pth", "digits"), ("ce.pth", "digits"), ("total.pth", "digits")] and {*nets} == {"base", "scaling", "dlsm"}


def test_the_command_line_draws_a_set(capsys, untrained):
    untrained()
    main(["--method", "scaling", "--n-per-class", "2", "--sampler", "2m-3", "--device", "cpu"])
    assert capsys.readouterr().out.strip().endswith("scaling-2m-3-0/shard-00000.safetensors")
    assert load_samples(sample_dir("digits", "smoke", "scaling", sampler="2m-3")).meta["alpha"] == 10.
