"""Weights kept in the repository: written from a finished run, rounded, found in a clean root, and refused where they do not belong."""
import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from dlsm import registry
from dlsm.checkpoints import fingerprint
from dlsm.data import image_data
from dlsm.files import sha256
from dlsm.image_presets import IMAGES
from dlsm.images import LOSSES
from dlsm.kept import kept_index
from dlsm.registry import keep_weights, main
from dlsm.samples import load_networks, load_samples, make_samples, sample_dir
from dlsm.sampling_presets import SAMPLING
from dlsm.stages import fit_classifier, fit_score, load_classifier, load_score

SMOKE = IMAGES["digits"]["smoke"]  # its networks, trained for seconds
SMOKE = dataclasses.replace(
    SMOKE, checkpoint_every=15, score=dataclasses.replace(SMOKE.score, steps=40, batch=32), classifier=dataclasses.replace(SMOKE.classifier, steps=20, batch=32))
NAMES = ["score-0", *(f"classifier-{loss}-0" for loss in LOSSES)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A root with a finished run of digits, preset smoke, and its kept weights; networks as trained, by name."
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("trained")
        patch.setenv("DLSM_ROOT", str(root))
        patch.setitem(IMAGES["digits"], "smoke", SMOKE)
        digits = image_data("digits")
        for _ in fit_score(SMOKE, digits): pass
        score = load_score(SMOKE)
        for loss in LOSSES:
            for _ in fit_classifier(SMOKE, digits, loss, score): pass
        main(["keep", "digits", "smoke", "--device", "cpu"])
        return root, dict(zip(NAMES, (score, *(load_classifier(SMOKE, loss, score) for loss in LOSSES))))


@pytest.fixture
def clean(trained, tmp_path, monkeypatch):
    "A root that holds nothing but a copy of the kept weights."
    shutil.copytree(trained[0]/"weights", tmp_path/"weights")
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    return tmp_path


def steps_of(name): return (SMOKE.score if name == "score-0" else SMOKE.classifier).steps


def refused(kind, text, call, *args):
    with pytest.raises(kind, match=text) as error: call(*args)
    assert "\n" not in str(error.value)


def test_a_clean_root_has_the_networks(trained, clean, capsys):
    "Scores change by less than a thousandth, logits (small after so few steps) by less than a hundredth; what was not trained does not change."
    score = load_score(SMOKE)
    found = dict(zip(NAMES, (score, *(load_classifier(SMOKE, loss, score) for loss in LOSSES))))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == NAMES and all("SHA-256" in line and "half precision" in line for line in said)
    for name, net in found.items():
        entry, before = kept_index()[f"digits/smoke/{name}.safetensors"], trained[1][name]
        assert entry["training"]["steps"] == steps_of(name) and entry["training"]["images_per_s"] > 0 and "CPU" in entry["training"]["device"]
        assert fingerprint(net) == entry["rounded"] != entry["fingerprint"] == fingerprint(before)
        change = registry.rounding_change(before, net, SMOKE)
        assert 0 < change < (1e-3 if name == "score-0" else 1e-2) and change == pytest.approx(entry["rounding_change"], rel=1e-3)
        frozen = [k for k in net.state_dict() if k.endswith("modules.0.W")]
        assert frozen and all(torch.equal(net.state_dict()[k], before.state_dict()[k]) for k in frozen)
        assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_files_say_what_they_are(trained):
    for name in NAMES:
        with safe_open(trained[0]/"weights"/"digits"/"smoke"/f"{name}.safetensors", "pt") as file:
            about = json.loads(file.metadata()["about"])
            assert {file.get_tensor(k).dtype for k in file.keys() if not k.endswith(("modules.0.W", "sigmas"))} == {torch.float16}
        assert about["config"]["steps"] == steps_of(name) and "float16" in about["precision"] and about["fingerprint"] == fingerprint(trained[1][name])
    assert about["config"]["score"] == fingerprint(trained[1]["score-0"])
    assert len({path.stat().st_mode for path in (trained[0]/"weights").rglob("*") if path.is_file()}) == 1  # whoever may read one may read all


def test_sample_sets_name_the_weights_that_were_used(clean):
    score, nets = load_networks(SMOKE)
    for _ in make_samples(SMOKE, SAMPLING["digits"]["smoke"], "dlsm", score, nets["dlsm"], sampler="2m-2", n_per_class=1): pass
    marks = load_samples(sample_dir("digits", "smoke", "dlsm", sampler="2m-2")).meta["checkpoints"]
    index = kept_index()
    assert marks == {"score": index["digits/smoke/score-0.safetensors"]["rounded"], "classifier": index["digits/smoke/classifier-total-0.safetensors"]["rounded"]}


def test_looking_for_networks_writes_nothing(clean, monkeypatch):
    "As on a disk that can only be read."
    def read_only(path, *args, **kwargs): raise OSError(30, "Read-only file system", str(path))
    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    load_networks(SMOKE)
    refused(FileNotFoundError, "score-1 of digits, preset smoke, has not been trained: run", load_score, SMOKE, 1)
    refused(FileNotFoundError, "only a finished run can be kept", keep_weights, SMOKE, 1)
    assert [p.name for p in clean.iterdir()] == ["weights"]


def test_a_training_goes_before_kept_weights(trained, clean, capsys):
    shutil.copytree(trained[0]/"runs"/"digits"/"smoke"/"score-0", clean/"runs"/"digits"/"smoke"/"score-0")
    score = load_score(SMOKE)
    assert fingerprint(score) == fingerprint(trained[1]["score-0"]) and capsys.readouterr().out == ""
    load_classifier(SMOKE, "total", score)  # the kept one was trained beside it
    shutil.rmtree(clean/"runs"/"digits"/"smoke"/"score-0"/f"step-{SMOKE.score.steps:08d}")
    refused(FileNotFoundError, "stopped at step 30 of 40: run `papermill nbs/05_cifar", load_score, SMOKE)


def test_damaged_or_missing_files_are_refused(clean):
    path = clean/"weights"/"digits"/"smoke"/"score-0.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:1000], b""):
        path.write_bytes(content)
        refused(ValueError, "score-0.safetensors is damaged: .*git checkout", load_score, SMOKE)
    path.unlink()
    refused(ValueError, "score-0.safetensors is missing, .*git checkout", load_score, SMOKE)


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "3", '{"digits/smoke/score-0.safetensors": null}', '{"digits/smoke/score-0.safetensors": {}}'])
def test_a_damaged_index_is_refused(clean, content):
    (clean/"weights"/"index.json").write_text(content)
    refused(ValueError, "weights/index.json is damaged .*git checkout -- weights/index.json", load_score, SMOKE)


