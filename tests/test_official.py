"""The authors' checkpoints: files of the published layout, built by hand, give the reference outputs; what is wrong is told in one line."""
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from parity import PARITY, bar_in_float32, case, fill, published_names, relative_error
from torch import nn

from dlsm import registry
from dlsm.files import sha256
from dlsm.ncsnpp import NCSNpp
from dlsm.official import load_classifier, load_score, save_official, save_safetensors
from dlsm.precond import EDMPrecond
from dlsm.registry import advice, checkpoint, known, verify
from dlsm.resnet import SigmaResNet
from dlsm.runs import need

FREQUENCIES = ("all_modules.0.W", "classifier.condition_modules.0.W")
DATASET = {"ncsnpp_small": "cifar10", "ncsnpp_cifar": "cifar10", "resnet18": "cifar10", "resnet34": "cifar100"}


def layout(name):
    """What the authors' code saves for one of the four networks, built from the published names alone.

    Of a score model the averaged weights are those of the rule; the others are zero, so that it shows which ones are used."""
    tensors, score = fill(PARITY[name][0]()).state_dict(), name.startswith("ncsnpp")
    names = list(published_names(name))
    buffers = ("sigmas", "running_mean", "running_var", "num_batches_tracked")
    parameters = [n for n in names if not n.endswith(buffers)]
    trained = [n for n in parameters if n not in FREQUENCIES]
    moments = {parameters.index(n): {"step": 7, **{m: torch.zeros_like(tensors[n]) for m in ("exp_avg", "exp_avg_sq")}} for n in trained}
    optimizer = {"state": moments, "param_groups": [{"lr": np.float64(2e-4), "betas": (0.9, 0.999), "params": list(range(len(parameters)))}]}
    model = {f"module.{n}": torch.zeros_like(tensors[n]) if score and n in trained else tensors[n] for n in names}
    ema = {"ema": {"decay": 0.999, "num_updates": 7, "shadow_params": [tensors[n] for n in trained]}} if score else {}
    return {"optimizer": optimizer, "model": model, "step": 7} | ema


def load(path, name, dataset=None):
    if name.startswith("ncsnpp"): return load_score(path, dataset or DATASET[name], PARITY[name][0])
    return load_classifier(path, dataset or DATASET[name])


@pytest.fixture(scope="module")
def small(): return layout("ncsnpp_small")


@pytest.fixture
def saved(small, tmp_path):
    "The small score model's file."
    torch.save(small, tmp_path/"checkpoint.pth")
    return tmp_path/"checkpoint.pth"


def repack(path, old, new):
    "Change bytes of the pickle in a file of `torch.save`."
    with zipfile.ZipFile(path) as archive: content = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in content if name.endswith("data.pkl"))
    assert old in content[name]
    content[name] = content[name].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items(): archive.writestr(name, data)


def same(a, b):
    "Whether two files hold the same, bit for bit."
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- what the files mean

@pytest.mark.parametrize("name", ["ncsnpp_small", "resnet18", "resnet34"])
def test_published_files_give_the_reference_outputs(name, tmp_path):
    torch.save(layout(name), tmp_path/"checkpoint.pth")
    net, (x, sigma, out) = load(tmp_path/"checkpoint.pth", name), case(name)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert relative_error(net(x, sigma), out) < bar_in_float32(name)
    assert relative_error(net.double()(x.double(), sigma.double()), out) < PARITY[name][-1]


