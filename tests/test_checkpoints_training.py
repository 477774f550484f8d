"""Training: killed and resumed to the same bits; damaged and foreign checkpoints, full disks, losses that are not finite."""
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlsm import checkpoints
from dlsm.checkpoints import load_checkpoint, save_checkpoint
from dlsm.files import part_name
from dlsm.training import fit, lr_factor, step_generator

KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
from dlsm import checkpoints
from dlsm.dsm import dsm_loss
from dlsm.networks import MLPScore, seeded
from dlsm.training import fit

folder, STEPS = Path(sys.argv[1]), 60

def train(name, kill=None):
    "Train in `folder/name`, save what comes out, and die by SIGKILL at a step, or while a checkpoint is written."
    net, calls = seeded(MLPScore, 0), [0]
    def loss(net, generator):
        calls[0] += 1
        if kill and kill[0] == "step" and calls[0] == kill[1]: os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(32, 2, generator=generator)
        return dsm_loss(net, x, 0.1 + torch.rand(32, generator=generator), torch.randn(32, 2, generator=generator)).mean()
    def die(real):
        def now_or_later(*args, **kwargs):
            kill[1] -= 1
            if kill[1] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return now_or_later
    if kill and kill[0] == "save": checkpoints.torch.save = die(torch.save)
    if kill and kill[0] == "rename": checkpoints.os.replace = die(os.replace)
    measure = lambda state: {"weight": sum(p.sum().item() for p in state.ema.parameters())}
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for state in fit(net, loss, STEPS, optimizer, 7, folder/name, {"seed": 7}, warmup=5, decay="cosine", ema=0.99, evaluate=measure,
                     every=6, checkpoint_every=4): pass
    torch.save({"net": net.state_dict(), "ema": state.ema.state_dict(), "optimizer": optimizer.state_dict(), "record": state.record,
                "step": state.step}, folder/f"{name}.pt")

def child(*args):
    pid = os.fork()
    if pid == 0:
        try: train(*args)
        except BaseException as e: print(repr(e), flush=True); os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

torch.optim.Adam(MLPScore().parameters())  # imports what an optimiser needs once, and not in every child
assert child("whole") == 0
chance = random.Random(int(sys.argv[2]))
for kill in (["step", chance.randint(1, 11)], ["save", chance.randint(1, 3)], ["step", chance.randint(2, 11)],
             ["rename", chance.randint(1, 3)], ["step", chance.randint(2, 8)]):
    assert child("killed", kill) == -signal.SIGKILL, kill
