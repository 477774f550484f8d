"""Paths, results and the check of parameters."""
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass

import pytest
import torch

from dlsm.files import atomic_write, sha256
from dlsm.presets import MOONS, ParameterError, check_parameters, pick_device
from dlsm.runs import (
    figure_dir,
    find_root,
    list_results,
    load_result,
    need,
    paper,
    progress,
    run_dir,
    save_result,
    text_about,
)

nbformat = pytest.importorskip("nbformat")


@dataclass(frozen=True)
class Preset:
    name:str
    steps:int = 3


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    return tmp_path


def files(folder): return sorted(p.name for p in folder.iterdir() if p.is_file())


# ---- paths

def test_root(root, tmp_path, monkeypatch):
    monkeypatch.delenv("DLSM_ROOT", raising=False)
    assert find_root(root/"nbs") == find_root(root) == root
    with pytest.raises(FileNotFoundError, match="DLSM_ROOT"): find_root(tmp_path)
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nlib_name = another\n")
    with pytest.raises(FileNotFoundError): find_root(tmp_path)
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path/"missing"))
    with pytest.raises(FileNotFoundError, match="not a folder"): find_root()


@pytest.mark.parametrize("content", [b"lib_name = dlsm\n", "[Größe]\na = 1\n".encode("latin-1"), b"[a]\n[a]\n", "[DEFAULT]\na = 1\n".encode("utf-16")],
                         ids=["no section", "latin-1", "twice the same", "UTF-16"])
def test_settings_of_other_programs_are_passed_over(root, tmp_path, monkeypatch, content):
    monkeypatch.delenv("DLSM_ROOT", raising=False)
    (tmp_path/"ours"/"theirs").mkdir(parents=True)
    (tmp_path/"settings.ini").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="no settings.ini with lib_name = dlsm"): find_root(tmp_path)
    (tmp_path/"ours"/"settings.ini").write_bytes(b"\xef\xbb\xbf" + (root/"settings.ini").read_bytes())  # as an editor of Windows writes it
    (tmp_path/"ours"/"theirs"/"settings.ini").write_bytes(content)
    assert find_root(tmp_path/"ours"/"theirs") == tmp_path/"ours"


def test_each_preset_has_its_own_folders(home):
    folders = [figure_dir("moons", preset) for preset in ("smoke", "demo", "paper", "mine")]
    assert len(set(folders)) == 4 and figure_dir("moons") == figure_dir("moons", "demo") == home/"figures/moons"
    assert figure_dir("cifar10", "cpu") == figure_dir("cifar10", "demo")  # which a run on a GPU replaces
    assert folders[0] == home/"runs/smoke/figures/moons" and not folders[0].exists()
    assert run_dir("moons", "demo", "prior").is_dir() and not run_dir("moons", "demo", "other", make=False).exists()


def test_need(home):
    with pytest.raises(FileNotFoundError) as e: need(home/"runs/prior.pt", "04_moons", preset="demo")
    assert str(e.value) == "runs/prior.pt is missing: run `papermill nbs/04_moons.ipynb out.ipynb -k python3 -p preset demo` first"
    path = atomic_write(home/"runs/prior.pt", b"1")
    assert need(path, "04_moons") == path


# ---- results

def save(values, preset, title="reduced", **more):
    return save_result("table1", values, preset=preset, dataset="moons", seeds=range(2), device="cpu", started=time.time(),
                       title=title, **more)


def test_roundtrip(home):
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.plot([0, 1])
    source = atomic_write(home/"runs/x.pt", b"x")
    values = {"D_L": torch.tensor([[0.5, 0.25]]), "n": 3, "none": None, "note": "σ"}
    path = save(values, Preset("demo"), paper=paper("table1", "D_L", "dlsm"), inputs=[source], figure=fig, table="| a |")
    pictures = [path.with_suffix(s).read_bytes() for s in (".png", ".svg")]
    result = load_result("table1", "moons", "demo")
    assert result["values"] == {"D_L": [[0.5, 0.25]], "n": 3, "none": None, "note": "σ"} and result["paper"] == [0.052, 0.052]
    assert result["preset"] == {"name": "demo", "steps": 3} and result["seeds"] == [0, 1]
    assert result["inputs"] == {"runs/x.pt": sha256(source)} and result["versions"]["torch"] and result["commit"] is None
    assert result["time"].endswith("+00:00") and result["wall_seconds"] >= 0
    assert list_results() == [path] and list_results("smoke") == []
    assert files(path.parent) == ["table1.json", "table1.md", "table1.png", "table1.svg"]
    text, title = (" ".join(re.findall(r"<!-- (.*?) -->", path.with_suffix(".svg").read_text(encoding="utf-8"))), result["title"])
    assert title in text and not fig.texts, "a picture says by itself what it is"  # Matplotlib notes the text beside its outlines
    save(values, Preset("demo"), figure=fig)
    plt.close(fig)
    assert pictures == [path.with_suffix(s).read_bytes() for s in (".png", ".svg")], "the same figure gives the same bytes"