def test_other_configurations_are_passed_over_with_the_reason(clean):
    other = dataclasses.replace(SMOKE, score=dataclasses.replace(SMOKE.score, lr=1.))
    text = r"has not been trained \(weights/digits/smoke/score-0.* is of another configuration: lr=0.002 there and 1.0 here\): run `papermill"
    refused(FileNotFoundError, text, load_score, other)
    refused(FileNotFoundError, "score-1 of digits, preset smoke, has not been trained: run", load_score, SMOKE, 1)
    stranger = load_score(SMOKE)
    with torch.no_grad(): next(p for n, p in stranger.named_parameters() if not n.endswith("modules.0.W")).add_(1)
    refused(FileNotFoundError, r"classifier-total-0 .* another configuration: score='", load_classifier, SMOKE, "total", stranger)
    load_classifier(SMOKE, "ce", stranger)  # cross-entropy needs no score model


def test_only_finished_runs_are_kept(trained, clean, monkeypatch):
    monkeypatch.setitem(IMAGES["digits"], "smoke", SMOKE)
    shutil.rmtree(clean/"weights")
    shutil.copytree(trained[0]/"runs", clean/"runs")
    last = clean/"runs"/"digits"/"smoke"/"classifier-total-0"/f"step-{SMOKE.classifier.steps:08d}"
    shutil.rmtree(last)
    refused(FileNotFoundError, "classifier-total-0 .* stopped at step 15 of 20", keep_weights, SMOKE)
    shutil.rmtree(last.parent)
    refused(FileNotFoundError, "classifier-total-0 .* has not been trained: only a finished run", keep_weights, SMOKE)
    with pytest.raises(SystemExit, match="FileNotFoundError: classifier-total-0"): main(["keep", "digits", "smoke"])
    with pytest.raises(SystemExit, match="no preset 'cpu' of 'digits'"): main(["keep", "digits", "cpu"])
    assert not (clean/"weights").exists()


def test_a_run_goes_on_elsewhere_from_what_was_finished(trained, tmp_path, monkeypatch):
    "The score model is kept, a classifier trained beside it in another place and kept too: a third place, and the first, find both."
    first, second, third = (tmp_path/name for name in ("first", "second", "third"))
    shutil.copytree(trained[0]/"runs"/"digits"/"smoke"/"score-0", first/"runs"/"digits"/"smoke"/"score-0")
    monkeypatch.setenv("DLSM_ROOT", str(first))
    monkeypatch.setitem(IMAGES["digits"], "smoke", SMOKE)
    refused(FileNotFoundError, "classifier-ce-0 .* only a finished run", keep_weights, SMOKE)
    main(["keep", "digits", "smoke", "--device", "cpu", "--partial"])
    shutil.copytree(first/"weights", second/"weights")
    monkeypatch.setenv("DLSM_ROOT", str(second))
    score = load_score(SMOKE)
    for _ in fit_classifier(SMOKE, image_data("digits"), "total", score): pass
    assert list(keep_weights(SMOKE, partial=True)) == ["digits/smoke/classifier-total-0.safetensors"]
    shutil.copytree(second/"weights", third/"weights")
    monkeypatch.setenv("DLSM_ROOT", str(third))
    assert fingerprint(load_score(SMOKE)) == fingerprint(score)
    load_classifier(SMOKE, "total", load_score(SMOKE))
    refused(FileNotFoundError, "no training of digits, preset smoke, is finished", lambda: keep_weights(SMOKE, partial=True))
    shutil.copytree(second/"weights", first/"weights", dirs_exist_ok=True)
    monkeypatch.setenv("DLSM_ROOT", str(first))
    assert fingerprint(load_score(SMOKE)) != fingerprint(score)  # as trained
    load_classifier(SMOKE, "total", load_score(SMOKE))