assert child("killed") == 0
"""


def equal(a, b):
    "Whether two nested results are the same to the last bit."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_killed_five_times_and_resumed_to_the_same_bits(tmp_path):
    "Each child is forked from a fresh process; two of five kills hit while a checkpoint is being written or renamed."
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "0"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    whole, killed = (torch.load(tmp_path/f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["step"] == 60 and [r["step"] for r in whole["record"]] == list(range(0, 61, 6))
    assert equal(whole, killed)
    assert not list((tmp_path/"killed").glob(".part-*"))


def train(folder, steps=40, rate=1e-2, broken_from=None, config=None, seed=0, stop=None, **kwargs):
    "A small regression; its loss is not finite from the step `broken_from` on."
    torch.manual_seed(0)
    net, calls = nn.Linear(3, 1), []

    def loss(net, generator):
        x = torch.randn(16, 3, generator=generator)
        calls.append(generator.initial_seed())
        value = (net(x) - x.sum(1, keepdim=True)).square().mean()
        return value*float("nan") if broken_from is not None and len(calls) > broken_from else value
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for state in fit(net, loss, steps, optimizer, seed, folder, config or {"rate": rate}, checkpoint_every=10, **kwargs):  # noqa: B007
        if state.step == stop: break
    return state, calls


def weights(state): return [p.detach().clone() for p in state.model.parameters()]


def steps_in(folder): return [p.name for p in sorted(folder.glob("step-*"))]


@pytest.fixture
def finished(tmp_path):
    "The folder of a finished training, and its weights."
    return tmp_path, weights(train(tmp_path)[0])


def flip(path): path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


DAMAGE = {
    "a flipped bit in the weights": lambda p: flip(p/"model.safetensors"),
    "a flipped bit in the optimiser": lambda p: flip(p/"state.pt"),
    "truncated weights": lambda p: (p/"model.safetensors").write_bytes(b"x"),
    "no optimiser": lambda p: (p/"state.pt").unlink(),
    "no meta": lambda p: (p/"meta.json").unlink(),
    "truncated meta": lambda p: (p/"meta.json").write_text((p/"meta.json").read_text()[:40]),
    "another curve": lambda p: (p/"meta.json").write_text((p/"meta.json").read_text().replace('"record": []', '"record": [1]')),
    "meta without checksums": lambda p: (p/"meta.json").write_text("{}"),
    "meta that is null": lambda p: (p/"meta.json").write_text("null"),
    "meta that is a list": lambda p: (p/"meta.json").write_text("[1]"),
    "checksums that are a number": lambda p: (p/"meta.json").write_text('{"step": 40, "config": {}, "record": [], "sha256": 3}'),
    "checksums of nothing": lambda p: (p/"meta.json").write_text('{"step": 40, "config": {"rate": 0.01}, "record": [], "sha256": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over(finished, damage):
    folder, whole = finished
    damage(folder/"step-00000040")
    with pytest.warns(UserWarning, match="step-00000040.*damaged"): state, calls = train(folder)
    assert len(calls) == 10 and equal(weights(state), whole)
    assert steps_in(folder) == ["step-00000030", "step-00000040"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(folder)[1] == []  # it was written anew


def test_all_damaged_starts_over(finished):
    folder, whole = finished
    for path in folder.glob("step-*"): flip(path/"state.pt")
    with pytest.warns(UserWarning, match="damaged"): state, calls = train(folder)
    assert len(calls) == 40 and equal(weights(state), whole)


def put(folder, step, **more): return save_checkpoint(folder, step, {"model": {"w": torch.full((3,), float(step))}}, {}, {}, [], **more)


def test_what_was_just_written_stays_beside_damaged_ones_of_higher_steps(tmp_path):
    "A job whose time is limited would otherwise begin at the same step for ever."
    for step in (10, 20, 30, 40, 50): put(tmp_path, step, keep=9)
    for step in (40, 50): (tmp_path/f"step-000000{step}"/"meta.json").write_text("{}")
    assert put(tmp_path, 35).exists() and steps_in(tmp_path) == ["step-00000030", "step-00000035"]
    assert load_checkpoint(tmp_path, {})["step"] == 35
    put(tmp_path, 36, keep=1)
    assert steps_in(tmp_path) == ["step-00000036"]


def test_a_process_that_is_behind_removes_nothing_of_one_that_is_ahead(tmp_path):
    for step in (20, 30, 10): put(tmp_path, step)
    assert steps_in(tmp_path) == [f"step-000000{step}" for step in (10, 20, 30)] and load_checkpoint(tmp_path, {})["step"] == 30


def test_whoever_may_read_one_file_of_a_checkpoint_may_read_all(tmp_path):
    assert len({path.stat().st_mode for path in put(tmp_path, 1).iterdir()}) == 1


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0; expected at least 1"): put(tmp_path, 1, keep=0)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_may_not_be_read_is_an_error(finished, monkeypatch):
    "It may be whole; to start over would throw the training away."
    folder, _ = finished
    def forbidden(path): raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(checkpoints, "sha256", forbidden)
    with pytest.raises(PermissionError, match="checkpoint step-00000040 in .* cannot be read .Permission denied.*make it readable") as error: train(folder)
    assert error.value.errno == errno.EACCES
    monkeypatch.undo()
    assert train(folder)[1] == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_reader_goes_on_where_another_process_removes_what_it_reads(tmp_path, monkeypatch, moment):
    "While the newest is checked or read. It looks again, and finds what the other has written."
    for step in (1, 2): put(tmp_path, step)
    real, calls = json.loads, []
    def loads(text):
        calls.append(text)
        if len(calls) == moment + 1:
            for step in (3, 4): put(tmp_path, step)
        return real(text)
    monkeypatch.setattr(checkpoints.json, "loads", loads)
    assert load_checkpoint(tmp_path, {})["step"] == 4 and len(calls) > moment


@pytest.mark.filterwarnings("error")
def test_a_reader_takes_the_one_before_where_the_newest_vanishes(tmp_path, monkeypatch):
    for step in (1, 2): put(tmp_path, step)
    def sha256(path):
        if path.parent.name == "step-00000002": shutil.rmtree(path.parent)
        return real(path)
    real = checkpoints.sha256
    monkeypatch.setattr(checkpoints, "sha256", sha256)
    assert load_checkpoint(tmp_path, {})["step"] == 1


@pytest.mark.filterwarnings("error")
def test_two_writers_and_a_reader_share_a_folder(tmp_path):
    "The writers are at the same steps, each removing what the other has written."
    for step in (1, 2): put(tmp_path, step)
    def write():
        for step in range(3, 60): put(tmp_path, step)
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write) for _ in range(2)]
        found = [load_checkpoint(tmp_path, {})]
        while not all(writer.done() for writer in writers): found.append(load_checkpoint(tmp_path, {}))
        for writer in writers: writer.result()
    assert all(one and one["weights"]["model"]["w"][0] == one["step"] for one in found) and len(found) > 3
    assert load_checkpoint(tmp_path, {})["step"] == 59 and steps_in(tmp_path) == ["step-00000058", "step-00000059"] and not list(tmp_path.glob(".part-*"))


def test_a_listing_that_misses_what_is_renamed_is_made_again(tmp_path, monkeypatch):
    put(tmp_path, 1)
    real, missed = checkpoints.finished_steps, iter([[], []])
    monkeypatch.setattr(checkpoints, "finished_steps", lambda folder: next(missed, None) or real(folder))
    assert load_checkpoint(tmp_path, {})["step"] == 1


def test_a_file_that_goes_while_it_is_read_is_of_a_checkpoint_that_was_replaced(tmp_path, monkeypatch):
    "safetensors has another error for it; if the checkpoint is still the same, that is told."
    for step in (1, 2): put(tmp_path, step)
    real = checkpoints.load_file
    def replaced(path, **more):
        if path.parent.name == "step-00000002":
            shutil.rmtree(path.parent)
            put(tmp_path, 3)
        return real(path, **more)
    monkeypatch.setattr(checkpoints, "load_file", replaced)
    assert load_checkpoint(tmp_path, {})["step"] == 3
    def broken(path, **more): raise RuntimeError("broken")
    monkeypatch.setattr(checkpoints, "load_file", broken)
    with pytest.raises(RuntimeError, match="^broken$"): load_checkpoint(tmp_path, {})


def test_another_configuration_is_refused_by_name(finished):
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="rate=0.01 there and 0.02 here"): train(folder, rate=2e-2)
    with pytest.raises(ValueError, match="batch=None there and 5 here"): train(folder, config={"rate": 1e-2, "batch": 5})
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_checkpoint_is_data_and_never_code(finished):
    class Surprise:
        def __reduce__(self): return print, ("code ran",)
    folder, _ = finished
    newest = folder/"step-00000040"
    torch.save(Surprise(), newest/"state.pt")
    meta = json.loads((newest/"meta.json").read_text())
    meta["sha256"]["state.pt"] = checkpoints.sha256(newest/"state.pt")
    (newest/"meta.json").write_text(json.dumps(meta))
    with pytest.raises(Exception, match="[Ww]eights.only"): load_checkpoint(folder, {"rate": 1e-2})


@pytest.mark.parametrize("writer", ["save_file", "torch.save"])
def test_a_full_disk_keeps_the_last_good_checkpoint(finished, monkeypatch, writer):
    folder, _ = finished
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    owner = checkpoints.torch if writer == "torch.save" else checkpoints
    monkeypatch.setattr(owner, writer.split(".")[-1], full)
    with pytest.raises(OSError, match="step-00000050.*No space left.*step-00000040") as error: train(folder, steps=50)
    assert error.value.errno == errno.ENOSPC and steps_in(folder) == ["step-00000030", "step-00000040"]
    monkeypatch.undo()
    assert not list(folder.glob(".part-*")) and train(folder, steps=50)[0].step == 50


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the file size are POSIX")
@pytest.mark.parametrize("large", ["weights", "state"])
def test_a_write_that_really_fails_is_the_same_error(tmp_path, large):
    "Those who write weights and the optimiser's state have their own errors for it: provoked by a limit on the file size."
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(3)}}, {"a": torch.zeros(3)}, {}, [])
    sizes = (100_000, 3) if large == "weights" else (3, 100_000)
    code = f"""