LOAD = """
import json, sys, time
from pathlib import Path
import torch
from dlsm.official import load_score
from parity import case, relative_error
def peak(): return next(int(line.split()[1])*1024/1e9 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
found = {"imports_gb": peak()}
began = time.monotonic()
net = load_score(sys.argv[1], "cifar10")
found |= {"load_s": time.monotonic() - began, "load_gb": peak()}
sum(p.sum() for p in net.parameters())
found |= {"read_s": time.monotonic() - began, "read_gb": peak(), "parameters": sum(p.numel() for p in net.parameters())}
x, sigma, out = case("ncsnpp_cifar")
print(json.dumps(found | {"error": relative_error(net(x, sigma), out)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc (ru_maxrss begins with the parent's)")
def test_the_papers_score_model_loads_fast_and_small(root, tmp_path):
    "From a file of the published size, in a process of its own: at most 10 s and 0.9 GB with PyTorch in it; averaged weights cost memory once, the rest of the file none."
    try:
        torch.save(layout("ncsnpp_cifar"), tmp_path/"checkpoint.pth")
        assert (tmp_path/"checkpoint.pth").stat().st_size > 4*4*107_587_075
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root/"tests")])}
        done = subprocess.run([sys.executable, "-c", LOAD, tmp_path/"checkpoint.pth"], env=env, capture_output=True, text=True)
    finally: (tmp_path/"checkpoint.pth").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["parameters"] == 107_587_075 and found["error"] < PARITY["ncsnpp_cifar"][-1]
    assert found["read_s"] < 10 and found["load_gb"] < 0.9
    assert found["read_gb"] - found["imports_gb"] < 1.2*4*107_587_075/1e9


def test_saved_on_a_gpu_by_an_older_numpy(saved, small):
    "As the published files were: tensors that name a GPU, and NumPy 1's name of its scalar."
    repack(saved, b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    repack(saved, b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    weights = load(saved, "ncsnpp_small").state_dict()
    assert weights["all_modules.1.weight"].device.type == "cpu" and torch.equal(weights["all_modules.1.weight"], small["ema"]["shadow_params"][0])


def test_numpy_is_allowed_only_while_loading(saved):
    before = torch.serialization.get_safe_globals()
    load(saved, "ncsnpp_small")
    assert set(torch.serialization.get_safe_globals()) == set(before)
    with pytest.raises(pickle.UnpicklingError, match="numpy"): torch.load(saved, weights_only=True)


def test_loading_makes_no_network_elsewhere_empty(saved):
    load(saved, "ncsnpp_small")
    with pytest.raises(ZeroDivisionError): load_score(saved, "cifar10", lambda: 1/0)
    assert {p.device.type for p in nn.Linear(2, 2).parameters()} == {"cpu"}


def test_threads_that_load_do_not_disturb_one_another(saved):
    "What another thread builds meanwhile has its weights; of two that load, neither leaves networks empty, whichever is ready first."
    build, first, second, beside = PARITY["ncsnpp_small"][0], Event(), Event(), []

    def slow():
        with ThreadPoolExecutor(1) as other: beside.append(other.submit(nn.Linear, 2, 2).result())
        first.set()
        second.wait(0.5)  # in vain, where loading takes turns
        return build()

    def fast():
        second.set()
        ready.result()
        return build()
    with ThreadPoolExecutor(2) as threads:
        ready = threads.submit(load_score, saved, "cifar10", slow)
        first.wait(60)
        nets = [threads.submit(load_score, saved, "cifar10", fast).result(60), ready.result()]
    assert all(p.device.type == "cpu" for net in (*nets, *beside, nn.Linear(2, 2)) for p in net.parameters())


# ---- writing them

@pytest.mark.parametrize("name", ["ncsnpp_small", "resnet18"])
def test_written_files_are_the_published_layout(name, tmp_path):
    "Every bit of `model`, `ema`, `step` and of the moments is what the layout built by hand has."
    expected = layout(name)
    net = PARITY[name][0]()
    net.load_state_dict({k.removeprefix("module."): v for k, v in expected["model"].items()})
    adam = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 2e-4)
    for p in adam.param_groups[0]["params"]: p.grad = torch.randn_like(p)
    for _ in range(2): adam.step()
    net.load_state_dict({k.removeprefix("module."): v for k, v in expected["model"].items()})
    path = save_official(tmp_path/"checkpoint.pth", net, fill(PARITY[name][0]()) if "ema" in expected else None, 7, adam.state_dict())
    written = torch.load(path, weights_only=True)
    assert all(same(written[key], expected[key]) for key in ("model", "step", "ema") if key in expected) and ("ema" in written) == ("ema" in expected)
    assert list(written["optimizer"]["state"]) == list(expected["optimizer"]["state"])
    assert written["optimizer"]["param_groups"][0]["params"] == expected["optimizer"]["param_groups"][0]["params"]

    original = nn.DataParallel(PARITY[name][0]())
    original.load_state_dict(written["model"])
    theirs = torch.optim.Adam(original.parameters())
    theirs.load_state_dict(written["optimizer"])
    for mine, yours in zip(net.parameters(), original.parameters()):
        assert torch.equal(mine, yours) and (mine in adam.state) == (yours in theirs.state)
        if mine in adam.state: assert all(torch.equal(adam.state[mine][k], theirs.state[yours][k]) for k in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("name", ["ncsnpp_small", "resnet18", "resnet34"])
def test_there_and_back_changes_no_bit(name, tmp_path):
    torch.save(layout(name), tmp_path/"one.pth")
    one = load(tmp_path/"one.pth", name)
    files = [save_official(tmp_path/"two.pth", one), save_safetensors(tmp_path/"three.safetensors", one, DATASET[name])]
    for path in files: assert same(dict(one.state_dict()), dict(load(path, name).state_dict()))
    assert same(torch.load(save_official(tmp_path/"four.pth", load(files[0], name)), weights_only=True), torch.load(files[0], weights_only=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["four.pth", "one.pth", "three.safetensors", "two.pth"]


def test_a_file_may_be_replaced_while_its_weights_are_in_use(saved, small):
    net = load(saved, "ncsnpp_small")
    save_official(saved, PARITY["ncsnpp_small"][0]())
    assert torch.equal(net.all_modules[1].weight, small["ema"]["shadow_params"][0])


@pytest.mark.parametrize("net, more, words", [
    (lambda: nn.Linear(2, 2), {}, "no network like this Linear"),
    (lambda: NCSNpp(nf=4, ch_mult=(1,), num_res_blocks=1, raw=True), {}, "no network like this NCSNpp"),
    (lambda: EDMPrecond(NCSNpp(nf=4, ch_mult=(1,), num_res_blocks=1, raw=True), 0.5), {}, "no network like this EDMPrecond"),
    (lambda: SigmaResNet(norm="group", width=4), {}, "batch normalisation"),
    (lambda: SigmaResNet(width=4), {"ema": SigmaResNet(width=4)}, "one set of weights"),
    (lambda: SigmaResNet(width=4), {"optimizer": torch.optim.Adam([torch.zeros(1)]).state_dict()}, "1 parameters"),
])
def test_what_the_original_code_has_not_is_not_written(net, more, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error: save_official(tmp_path/"x.pth", net(), **more)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# ---- what is refused

class Harm:
    def __reduce__(self): return os.mkdir, ("harm",)


def drop(key): return lambda s: s.pop(key)


FIRST = "module.all_modules.1.weight"
CHANGES = {  # change of the small score model's file: words of the error
    "missing tensor": (lambda s: s["model"].pop(FIRST), f"lacks tensor {FIRST}$"),
    "missing tensors": (lambda s: [s["model"].pop(k) for k in list(s["model"]) if ".1." in k], "lacks tensor .* more$"),
    "missing frequencies": (lambda s: s["model"].pop("module.all_modules.0.W"), "lacks tensor module.all_modules.0.W$"),
    "extra tensor": (lambda s: s["model"].update({"module.all_modules.99.b": torch.zeros(1)}), "has the unknown tensor module.all_modules.99.b$"),
    "misshapen tensor": (lambda s: s["model"].update({FIRST: torch.zeros(3, 3)}), rf"{FIRST} .* shape \(3, 3\) and float32; the network takes \(64, 32\) and float32"),
    "another number type": (lambda s: s["model"].update({FIRST: torch.zeros(64, 32).half()}), "float16; the network takes .* float32"),
    "no tensor": (lambda s: s["model"].update({FIRST: 3}), "more than tensors"),
    "no prefix": (lambda s: s.update(model={k.removeprefix("module."): v for k, v in s["model"].items()}), "lacks tensor module.sigmas"),
    "no average": (drop("ema"), "no moving average"),
    "average of numbers": (lambda s: s["ema"].update(shadow_params=[1.]*276), "no moving average"),
    "short average": (lambda s: s["ema"]["shadow_params"].pop(), "averages of 275 tensors; the network has 276"),
    "shifted average": (lambda s: s["ema"]["shadow_params"].insert(0, s["ema"]["shadow_params"].pop()), "the average of all_modules.1.weight"),
    "no model": (drop("model"), "no state dict named model"),
    "another network": (lambda s: s.update(model=nn.Linear(2, 2).state_dict()), "neither a score model nor a classifier"),
    "forbidden pickle": (lambda s: s.update(step=Harm()), "wants to use posix.mkdir"),
    "NumPy array": (lambda s: s.update(step=np.zeros(2)), r"wants to use .*numpy.*reconstruct"),
}


def refused(path, words, name="ncsnpp_small", dataset=None):
    with pytest.raises(ValueError, match=words) as error: load(path, name, dataset)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("change", CHANGES)
def test_refused_content(change, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = {**small, "model": dict(small["model"]), "ema": {**small["ema"], "shadow_params": list(small["ema"]["shadow_params"])}}
    CHANGES[change][0](part)
    torch.save(part, tmp_path/"checkpoint.pth")
    refused(tmp_path/"checkpoint.pth", CHANGES[change][1])
    assert not (tmp_path/"harm").exists()


def test_refused_files(saved, tmp_path):
    whole = saved.read_bytes()
    for cut in (len(whole) - 1, len(whole)//2, 100, 2, 0):
        saved.write_bytes(whole[:cut])
        refused(saved, f"truncated after {cut:,} bytes")
    for content, words in ((b"\n<!DOCTYPE html><html>", "a web page"), (bytes(1000), "not a checkpoint"), (pickle.dumps(Harm()), "not a checkpoint")):
        saved.write_bytes(content)
        refused(saved, words)
    assert not Path("harm").exists()
    for compression, words in ((zipfile.ZIP_STORED, "not a checkpoint of torch.save"), (zipfile.ZIP_DEFLATED, "packed anew")):
        with zipfile.ZipFile(saved, "w", compression) as archive: archive.writestr("a/b.txt", "text"*1000)
        refused(saved, words)
    torch.save([1, 2], saved)
    refused(saved, "no state dict named model")
    with pytest.raises(FileNotFoundError, match="is missing: nbs/18_official.ipynb"): load_score(tmp_path/"nothing.pth", "cifar10")
    with pytest.raises(ValueError, match="dataset='digits': expected one of cifar10, cifar100"): load_score(saved, "digits")
    with pytest.raises(ValueError, match="dataset='digits': expected one of cifar10, cifar100"): load_classifier(saved, "digits")


def test_refused_networks(saved, tmp_path):
    "The other kind, and the other data set."
    torch.save(layout("resnet18"), tmp_path/"18.pth")
    torch.save(layout("resnet34"), tmp_path/"34.pth")
    refused(saved, "is a score model: here a classifier is needed", "resnet18")
    refused(tmp_path/"18.pth", "is a classifier: here a score model is needed")
    refused(tmp_path/"18.pth", "is a ResNet-18 for 10 classes: cifar100 needs a ResNet-34 for 100 classes", "resnet34")
    refused(tmp_path/"34.pth", "is a ResNet-34 for 100 classes: cifar10 needs a ResNet-18 for 10 classes", "resnet18")
    torch.save(layout("resnet18") | {"ema": {"decay": 0.999, "num_updates": 1, "shadow_params": []}}, tmp_path/"two.pth")
    refused(tmp_path/"two.pth", "two sets of weights", "resnet18")


def test_refused_conversions(saved, tmp_path):
    path = save_safetensors(tmp_path/"score.safetensors", load(saved, "ncsnpp_small"), "cifar10")
    refused(path, "is for cifar10: here one for cifar100 is needed", dataset="cifar100")
    refused(path, "is a score model: here a classifier is needed", "resnet18")
    whole = path.read_bytes()
    for cut in (len(whole) - 1, 100, 0):
        path.write_bytes(whole[:cut])
        refused(path, "truncated or no safetensors file")
    save_safetensors(path, NCSNpp(nf=8, num_res_blocks=1), "cifar10")
    refused(path, r"has shape \(8,\) and float32; the network takes \(16,\) and float32")


# ---- the list of checkpoints

def test_known_checkpoints():
    entries = registry.CHECKPOINTS
    assert len({e.name for e in entries}) == len(entries) >= 6
    for e in entries:
        assert e.kind in ("score", "classifier") and e.dataset in ("cifar10", "cifar100") and (e.kind == "score") == (e.loss == "dsm")
        assert e.url.startswith("https://") and e.source.startswith("https://") and e.licence
        assert e.size is None or e.size > 0
        assert e.sha256 is None or len(e.sha256) == 64
        assert checkpoint(e.name) == e == known(Path("anywhere")/e.file) == known(f"anywhere/{e.name}.safetensors")
        with pytest.raises(dataclasses.FrozenInstanceError): e.size = 1
    with pytest.raises(ValueError, match="'ours'; there are authors-cifar10-score, ") as error: checkpoint("ours")
    assert "\n" not in str(error.value)
    assert known("checkpoint.pth") is None and advice("runs/prior.pt") is None


def test_missing_checkpoints_are_told_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    path = tmp_path/"downloads/Cifar100/base/checkpoint.pth"
    with pytest.raises(FileNotFoundError) as e: need(path, "05_cifar")
    assert str(e.value).startswith("downloads/Cifar100/base/checkpoint.pth is missing: authors-cifar100-base is published at https://github.com/")
    with pytest.raises(FileNotFoundError, match="authors-cifar100-base is published at"): load_classifier(path, "cifar100")
    with pytest.raises(FileNotFoundError, match="authors-cifar100-base is published at"): verify(path, known(path))


def test_verify(saved):
    entry, whole = checkpoint("authors-cifar10-score"), saved.read_bytes()
    digest = sha256(saved)
    exact = dataclasses.replace(entry, size=len(whole), sha256=digest)
    assert verify(saved, entry) == verify(saved, exact) == digest
    for other, words in ((dataclasses.replace(exact, sha256="0"*64), "SHA-256"), (dataclasses.replace(exact, size=1), "1: download it again")):
        with pytest.raises(ValueError, match=words): verify(saved, other)
    middle = len(whole)//2
    for damaged in (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:], whole[:-1], whole[:middle], b""):
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|checksum") as error: verify(saved, entry)
        assert "\n" not in str(error.value)


def test_narrow_networks_by_argument(tmp_path):
    build = partial(SigmaResNet, 18, 10, width=4)
    net = build()
    loaded = load_classifier(save_official(tmp_path/"x.pth", net), "cifar10", build)
    assert same(dict(net.state_dict()), dict(loaded.state_dict()))
    refused(tmp_path/"x.pth", "has shape", "resnet18")