def test_what_is_finished_is_kept_whatever_the_others_are(trained, clean):
    shutil.rmtree(clean/"weights")
    shutil.copytree(trained[0]/"runs", clean/"runs")
    newest = clean/"runs"/"digits"/"smoke"/f"classifier-dlsm_prime-0/step-{SMOKE.classifier.steps:08d}"
    (newest/"state.pt").write_bytes(b"damaged")
    shutil.rmtree(clean/"runs"/"digits"/"smoke"/"classifier-total-0")
    with pytest.warns(UserWarning, match="is damaged"): kept = keep_weights(SMOKE, partial=True)
    assert list(kept) == [f"digits/smoke/{name}.safetensors" for name in ("score-0", "classifier-ce-0")]
    shutil.rmtree(clean/"runs"/"digits"/"smoke"/"score-0")
    shutil.rmtree(clean/"weights")
    assert list(keep_weights(SMOKE, partial=True)) == ["digits/smoke/classifier-ce-0.safetensors"]  # cross-entropy needs no score model


def test_kept_weights_are_not_kept_again(clean):
    "Rounded weights would pass for those of a training."
    refused(FileNotFoundError, "score-0 of digits, preset smoke, has not been trained: only", keep_weights, SMOKE)


def test_keeping_twice_writes_the_same_bytes(trained, monkeypatch):
    monkeypatch.setenv("DLSM_ROOT", str(trained[0]))
    before = {p: p.read_bytes() for p in (trained[0]/"weights").rglob("*") if p.is_file()}
    keep_weights(SMOKE)
    assert len(before) == 5 and before == {p: p.read_bytes() for p in (trained[0]/"weights").rglob("*") if p.is_file()}


def test_weights_that_were_trained_elsewhere_say_where(trained, tmp_path, monkeypatch):
    "The card that trained them may be gone by the time they are kept."
    shutil.copytree(trained[0]/"runs", tmp_path/"runs")
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    kept = keep_weights(SMOKE, device="NVIDIA H100 80GB HBM3")
    assert len(kept) == 4 and {entry["training"]["device"] for entry in kept.values()} == {"NVIDIA H100 80GB HBM3"}
    with pytest.raises(ValueError, match="device = 'cuda:99' is not on this machine"): keep_weights(SMOKE, device="cuda:99")
    with pytest.raises(ValueError, match="device = 'gpu' is no device of PyTorch, and no machine's name"): keep_weights(SMOKE, device="gpu")


def test_command_line(tmp_path, root):
    done = subprocess.run([sys.executable, "-m", "dlsm.registry", "keep", "digits", "smoke"], cwd=root, capture_output=True, text=True,
                          env={"DLSM_ROOT": str(tmp_path), "PYTHONPATH": str(root), "PATH": ""})
    assert done.returncode == 1 and done.stderr.startswith("FileNotFoundError: score-0") and done.stderr.count("\n") == 1


def test_the_committed_weights_are_whole(root, tmp_path, monkeypatch):
    "Each file of the repository's weights/ is in the index, loads where nothing was trained, and belongs to its preset."
    shutil.copytree(root/"weights", tmp_path/"weights")
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    index, scores = kept_index(), {}
    assert set(index) == {p.relative_to(tmp_path/"weights").as_posix() for p in tmp_path.glob("weights/**/*.safetensors")}
    for name in sorted(index, key=lambda name: "/score-" not in name):  # a classifier needs the score model that it was trained with
        entry, (dataset, preset, file) = index[name], name.split("/")
        settings, (kind, *loss, seed) = IMAGES[dataset][preset], file.removesuffix(".safetensors").split("-")
        assert sha256(tmp_path/"weights"/name) == entry["sha256"] and (tmp_path/"weights"/name).stat().st_size == entry["size"]
        if kind == "score": net = scores[dataset, preset, seed] = load_score(settings, int(seed))
        else: net = load_classifier(settings, *loss, scores[dataset, preset, seed], int(seed))
        assert fingerprint(net) == entry["rounded"] and entry["rounding_change"] < 1e-2, name
    assert not list(tmp_path.glob("runs/**/step-*"))