import resource, torch
from pathlib import Path
from dlsm.checkpoints import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try: save_checkpoint({str(tmp_path)!r}, 2, {{"model": {{"w": torch.zeros({sizes[0]})}}}}, {{"a": torch.zeros({sizes[1]})}}, {{}}, [])
except OSError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert "could not write step-00000002" in done.stdout and "last good checkpoint is step-00000001" in done.stdout, done.stderr[-1000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"] and load_checkpoint(tmp_path, {})["step"] == 1


def test_a_loss_that_is_not_finite_stops_and_names_the_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan at step 26.*last good checkpoint: step-00000020"):
        train(tmp_path, broken_from=25)
    assert all(torch.isfinite(p).all() for p in load_checkpoint(tmp_path, {"rate": 1e-2})["weights"]["model"].values())
    assert train(tmp_path)[0].step == 40  # with the mistake removed it goes on


def test_a_loss_that_is_not_finite_without_checkpoints():
    with pytest.raises(FloatingPointError, match="last good checkpoint: none"): train(None, broken_from=0)


def test_a_finished_training_costs_nothing_and_gives_its_state(finished):
    folder, whole = finished
    state, calls = train(folder)
    assert calls == [] and state.step == 40 and equal(weights(state), whole)


def test_a_loop_that_is_left_resumes(tmp_path):
    train(tmp_path/"left", stop=25)
    state, calls = train(tmp_path/"left")
    assert len(calls) == 20 and equal(weights(state), weights(train(tmp_path/"whole")[0]))


def test_the_average_is_not_trained_and_lags(tmp_path):
    state, _ = train(tmp_path, ema=0.9)
    assert not any(p.requires_grad for p in state.ema.parameters())
    assert not equal(weights(state), [p.detach() for p in state.ema.parameters()])
    assert train(None)[0].ema is not None


def test_the_average_is_the_recursion_and_buffers_are_copied():
    "The weight is −n after step n: a ← d a + (1 − d) w with d = min(ema, (1 + n)/(10 + n)), which is the smaller one until n = 2."
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
            self.register_buffer("calls", torch.zeros(()))
        def forward(self):
            self.calls += 1
            return self.weight
    net, expected = Counting(), 0.
    for n, state in enumerate(fit(net, lambda net, generator: net(), 6, torch.optim.SGD(net.parameters(), 1.), 0, ema=0.3), 1):
        decay = (1 + n) / (10 + n) if n <= 2 else 0.3
        expected = decay * expected - (1 - decay) * n
        assert state.model.weight.item() == -n and state.ema.weight.item() == pytest.approx(expected, rel=1e-12)
        assert state.ema.calls.item() == state.model.calls.item() == n


def test_step_generators_differ_by_seed_and_step():
    first = {torch.rand(1, generator=step_generator(seed, step)).item() for seed in range(30) for step in range(30)}
    assert len(first) > 890  # float32: a few of 900 may meet
    assert torch.equal(torch.rand(3, generator=step_generator(2, 5)), torch.rand(3, generator=step_generator(2, 5)))


def test_learning_rate_warms_up_and_decays():
    assert [lr_factor(s, 100, warmup=4) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1., 1., 1.]
    cosine = [lr_factor(s, 100, decay="cosine") for s in range(100)]
    assert cosine[0] == 1 and all(a > b for a, b in zip(cosine, cosine[1:])) and cosine[-1] < 1e-3
    with pytest.raises(ValueError, match="decay='linear'"): lr_factor(0, 10, decay="linear")


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    "Without clipping only the loss is looked at, and it may be finite when its gradient is not."
    def model_and_optimizer():
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        return model, torch.optim.Adam(model.parameters())
    step = [0]
    def bad(model, generator):
        step[0] += 1
        value = model.weight.square().sum()
        return value + (model.weight - model.weight).abs().sqrt().sum() if step[0] == 10 else value  # 0, with the gradient 0/0
    model, optimizer = model_and_optimizer()
    with pytest.raises(FloatingPointError, match="the weights are not finite at step 10.*last good checkpoint: step-00000005"):
        for _ in fit(model, bad, 20, optimizer, 0, folder=tmp_path, checkpoint_every=5): pass
    model, optimizer = model_and_optimizer()
    assert [s.step for s in fit(model, lambda m, generator: m.weight.square().sum(), 7, optimizer, 0, folder=tmp_path, checkpoint_every=5)] == [6, 7]


def test_a_checkpoint_that_is_being_written_is_left_alone(tmp_path):
    "Two processes in one folder; and what a killed one left goes."
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine, dead = part_name("checkpoint"), part_name("checkpoint").replace(f"-{os.getpid()}-", f"-{gone.pid}-")
    for name in (mine, dead): (tmp_path/name).mkdir()
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(1)}}, {}, {}, [])
    assert (tmp_path/mine).exists() and not (tmp_path/dead).exists() and (tmp_path/"step-00000001").exists()


