"""Trainings on images: killed and resumed, shared by processes, cut into pieces, and their losses and gradients checked."""
import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dlsm import monitor
from dlsm.checkpoints import fingerprint, save_checkpoint
from dlsm.data import Images, image_data
from dlsm.guidance import likelihood_score
from dlsm.image_presets import IMAGES
from dlsm.images import LOSSES, batches, classifier_loss, classifier_net, crossing, score_loss, score_net
from dlsm.monitor import estimate, read_log
from dlsm.networks import seeded
from dlsm.parallel import gradients
from dlsm.precond import EDMPrecond
from dlsm.stages import estimate_classifier, fit_classifier, fit_score, load_classifier, load_score, train
from dlsm.training import fit, step_generator

CIFAR = Path(os.environ.get("DLSM_DATA", "data"))/"cifar-10-batches-py"
SMOKE = IMAGES["digits"]["smoke"]
TINY = dataclasses.replace(
    SMOKE, name="tiny", log_every=1, checkpoint_every=7,
    score=dataclasses.replace(SMOKE.score, nf=4, ch_mult=(1, 1), batch=6, steps=40, dropout=0.2, flips=True),
    classifier=dataclasses.replace(SMOKE.classifier, width=4, batch=6, steps=4))
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["dlsm.stages", "torch.utils.tensorboard", "torch._dynamo"])  # the imports take longer than the trainings


@pytest.fixture(scope="module")
def digits(): return image_data("digits")


@pytest.fixture
def runs(monkeypatch, tmp_path):
    "A root of its own for runs/."
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    return tmp_path/"runs"/"digits"


def changed(preset, stage, **more): return dataclasses.replace(preset, **{stage: dataclasses.replace(getattr(preset, stage), **more)})


def finish(steps):
    "Run a training to its end."
    *_, last = steps
    return last


def child(environment, preset):
    "Train stage 1 in a process of its own."
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    finish(fit_score(preset, image_data("digits")))


def start(root, preset, **environment):
    process = START.Process(target=child, args=({"DLSM_ROOT": str(root)} | environment, preset))
    process.start()
    return process


def final_weights(folder):
    "The files of the last checkpoint but its metadata."
    newest = max(folder.glob("step-*"))
    return {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}


# ---- killed, resumed, shared

def test_five_kills_leave_the_same_weights_to_the_last_bit(tmp_path):
    process = start(tmp_path/"whole", TINY)
    chance, folder, kills = random.Random(0), tmp_path/"killed"/"runs"/"digits"/"tiny"/"score-0", 0
    for path in ("whole", "killed"): (tmp_path/path).mkdir(exist_ok=True)
    for target in sorted(chance.sample(range(3, 38), 5)):
        victim = start(tmp_path/"killed", TINY)
        while victim.is_alive() and not any(line["step"] >= target for line in read_log(folder)): time.sleep(0.005)
        if victim.is_alive(): os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        kills += victim.exitcode == -signal.SIGKILL
    last = start(tmp_path/"killed", TINY)
    for p in (last, process):
        p.join()
        assert p.exitcode == 0
    whole = tmp_path/"whole"/"runs"/"digits"/"tiny"/"score-0"
    assert kills == 5 and final_weights(folder) == final_weights(whole) and len(final_weights(whole)) == 2
    logs = [[(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in read_log(f)] for f in (folder, whole)]
    assert logs[0] == logs[1] and [line[0] for line in logs[0]] == list(range(1, 41))


def test_two_processes_train_like_one(tmp_path, digits, monkeypatch):
    preset = changed(TINY, "score", dropout=0., steps=12, batch=7)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path/"two").mkdir()
    pair = [start(tmp_path/"two", preset, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                  ACCELERATE_USE_CPU="true") for i in range(2)]
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    finish(fit_score(preset, digits))
    for process in pair:
        process.join()
        assert process.exitcode == 0
    one, two = (read_log(root/"runs"/"digits"/"tiny"/"score-0") for root in (tmp_path, tmp_path/"two"))
    assert len(one) == len(two) == 12
    for a, b in zip(one, two): assert abs(a["loss"] - b["loss"]) < 1e-5*a["loss"] and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4*a["grad_norm"]