@pytest.fixture
def plain_git(tmp_path_factory, monkeypatch):
    "git as if nobody had set it up, whatever the user has: here signatures that fail, and hooks that refuse."
    user = tmp_path_factory.mktemp("user")
    for hook in ("pre-commit", "commit-msg"): atomic_write(user/"hooks"/hook, "#!/bin/sh\nexit 1\n").chmod(0o755)
    (user/".gitconfig").write_text(f"[commit]\n\tgpgsign = true\n[gpg]\n\tprogram = false\n[core]\n\thooksPath = {user/'hooks'}\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(user))
    for name in [name for name in os.environ if name.startswith("GIT_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def test_commit_is_recorded(home, plain_git):
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", "-C", home, *command], check=True)
    save({"a": 1}, Preset("demo"))
    result = load_result("table1", "moons")
    assert len(result["commit"]) == 40 and result["dirty"] is False


def test_presets_do_not_overwrite_each_other(home):
    for i, name in enumerate(("demo", "paper", "smoke")): save({"i": i}, Preset(name))
    assert [load_result("table1", "moons", name)["values"]["i"] for name in ("demo", "paper", "smoke")] == [0, 1, 2]
    assert len(list_results()) == 2 and len(list_results("smoke")) == 1


@pytest.mark.parametrize("values", [{"a": float("nan")}, {"a": [1., float("inf")]}, {"a": torch.tensor(float("nan"))}, {"a": object()}])
def test_values_that_are_none(home, values):
    with pytest.raises(ValueError, match=r"values\['a'\]"): save(values, Preset("demo"))
    assert list_results() == []


def test_keys_that_are_the_same_as_text(home):
    "One would replace the other in silence."
    with pytest.raises(ValueError, match=r"values\['a'\] has two keys that are '1' as text"): save({"a": {1: 0.5, "1": 0.25}}, Preset("demo"))
    save({"a": {1: 0.5, 2: 0.25}}, Preset("demo"))
    assert load_result("table1", "moons")["values"] == {"a": {"1": 0.5, "2": 0.25}}


def test_reduced_results_say_so(home):
    save({"a": 1}, Preset("CPU"), title="Table 1, preset CPU")
    with pytest.raises(ValueError, match="reduced"): save({"a": 1}, Preset("demo"), title="Table 1")
    save({"a": 1}, Preset("paper"), title="Table 1")
    save({"a": 1}, None, title="Fig. 2")


def test_missing_result_and_missing_number(home):
    save({"a": 1}, Preset("demo"))
    with pytest.raises(FileNotFoundError, match="figures/moons/table1.json"): load_result("fig1", "moons")
    with pytest.raises(KeyError, match="table1/D_X"): paper("table1", "D_X")


# ---- parameters

RULES = dict(preset=MOONS, seed=range(0, 10), scale=(0., 1.), data_dir=str | None, verbose=bool, steps=(None, range(1, 5)), lr=float)
GOOD = dict(preset="demo", seed=0, scale=1, data_dir=None, verbose=False, steps=None, lr=1)


def test_good_parameters():
    check_parameters(GOOD | {"_hidden": 1, "module": json}, **RULES)
    check_parameters(GOOD | {"steps": 4, "data_dir": "x", "scale": 0.5, "verbose": True}, **RULES)


@pytest.mark.parametrize("wrong, told", [
    (dict(preset="dmo"), "did you mean demo?"), (dict(preset=None), "'smoke' or 'demo' or 'paper'"),
    (dict(seed="5"), "a whole number from 0 to 9"), (dict(seed=1.), "whole number"), (dict(seed=True), "whole number"),
    (dict(seed=10), "from 0 to 9"), (dict(scale=1.1), "a number from 0 to 1"), (dict(scale=float("nan")), "nan"),
    (dict(scale="1"), "number"), (dict(data_dir=3), "a text or None"), (dict(data_dir=True), "a text or None"),
    (dict(verbose=1), "True or False"), (dict(verbose="yes"), "True or False"),
    (dict(steps=0), "None or a whole number from 1 to 4"), (dict(lr=float("inf")), "a number"),
    (dict(sed=1), "unknown parameter sed; did you mean seed?"),
    (dict(zzz=None), "unknown parameter zzz (this notebook has: preset, seed")])
def test_bad_parameters(wrong, told):
    with pytest.raises(ParameterError) as e: check_parameters(GOOD | wrong, **RULES)
    assert told in str(e.value) and "\n" not in str(e.value) and e.value._render_traceback_() == [f"ParameterError: {e.value}"]


def test_missing_parameter():
    with pytest.raises(ParameterError, match="seed is not set"): check_parameters({"preset": "demo"}, **RULES)


def test_a_number_among_choices_that_are_texts_is_a_text():
    "papermill makes the number 2 of `-p stages 2`."
    given = {"stages": 2}
    check_parameters(given, stages=("1", "2", "1,2"))
    assert given == {"stages": "2"}
    for wrong in (3, True, 2.):
        with pytest.raises(ParameterError, match="stages = "): check_parameters({"stages": wrong}, stages=("1", "2", "1,2"))
    kept = {"steps": 2}
    check_parameters(kept, steps=(None, range(1, 5)))
    assert kept == {"steps": 2}


@pytest.mark.parametrize("rule, right, wrong, told", [
    (int | None, (3, None), (True, 1.5, "3"), "a whole number or None"), (float | None, (1, 0.5, None), (float("nan"), float("inf"), True, "1"), "a number or None"),
    (str | int, ("a", 2), (False, None), "a text or a whole number"), (bool | None, (True, None), (1,), "True or False or None")])
def test_types_with_alternatives_are_as_strict_as_each(rule, right, wrong, told):
    for value in right: check_parameters({"steps": value}, steps=rule)
    for value in wrong:
        with pytest.raises(ParameterError, match=f"must be {told}"): check_parameters({"steps": value}, steps=rule)


@pytest.mark.parametrize("given, told", [({"seed": 3, "preset": "demo"}, None), ({"sed": 3}, "ParameterError: unknown parameter sed;")])
def test_parameters_through_papermill(tmp_path, given, told):
    import papermill
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    sources = ["before = 1", 'preset: str = "smoke"  # smoke, demo or paper\nseed: int = 0', "from dlsm.runs import check_parameters\n"
               'check_parameters(globals(), preset=("smoke", "demo"), seed=range(10))', "other = 5",
               'check_parameters(globals(), preset=("smoke", "demo"), seed=range(10))  # again, as a reader does']
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path/"in.ipynb")
    def execute(): papermill.execute_notebook(tmp_path/"in.ipynb", tmp_path/"out.ipynb", given, kernel_name="python3", progress_bar=False)
    if told is None: return execute()
    with pytest.raises(papermill.PapermillExecutionError) as e: execute()
    assert e.value.traceback == [e.value.traceback[0]] and e.value.traceback[0].startswith(told)


def test_device():
    assert pick_device("cpu").type == "cpu" and pick_device() in (torch.device("cpu"), torch.device("cuda"))
    assert pick_device(torch.device("cpu")) == torch.device("cpu")
    for wrong in ("cuda:99", torch.device("cuda:99")):
        with pytest.raises(ParameterError, match="device = 'cuda:99' is not on this machine .there is: cpu"): pick_device(wrong)
    for wrong in ("mps", torch.device("mps"), torch.device("mps", 0)):
        with pytest.raises(ParameterError, match="cannot be used: exact scores"): pick_device(wrong)


def test_progress_without_audience(capsys):
    assert list(progress(range(3), "training", every=0.)) == [0, 1, 2] and list(progress(iter("ab"))) == ["a", "b"]
    assert capsys.readouterr().out.splitlines() == [f"training {i} of 3, 0 s" for i in (1, 2, 3)]


def test_a_text_has_to_be_true_of_the_committed_numbers_only(capsys):
    "A run of one's own is told from them in one line, with what was asserted."
    value = 3
    with text_about(None): assert value == 3
    with text_about(None): assert value == 4, "FID"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "not as the text says of the committed one (FID): value == 4" in said
    with pytest.raises(AssertionError), text_about({"values": 1}): assert value == 4
    with pytest.raises(ValueError, match="not about a text"), text_about(None): raise ValueError("not about a text")