@pytest.mark.parametrize("change, says", [
    ({"lr": 2e-2}, r"lr=\[0.01\] there and \[0.02\] here"), ({"betas": (0.5, 0.9)}, r"betas=\[\[0.9, 0.999\]\] there and \[\[0.5, 0.9\]\] here"),
    ({"seed": 1}, "seed=0 there and 1 here"), ({"decay": "cosine"}, "decay='constant' there and 'cosine' here"), ({"ema": 0.9}, "ema=None there and 0.9 here"),
    ({"clip": 1.}, "clip=None there and 1.0 here"), ({"warmup": 3}, "warmup=0 there and 3 here"), ({"foreach": False}, None), ({"steps": 9}, None),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_other_settings_are_refused_by_name(tmp_path, change, says):
    "An optimiser would take its own from the checkpoint in silence. What only changes the speed is free, and a longer training with a constant rate too."
    def go(steps=6, lr=1e-2, seed=0, betas=(0.9, 0.999), foreach=None, **more):
        net = nn.Linear(2, 1)
        optimizer = torch.optim.Adam(net.parameters(), lr, betas, foreach=foreach)
        return [s.step for s in fit(net, lambda m, generator: m.weight.square().sum(), steps, optimizer, seed, folder=tmp_path, config={"run": 1}, checkpoint_every=3, **more)]
    assert go() == [1, 2, 3, 4, 5, 6]
    if says is None: assert go(**change) == list(range(6, change.get("steps", 6) + 1))[change.get("steps", 6) > 6:]
    else:
        with pytest.raises(ValueError, match=says): go(**change)


def test_the_same_optimiser_goes_on(tmp_path):
    "Its rate has been lowered by the schedule; the peak is what counts."
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    def go(): return fit(net, lambda m, generator: m.weight.square().sum(), 8, optimizer, 0, folder=tmp_path, decay="cosine", checkpoint_every=4)
    for state in go():
        if state.step == 5: break
    assert [s.step for s in go()] == [5, 6, 7, 8]


def test_a_loop_that_is_left_at_a_checkpoint_has_written_it(tmp_path):
    train(tmp_path, stop=20)
    assert steps_in(tmp_path)[-1] == "step-00000020"


def test_tied_weights_are_kept(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
    def go(steps):
        torch.manual_seed(0)
        net = Tied()
        optimizer = torch.optim.SGD(net.parameters(), 1e-2)
        *_, state = fit(net, lambda m, generator: m.b(m.a(torch.ones(3))).sum(), steps, optimizer, 0, folder=tmp_path, config={"tied": True}, checkpoint_every=4)
        return state.model
    trained, again = go(4), go(4)
    assert torch.equal(trained.a.weight, again.b.weight) and again.a.weight is again.b.weight


def test_what_somebody_keeps_beside_the_checkpoints_stays(tmp_path):
    "Only folders named by a step are checkpoints; and they alone are counted, removed and resumed from."
    train(tmp_path, stop=20)
    for name in ("step-00000020-best", "step-best"): shutil.copytree(tmp_path/"step-00000020", tmp_path/name)
    (tmp_path/"step-notes.txt").write_text("mine")
    state, calls = train(tmp_path)
    assert len(calls) == 20 and state.step == 40
    assert {"step-00000020-best", "step-best", "step-notes.txt"} <= set(steps_in(tmp_path)) and len(steps_in(tmp_path)) == 5
    assert load_checkpoint(tmp_path, {"rate": 1e-2})["step"] == 40


def small(**more):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    return net, lambda **args: list(fit(net, lambda m, generator: m(torch.ones(8, 2)).square().mean(), 4, torch.optim.Adam(net.parameters(), 1e-2), 0, **more | args))


def drawn(step, generator): return {"x": torch.ones(8, 2)}


@pytest.mark.parametrize("more, says", [
    ({"ema": 1.5}, "ema=1.5; expected a decay"), ({"clip": -1.}, "clip=-1.0; expected a norm"), ({"micro": 4}, "micro and bf16 need `draw`"),
    ({"draw": drawn, "micro": 0}, "micro=0"),
    ({"minutes": 0}, "minutes=0; expected a time above 0"), ({"minutes": float("nan")}, "minutes=nan"), ({"config": {"where": Path("x")}}, "config cannot be kept"),
    ({"evaluate": lambda state: None}, "evaluate gave a NoneType"), ({"evaluate": lambda state: {"it": state}}, "evaluate gave something that a record cannot hold"),
    ({"draw": lambda step, generator: (1, 2)}, "draw gave a tuple; expected a dictionary"),
    ({"draw": lambda step, generator: {"x": torch.ones(8, 2), "n": 3}}, "draw gave a dict"),
    ({"draw": lambda step, generator: {"x": torch.ones(8, 2), "y": torch.ones(6)}}, "batch of {'x': 8, 'y': 6}; expected as many"),
    ({"draw": lambda step, generator: {"x": torch.ones(0, 2)}}, "at least one"),
])
def test_arguments_that_do_not_fit(more, says):
    with pytest.raises(ValueError, match=says): small(**more)[1]()


def test_training_nothing_is_an_error():
    net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    def go(model, held): return list(fit(model, lambda m, generator: m.weight.square().sum(), 4, torch.optim.Adam(held.parameters()), 0))
    with pytest.raises(ValueError, match="the optimiser holds no parameter of this Linear"): go(net, other)
    with pytest.raises(ValueError, match="Linear has no parameters that are trained"): go(net.requires_grad_(False), other)
    with pytest.raises(ValueError, match=r"loss gave shape \(2,\); expected one number"):
        list(fit(other, lambda m, generator: m.weight[0], 4, torch.optim.Adam(other.parameters()), 0))


def test_clipping_looks_at_what_is_trained(tmp_path):
    "With an optimiser of the head alone, gradients of the rest neither pile up nor count."
    torch.manual_seed(0)
    body, head = nn.Linear(2, 4), nn.Linear(4, 1)
    net = nn.Sequential(body, head)
    for state in fit(net, lambda m, generator: 100 * m(torch.ones(8, 2)).square().mean(), 5, torch.optim.SGD(head.parameters(), 1e-9), 0, clip=1e-3):
        own = torch.stack([p.grad.norm() for p in head.parameters()]).norm()
        torch.testing.assert_close(own, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_step(tmp_path):
    (tmp_path/"file").write_text("")
    seen = []
    with pytest.raises(OSError, match="checkpoints cannot be written to .*file"): small(folder=tmp_path/"file", evaluate=lambda state: seen.append(1) or {})[1]()
    assert not seen


def test_what_is_measured_is_kept_as_plain_values(tmp_path):
    small(folder=tmp_path, evaluate=lambda state: {"a": torch.tensor(1.5), "b": np.float32(0.5), "c": [torch.arange(2)]}, every=2, checkpoint_every=2)[1]()
    assert load_checkpoint(tmp_path, {})["record"][-1] == {"step": 4, "a": 1.5, "b": 0.5, "c": [[0, 1]]}


def test_modes(tmp_path):
    "Measured, and left, in eval mode; trained in train mode, but for layers that were in eval mode before."
    measured, trained = [], []
    net, _ = small()
    net[1].eval()
    def loss(model, generator):
        trained.append((model.training, model[1].training, model[2].training))
        return model(torch.ones(8, 2)).square().mean()
    for _ in fit(net, loss, 4, torch.optim.Adam(net.parameters()), 0, evaluate=lambda state: measured.append(state.ema.training) or {}, every=1): pass
    assert set(trained) == {(True, False, True)} and set(measured) == {False} and len(measured) == 5 and not any(m.training for m in net.modules())


def test_dropout_depends_on_the_seed_alone():
    found = []
    for global_seed in (1, 2):
        net, go = small()
        torch.manual_seed(global_seed)
        go()
        found.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_finished_training_without_a_name_says_so(tmp_path):
    small(folder=tmp_path)[1]()
    with pytest.warns(UserWarning, match="finished at step 4: nothing is trained. `config` tells trainings apart"): small(folder=tmp_path)[1]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(folder=tmp_path/"named", config={"run": 1})[1]()
        small(folder=tmp_path/"named", config={"run": 1})[1]()


@pytest.mark.parametrize("more", [{}, {"log_every": 2}], ids=["without a log", "with a log"])
def test_a_stop_by_minutes_keeps_a_checkpoint_and_leaves_eval_mode(tmp_path, more):
    "After the first step, which may have been compiled for long."
    net, go = small(folder=tmp_path, minutes=1e-9, **more)
    assert go()[-1].step == 1 and not any(m.training for m in net.modules()) and steps_in(tmp_path) == ["step-00000001"]
    assert small(folder=tmp_path)[1]()[-1].step == 4


def test_the_time_is_looked_at_where_the_log_has_a_line(tmp_path, monkeypatch):
    "And not in every step, for then all processes would have to wait for one another."
    ticks = itertools.count()
    monkeypatch.setattr("dlsm.training.time.monotonic", lambda: next(ticks) * 1.)
    net, go = small(folder=tmp_path, minutes=2.5 / 60, log_every=3)
    assert go()[-1].step == 3 and steps_in(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("steps, bad, change, says", [
    (20, 8, lambda loss: loss * float("nan"), "loss is nan at step 8"), (2000, 8, lambda loss: loss * float("nan"), "loss is nan at step 8"),
    (20, 20, lambda loss: loss + (loss - loss).sqrt(), "the weights are not finite at step 20")], ids=["at the end", "after 1000 steps", "the last gradient"])
def test_what_is_not_finite_is_found_without_evaluations_and_checkpoints(steps, bad, change, says):
    net, done = nn.Linear(2, 1), []
    def loss(model, generator): return change(model.weight.square().sum()) if len(done) + 1 == bad else model.weight.square().sum()
    with pytest.raises(FloatingPointError, match=says):
        for state in fit(net, loss, steps, torch.optim.SGD(net.parameters(), 1e-3), 0, every=0, checkpoint_every=0): done.append(state.step)
    assert len(done) == min(steps, 1000) - 1


def test_losses_whose_sum_is_too_large_go_on(tmp_path):
    "Each is a number, and so is their mean."
    net = nn.Linear(2, 1)
    def loss(model, x): return model(x)[:, 0] * 1e-9 + 3e38
    states = list(fit(net, loss, 4, torch.optim.SGD(net.parameters(), 1e-3), 0, tmp_path, draw=drawn_one, log_every=4))
    line = json.loads((tmp_path/"log.jsonl").read_text().splitlines()[-1])
    assert states[-1].step == 4 and line["loss"] == pytest.approx(3e38, rel=1e-6)


def drawn_one(step, generator): return {"x": torch.ones(1, 2)}


def test_a_rate_that_was_changed_since_is_the_peak():
    "The schedule's own changes are none."
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    def rates(decay): return [optimizer.param_groups[0]["lr"] for _ in fit(net, lambda m, generator: m.weight.square().sum(), 4, optimizer, 0, decay=decay)]
    first = rates("cosine")
    assert first[0] == 1e-2 and first[-1] < 2e-3 and rates("cosine") == first
    optimizer.param_groups[0]["lr"] = 5e-3
    assert rates("constant") == 4 * [5e-3] and rates("cosine")[0] == 5e-3


def test_a_rate_that_was_changed_since_is_another_training(tmp_path):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    def go(): return [s.step for s in fit(net, lambda m, generator: m.weight.square().sum(), 4, optimizer, 0, tmp_path, {"run": 1}, decay="cosine")]
    assert go() == [1, 2, 3, 4] and go() == [4]
    optimizer.param_groups[0]["lr"] = 5e-3
    with pytest.raises(ValueError, match=r"lr=\[0.01\] there and \[0.005\] here"): go()


def test_a_checkpoint_past_the_steps_is_refused(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match="at step 40, past the 30 asked for: ask for at least 40 steps"): train(folder, steps=30)
    assert steps_in(folder) == ["step-00000030", "step-00000040"]


def test_a_checkpoint_of_another_network_is_refused_by_name(tmp_path):
    def go(*layers):
        net = nn.Sequential(*layers)
        return list(fit(net, lambda m, generator: m(torch.ones(8, 2)).square().mean(), 4, torch.optim.SGD(net.parameters(), 1e-2), 0, tmp_path, {"run": 1}))
    go(nn.Linear(2, 4), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"of another training: 0.bias=\(4,\) there and \(3,\) here, 0.weight=\(4, 2\) there and \(3, 2\) here, 1.weight=.*; remove") as e:
        go(nn.Linear(2, 3), nn.Linear(3, 1))
    assert "more" not in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"1.bias=\(1,\) there and None here, 1.weight=\(1, 4\) there and None here, 2.bias=None there and \(1,\) here and 1 more"):
        go(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