def of_two(rank, port, folder, told):
    "Train a layer, and a temperature beside it, as one of two processes; keep what came out."
    if port: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                               ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, temperature = torch.nn.Linear(3, 1), torch.ones(1, requires_grad=True)
    def loss(model, x): return ((model(x)[:, 0] * temperature - x.sum(1))**2)
    def draw(step, generator): return {"x": torch.randn(8, 3, generator=generator)}
    try:
        finish(fit(model, loss, 4, torch.optim.SGD([*model.parameters(), temperature], 0.05), 0, folder, draw=draw))
        told.write_text(f"{temperature.item():.6f} {model.weight.sum().item():.6f}")
    except ValueError as e: told.write_text(str(e))


def two(root, folders):
    "What two processes say that work on these folders."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pair = [START.Process(target=of_two, args=(i, port, folder, root/f"told{i}")) for i, folder in enumerate(folders)]
    for process in pair: process.start()
    for process in pair: process.join()
    return [(root/f"told{i}").read_text() for i in range(2)]


def test_what_is_trained_beside_the_model_is_shared_too(tmp_path):
    of_two(0, None, tmp_path/"one", tmp_path/"told")
    alone, *together = [[float(v) for v in text.split()] for text in ((tmp_path/"told").read_text(), *two(tmp_path, [tmp_path/"two"] * 2))]
    assert together[0] == together[1] == pytest.approx(alone, abs=2e-6) and abs(alone[0] - 1) > 0.01


def test_processes_that_see_different_folders_are_told(tmp_path):
    "One finds a finished training, the other none: neither begins."
    of_two(0, None, tmp_path/"here", tmp_path/"told")
    for said in two(tmp_path, [tmp_path/"here", tmp_path/"there"]):
        assert said.startswith("processes found different checkpoints in ") and said.endswith("of the steps: 4, 0; all must see the same folder")


def test_minutes_stop_with_a_checkpoint_and_the_log_goes_on(runs, digits):
    preset = changed(TINY, "score", steps=9)
    stopped = [state.step for state in fit_score(preset, digits, minutes=1e-9)]
    assert stopped == [1] and [p.name for p in (runs/"tiny"/"score-0").glob("step-*")] == ["step-00000001"]
    with pytest.raises(FileNotFoundError, match="stopped at step 1 of 9: run `papermill nbs/05_cifar.ipynb"): load_score(preset)
    assert [state.step for state in fit_score(preset, digits)] == list(range(2, 10))
    assert [line["step"] for line in read_log(runs/"tiny"/"score-0")] == list(range(1, 10))
    assert len(list(fit_score(preset, digits))) == 1 and len(list(fit_score(preset, digits, resume=False))) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="the most memory used can be reset under Linux only")
def test_the_log_tells_the_memory_of_its_own_training(runs, digits):
    "Not what the process used before: here 2 GB more than it holds."
    torch.ones(500_000_000).sum()
    before = monitor.peak_memory(torch.device("cpu")) / 1e9
    finish(fit_score(changed(TINY, "score", steps=3), digits))
    assert all(0.05 < line["memory_gb"] < before - 1.5 for line in read_log(runs/"tiny"/"score-0"))


def test_tensorboard_reads_the_same_numbers(runs, digits):
    "Of a training that was resumed, too: each step once."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    preset = changed(TINY, "score", steps=9)
    for _ in fit_score(preset, digits, minutes=1e-9): pass
    time.sleep(1.1)  # TensorBoard orders files by the second in their names
    finish(fit_score(preset, digits))
    log, board = read_log(runs/"tiny"/"score-0"), EventAccumulator(str(runs/"tiny"/"score-0"/"tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(log[0]) - {"step"}
    for name in board.Tags()["scalars"]:
        shown = board.Scalars(name)
        assert [event.step for event in shown] == [line["step"] for line in log] == list(range(1, 10))
        assert [event.value for event in shown] == pytest.approx([line[name] for line in log], rel=1e-6)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(runs, digits):
    preset = changed(TINY, "score", steps=21)
    whole = fingerprint(finish(fit_score(preset, digits)).ema)
    newest = max((runs/"tiny"/"score-0").glob("step-*"))/"ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    with pytest.warns(UserWarning, match="step-00000021 .* is damaged"): resumed = list(fit_score(preset, digits))
    assert len(resumed) == 7 and fingerprint(resumed[-1].ema) == whole  # from step 14 to 21


# ---- stage 2, and what is refused

def test_the_three_losses_share_score_batches_and_start(runs, digits):
    finish(fit_score(changed(TINY, "score", steps=2), digits))
    score, prints = load_score(changed(TINY, "score", steps=2)), set()
    preset = changed(TINY, "score", steps=2)
    for loss in LOSSES:
        last = finish(fit_classifier(preset, digits, loss, score))
        assert last.step == 4 and not score.training and all(p.grad is None and not p.requires_grad for p in score.parameters())
        prints.add(fingerprint(load_classifier(preset, loss, score)))
    assert len(prints) == 3
    other = changed(preset, "classifier", lr=0.5)
    with pytest.raises(ValueError, match="lr=0.002 there and 0.5 here"): finish(fit_classifier(other, digits, "total", score))
    with torch.no_grad(): next(p for p in score.parameters()).add_(1.)
    with pytest.raises(ValueError, match="score="): finish(fit_classifier(preset, digits, "total", score))
    assert finish(fit_classifier(preset, digits, "ce", score)).step == 4  # needs no score model
    with pytest.raises(ValueError, match="is not known: ce, dlsm_prime, total"): finish(fit_classifier(preset, digits, "mse", score))


def test_a_loss_that_is_not_finite_names_step_levels_and_checkpoint(tmp_path, digits):
    draw = batches(digits, TINY, TINY.score, seed=0)
    net, loss = score_net(TINY), score_loss(TINY.score)
    def fails(model, **batch): return loss(model, **batch)*(math.nan if fails.step == 8 else 1)
    def counted(step, generator):
        fails.step = step
        return draw(step, generator)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 9 \(σ from .* to .*\); last good checkpoint: step-00000005; look at the data, or try"):
        finish(fit(net, fails, 20, torch.optim.Adam(net.parameters()), 0, tmp_path, draw=counted, clip=1., checkpoint_every=5, log_every=5))


def test_the_log_has_the_norm_of_the_gradient_clipped_or_not(tmp_path, digits):
    def run(clip):
        net, draw = seeded(lambda: score_net(TINY), 0), batches(digits, TINY, TINY.score, 0)
        finish(fit(net, score_loss(TINY.score), 1, torch.optim.Adam(net.parameters()), 0, tmp_path/str(clip), draw=draw, clip=clip, log_every=1))
        return read_log(tmp_path/str(clip))[-1]["grad_norm"], net
    (clipped, _), (free, net) = run(1.), run(None)
    assert free == pytest.approx(clipped, rel=1e-5) and free > 1
    assert free == pytest.approx(sum(p.grad.square().sum().item() for p in net.parameters() if p.grad is not None)**0.5, rel=1e-4)


def test_too_little_memory_is_one_line(digits):
    net, batch = classifier_net(TINY), batches(digits, TINY, TINY.classifier, 0)(0, step_generator(0, 0))
    def work(net, n): gradients(net, classifier_loss("total", TINY.classifier, score_net(TINY).eval()), {k: v[:n] for k, v in batch.items()})
    with pytest.raises(MemoryError, match="too little memory for stage 2 on cpu: about .* micro-batches of fewer than 6 images") as error:
        estimate("stage 2", net, work, 6, 10, 100, available=1e5)
    assert "\n" not in str(error.value)
    assert estimate("stage 2", net, work, 6, 10, 100)["seconds"] > 0


def test_stage_2_is_estimated_before_stage_1(runs, digits, monkeypatch, capsys):
    "Nobody waits for a score model beside which the machine cannot train a classifier; and looking changes no number."
    state = torch.random.get_rng_state()
    found = estimate_classifier(TINY, digits)
    assert torch.equal(torch.random.get_rng_state(), state)
    told = capsys.readouterr().out
    assert "each of its classifiers" in told and f"{TINY.classifier.steps} steps of {TINY.classifier.batch}" in told and not any(runs.glob("*/*"))
    assert found["parameters"] == sum(p.numel() for p in classifier_net(TINY).parameters()) and found["seconds"] > 0
    finish(fit_score(TINY, digits))
    finish(fit_classifier(TINY, digits, "total", load_score(TINY)))
    assert f"{found['bytes'] / 1e6:,.0f} MB" in capsys.readouterr().out.splitlines()[-1]  # the same, with the score model there
    monkeypatch.setattr("dlsm.monitor.free_memory", lambda device: 1e5)
    with pytest.raises(MemoryError, match="too little memory for stage 2 on digits, preset tiny, each of its classifiers") as error: estimate_classifier(TINY, digits)
    assert "\n" not in str(error.value)


def test_what_is_refused_takes_nothing_away(runs, digits, monkeypatch):
    "Too little memory for a training that shall begin anew: the old one stays."
    preset = changed(TINY, "score", steps=3)
    finish(fit_score(preset, digits))
    before = final_weights(runs/"tiny"/"score-0")
    monkeypatch.setattr("dlsm.monitor.free_memory", lambda device: 1e5)
    with pytest.raises(MemoryError, match="too little memory for stage 1"): finish(fit_score(preset, digits, resume=False))
    assert final_weights(runs/"tiny"/"score-0") == before


def test_bf16_is_another_training(tmp_path):
    "It is not gone on with in float32, nor the other way round; what is finished is read anywhere, and so are checkpoints that do not tell."
    def draw(step, generator): return {"x": torch.randn(8, 3, generator=generator)}
    def run(steps, **more):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        return finish(fit(model, lambda net, x: net(x)[:, 0]**2, steps, torch.optim.Adam(model.parameters()), 0, tmp_path, {"a": 1}, draw=draw, **more)).step
    assert run(2) == 2 == run(2, bf16=True)
    with pytest.raises(ValueError, match="bf16=False there and True here"): run(4, bf16=True)
    assert run(4) == 4
    path = max(tmp_path.glob("step-*"))
    state = torch.load(path/"state.pt", weights_only=True)
    del state["settings"]["bf16"]
    save_checkpoint(tmp_path, 4, {"model": load_file(path/"model.safetensors")}, state, {"a": 1}, [])
    assert run(5, bf16=True) == 5


def test_batch_norm_tells_its_pieces(runs, digits, capsys):
    told = "batch normalisation sees 4 images at a time, not 6"
    for norm in ("batch", "group"):
        preset = changed(TINY, "classifier", norm=norm, steps=1)
        finish(fit_classifier(dataclasses.replace(preset, name=f"tiny-{norm}"), digits, "ce", None, micro=4))
        assert (told in capsys.readouterr().out) == (norm == "batch")
    finish(fit_classifier(dataclasses.replace(changed(TINY, "classifier", norm="batch", steps=1), name="whole"), digits, "ce", None))
    assert "batch normalisation" not in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_demo_goes_on_elsewhere_with_less_than_60_mb(dataset):
    "The newest checkpoint of a training (weights, average, two moments of Adam) and what `keep --partial` wrote of the score model."
    preset = IMAGES[dataset]["demo"]
    score, classifier = (sum(p.numel() for p in net(preset).parameters()) for net in (score_net, classifier_net))
    assert 16 * score < 60e6 and 16 * classifier + 2 * score < 60e6 and 2 * (score + 3 * classifier) < 60e6


def test_both_stages_on_as_many_classes_as_cifar100_has(runs):
    "On images of noise: the networks of preset smoke, and labels up to 99."
    x, y = torch.randint(256, (120, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 100
    images, preset = Images(x, y, x, y, tuple(map(str, range(100)))), IMAGES["cifar100"]["smoke"]
    preset = dataclasses.replace(preset, score=dataclasses.replace(preset.score, steps=2), classifier=dataclasses.replace(preset.classifier, steps=2))
    assert finish(fit_score(preset, images)).loss.isfinite()
    score = load_score(preset)
    for loss in LOSSES: assert finish(fit_classifier(preset, images, loss, score)).loss.isfinite()
    assert load_classifier(preset, "total", score)(torch.rand(2, 3, 32, 32), torch.ones(2)).shape == (2, 100)


def test_an_allocation_that_fails_on_a_cpu_is_one_line(digits):
    "PyTorch has no error of its own for it there."
    net, batch = classifier_net(TINY), batches(digits, TINY, TINY.classifier, 0)(0, step_generator(0, 0))
    def fails(model, **batch): raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    with pytest.raises(MemoryError, match="too little memory on cpu for 6 images at a time: use smaller micro-batches") as error: gradients(net, fails, batch)
    assert "\n" not in str(error.value)
    def other(model, **batch): raise RuntimeError("another")
    with pytest.raises(RuntimeError, match="^another$"): gradients(net, other, batch)


@pytest.mark.parametrize("files", [
    {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 5\ninactive_file 300\n"},
    {"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "900\n", "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n"}],
    ids=["v2", "v1"])
def test_the_limit_of_a_container_counts(tmp_path, files):
    assert monitor._limit_of_group(tmp_path) == math.inf
    for name, text in files.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text)
    assert monitor._limit_of_group(tmp_path) == 1000 - 900 + 300
    (tmp_path/next(iter(files))).write_text("max\n")
    assert monitor._limit_of_group(tmp_path) == math.inf


def test_the_first_batch_of_a_size_is_not_what_a_step_costs(capsys):
    "As on a GPU, which chooses its kernels then: here the first batch of each size takes half a second."
    net, seen = torch.nn.Linear(2, 2), set()

    def work(net, n):
        if n not in seen: time.sleep(0.5)
        seen.add(n)
        net(torch.ones(n, 2)).sum().backward()
    assert estimate("a training", net, work, 64, 10, 100, compiled=True)["seconds"] < 10 * 0.1
    assert "as it is compiled" in capsys.readouterr().out


def test_images_of_another_size_are_refused(runs, digits):
    with pytest.raises(ValueError, match=r"images have shape \(1, 8, 8\); preset smoke of cifar10 is for \(3, 32, 32\)"):
        finish(fit_score(IMAGES["cifar10"]["smoke"], digits))


@pytest.mark.parametrize("arguments, told", [
    (("moons", "demo", "score"), "dataset = 'moons'"), (("digits", "paper", "score"), "smoke, demo"), (("digits", "smoke", "mse"), "stage = 'mse'"),
    (("digits", "smoke", "score", 0, None, "cuda:99"), "cuda:99")])
def test_wrong_names_are_one_line(arguments, told):
    with pytest.raises(ValueError, match=told) as error: train(*arguments)
    assert "\n" not in str(error.value)


LAUNCHERS = {"accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
             "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}  # which `accelerate launch` starts on several GPUs


@pytest.mark.project
def test_launchers(root, tmp_path):
    "On one process and on two (for which Accelerate, without GPUs, has no launcher of its own): the same curve."
    logs = {}
    for name, launcher in LAUNCHERS.items():
        environment = os.environ | {"DLSM_ROOT": str(tmp_path/name), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        (tmp_path/name).mkdir()
        done = subprocess.run([sys.executable, "-m", *launcher, "-m", "dlsm.training", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "score: 40 of 40 steps" in done.stdout, done.stderr
        assert ("steps of 64 on 2 processes" in done.stdout) == (name == "torchrun")
        logs[name] = read_log(tmp_path/name/"runs"/"digits"/"smoke"/"score-0")
    for a, b in zip(*logs.values(), strict=True): assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"]


def test_command_line(root, tmp_path):
    done = subprocess.run([sys.executable, "-m", "dlsm.training", "--preset", "dmo"], cwd=root, capture_output=True, text=True,
                          env=os.environ | {"DLSM_ROOT": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.strip() == "ParameterError: preset = 'dmo' is not known for digits: smoke, demo"


# ---- pieces, precision

@pytest.mark.parametrize("loss", ["score", *LOSSES])
def test_pieces_give_the_gradient_of_the_whole(digits, loss):
    torch.manual_seed(0)
    stage = TINY.score if loss == "score" else TINY.classifier
    batch = batches(digits, TINY, stage, 0)(0, step_generator(0, 0))
    net = (score_net(changed(TINY, "score", dropout=0.)) if loss == "score" else classifier_net(TINY)).double()
    function = score_loss(stage) if loss == "score" else classifier_loss(loss, stage, lambda x, sigma: (0.5 - x)/(sigma[:, None, None, None]**2 + 0.2))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    def flat(rank=0, processes=1, micro=None):
        net.zero_grad()
        value = sum(gradients(net, function, batch, i, processes, micro) for i in range(processes))
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad] + [value[None]])
    whole = flat()
    for cut in ({"micro": 4}, {"processes": 3}, {"processes": 4, "micro": 1}): assert (flat(**cut) - whole).norm() < 1e-10*whole.norm()
    with pytest.raises(ValueError, match="global batch of 6 cannot be shared by 7"): gradients(net, function, batch, 0, 7)


def test_bf16_is_close_to_float32_in_stage_1(digits):
    torch.manual_seed(0)
    stage = dataclasses.replace(TINY.score, dropout=0., batch=32)
    batch, net = batches(digits, TINY, stage, 0)(0, step_generator(0, 0)), score_net(changed(TINY, "score", dropout=0.))
    def flat(bf16):
        net.zero_grad()
        value = gradients(net, score_loss(stage), batch, bf16=bf16)
        return value, torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])
    (exact, g), (rounded, h) = flat(False), flat(True)
    assert abs(rounded - exact) < 0.02*exact and torch.cosine_similarity(g, h, dim=0) > 0.98 and h.dtype == torch.float32


@pytest.mark.parametrize("loss", ["score", "ce", "total"])
def test_losses_compile_without_a_break(digits, loss):
    torch.manual_seed(0)
    stage = TINY.score if loss == "score" else TINY.classifier
    net, batch = score_net(TINY) if loss == "score" else classifier_net(TINY), batches(digits, TINY, stage, 0)(0, step_generator(0, 0))
    function = score_loss(stage) if loss == "score" else classifier_loss(loss, stage, score_net(TINY).eval().requires_grad_(False))
    net.eval()  # without dropout: the same numbers
    values = []
    for compute in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        values.append(torch.stack([gradients(net, compute, batch), *(p.grad.norm() for p in net.parameters() if p.requires_grad)]))
    torch._dynamo.reset()
    assert torch.allclose(*values, rtol=1e-4)


def test_dropout_is_seeded_and_the_global_source_is_left_alone(digits):
    preset, ends = changed(TINY, "score", dropout=0.5), []
    for global_seed in (1, 2):
        torch.manual_seed(0)
        net = score_net(preset)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        finish(fit(net, score_loss(preset.score), 3, torch.optim.Adam(net.parameters()), 0, draw=batches(digits, preset, preset.score, 0)))
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(fingerprint(net))
    assert ends[0] == ends[1]


# ---- the paper's batches, losses and gradients

def test_the_papers_levels(digits):
    paper = dataclasses.replace(IMAGES["cifar10"]["paper"], score=dataclasses.replace(IMAGES["cifar10"]["paper"].score, batch=20_000, flips=False))
    generator = step_generator(0, 0)
    t = torch.rand(20_000, generator=step_generator(0, 0))*(1 - 1e-3) + 1e-3
    sigma = batches(digits, paper, paper.score, 0)(0, generator)["sigma"]
    assert torch.allclose(sigma, 0.01*5000**t, rtol=1e-5) and sigma.min() >= 0.01*5000**1e-3
    assert paper.classifier.t_min == 1e-5


def test_a_balanced_loss_weighs_all_levels_alike():
    "The answer of an untrained preconditioned network is c_skip x: its error counts about the same at every level, and 1/σ² times without the balance."
    preset = IMAGES["cifar10"]["cpu"]
    assert preset.score.balance == preset.sigma_data
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.25*torch.randn(64, 3, 32, 32, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    blank = EDMPrecond(lambda x, sigma: torch.zeros_like(x), preset.sigma_data)
    found = {balance: [score_loss(dataclasses.replace(preset.score, balance=balance))(blank, x, None, torch.full((64,), sigma), noise).mean().item()
                       for sigma in (0.01, 0.25, 3., 50.)] for balance in (None, preset.sigma_data)}
    assert max(found[0.25])/min(found[0.25]) < 1.1 and found[None][0]/found[None][-1] > 1e4


def test_the_papers_losses(digits):
    "Stage 1 sums over pixels, stage 2 averages without σ-weighting."
    preset, paper = TINY, IMAGES["cifar10"]["paper"]
    batch = batches(digits, preset, preset.score, 0)(0, step_generator(0, 0))
    x, sigma, noise = batch["x"], batch["sigma"], batch["noise"]
    wide = sigma[:, None, None, None]
    x_noisy = x + wide*noise
    score = lambda x, sigma: -(x - 0.5)/(sigma[:, None, None, None]**2 + 0.0625)
    assert torch.allclose(score_loss(paper.score)(score, **batch), 0.5*(wide*score(x_noisy, sigma) + noise).square().flatten(1).sum(1))
    assert paper.score.balance is None
    balanced = score_loss(dataclasses.replace(paper.score, balance=0.25))(score, **batch)
    assert torch.allclose(balanced, score_loss(paper.score)(score, **batch)*(1 + 16*sigma**2))
    net = classifier_net(preset).eval()
    residual = likelihood_score(net, x_noisy, sigma, batch["y"]) + score(x_noisy, sigma) + noise/wide
    expected = 0.5*residual.square().flatten(1).mean(1)
    found = {name: classifier_loss(name, paper.classifier, score)(net, **batch) for name in LOSSES}
    assert torch.allclose(found["dlsm_prime"], expected, rtol=1e-4)
    assert torch.allclose(found["ce"], nn.functional.cross_entropy(net(x_noisy, sigma), batch["y"], reduction="none"), rtol=1e-4)
    assert torch.allclose(found["total"], found["dlsm_prime"] + found["ce"], rtol=1e-4)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("loss", ["dlsm_prime", "total"])
def test_gradients_of_stage_2_by_finite_differences(digits, norm, loss):
    torch.manual_seed(0)
    preset = changed(TINY, "classifier", norm=norm)
    net, batch = classifier_net(preset).double(), batches(digits, preset, preset.classifier, 0)(0, step_generator(0, 0))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    function = classifier_loss(loss, preset.classifier, lambda x, sigma: (0.5 - x)/(sigma[:, None, None, None]**2 + 0.2))
    gradients(net, function, batch)
    weights = [p for p in net.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in weights]
    exact, ends, step = sum((p.grad*d).sum() for p, d in zip(weights, direction)).item(), [], 1e-6
    for sign in (1, -2, 1):
        with torch.no_grad(): torch._foreach_add_(weights, direction, alpha=sign*step)
        ends.append(function(net, **batch).mean().item())
    assert abs(exact - (ends[0] - ends[1])/(2*step)) < 1e-4*abs(exact)


def test_batch_norm_crosses_images_in_train_mode_only(digits):
    torch.manual_seed(0)
    batch = batches(digits, TINY, dataclasses.replace(TINY.classifier, batch=24), 0)(0, step_generator(0, 0))
    x_noisy = batch["x"] + batch["sigma"][:, None, None, None]*batch["noise"]
    shares = {}
    for norm in ("group", "batch"):
        net = classifier_net(changed(TINY, "classifier", norm=norm))
        for mode in (True, False): shares[norm, mode] = crossing(net.train(mode), x_noisy, batch["sigma"], batch["y"]).median().item()
    assert shares["batch", True] > 0.01 and max(v for k, v in shares.items() if k != ("batch", True)) < 1e-5


def test_batch_norm_counts_each_step_once(digits):
    preset = changed(TINY, "classifier", norm="batch")
    net = classifier_net(preset)
    loss = classifier_loss("total", preset.classifier, score_net(preset).eval())
    finish(fit(net, loss, 3, torch.optim.Adam(net.parameters()), 0, draw=batches(digits, preset, preset.classifier, 0)))
    assert net.state_dict()["net.classifier.classifier.bn1.num_batches_tracked"] == 3


# ---- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_both_stages_on_a_gpu(runs, digits, compiled):
    "bfloat16, channels last and compilation do not change the course of a training by more than they round; one that was stopped goes on. (A CPU draws other noise.)"
    images = Images(*(t.cuda() for t in (digits.x, digits.y, digits.x_test, digits.y_test)), digits.classes)
    def run(name, images, **more):
        preset = changed(changed(dataclasses.replace(SMOKE, name=name, log_every=1, **more), "score", steps=12), "classifier", steps=8)
        for _ in fit_score(preset, images, minutes=1e-9): pass
        assert finish(fit_score(preset, images)).step == 12
        score = load_score(preset, device=images.x.device)
        for loss in ("ce", "total"): finish(fit_classifier(preset, images, loss, score))
        return [[line["loss"] for line in read_log(runs/name/folder)] for folder in ("score-0", "classifier-ce-0", "classifier-total-0")]
    for a, b in zip(run("plain", images), run(f"gpu-{compiled}", images, bf16=True, compiled=compiled), strict=True):
        assert len(a) == len(b) and b == pytest.approx(a, rel=0.05)


# ---- the real thing

@pytest.mark.skipif(not CIFAR.is_dir(), reason="needs CIFAR-10 in $DLSM_DATA")
def test_both_stages_on_cifar10(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    for stage in ("score", *LOSSES): train("cifar10", "smoke", stage, data_dir=str(CIFAR.parent), device="cpu")
    said = capsys.readouterr().out
    assert said.count("50,000 images") == 4 and "score: 10 of 10 steps" in said and "total: 6 of 6 steps" in said
    for path in (tmp_path/"runs"/"cifar10"/"smoke").iterdir(): assert all(math.isfinite(line["loss"]) for line in read_log(path))
    meta = json.loads((tmp_path/"runs"/"cifar10"/"smoke"/"score-0"/"step-00000010"/"meta.json").read_text())
    assert meta["config"]["dataset"] == "cifar10" and meta["config"]["batch"] == 16
