"""Committed results against those of another run."""
import json
import re
import shutil
import subprocess

import pytest

import dlsm.verify
from dlsm.compare import compare_folders, compare_values, control, counts, table_of
from dlsm.files import sha256
from dlsm.runs import find_root, save_result
from dlsm.verify import known_notebooks, main, record_of, summary


@pytest.mark.parametrize(("ours", "verdict"), (
    ({"D_L": 0.16}, "identical"), ({"D_L": 0.17}, "within tolerance"), ({"D_L": 0.25}, "different"), ({}, "missing"), ({"D_L": None}, "different"), (None, "missing")))
def test_values_within_and_without_tolerance(ours, verdict):
    assert [row.verdict for row in compare_values("moons/table1", ours, {"D_L": 0.16})] == [verdict]


@pytest.mark.parametrize(("result", "values", "verdict"), (
    ("moons/table1: D_L", (0.012, 0.), "not judged"), ("moons/table1: D_L", (0.012, 0.012), "identical"), ("moons/table1: D_L", (0.012, 0.012000001), "within tolerance"),
    ("moons/table1: D_L", (0.012, 0.1), "different"), ("digits/fig4: classes_higher", (3, 9), "not judged"), ("digits/fig4: classes_higher", (3, 3), "identical"),
    ("digits/fig4: classes_higher", (3, "3"), "different"), ("digits/fig4: classes_higher", (3, True), "different"), ("moons/fig1: D_L.sd", (0.2, 0.), "not judged"),
    ("moons/fig1: D_L.sd", (0.2, 0.7), "different")))
def test_a_tolerance_that_lets_0_pass_judges_nothing(result, values, verdict):
    result, _, path = result.partition(": ")
    committed, ours = ({path: value} for value in values)
    assert [row.verdict for row in compare_values(result, ours, committed)] == [verdict]


def test_what_nobody_trained_is_tight_and_times_are_left_out():
    assert [r.verdict for r in compare_values("moons/fig2", {"quadrature": {"C": 0.31301}}, {"quadrature": {"C": 0.31302}})] == ["different"]
    assert [r.verdict for r in compare_values("digits/fig3", {"seconds": 3.}, {"seconds": 300.})] == ["not compared"]
    assert [r.verdict for r in compare_values("digits/fig3", {"holds": False, "more": 1}, {"holds": True})] == ["different", "missing"]


def test_false_numbers_are_found_out(root):
    """Every number of the committed results, falsified: none that is set to 0 or doubled passes as within tolerance, none counts as identical.

    The rates are what the tolerances are worth where two runs are not identical: a third is called different at 0, one in twelve at 1.2 times;
    where no training is behind the numbers, as in the checks of Fig. 2, all are."""
    found = compare_folders(root/"figures", root/"figures", ["moons", "digits"], "demo")
    judged = control(found)
    total = sum(judged["set to 0"].values())
    assert total > 5000 and judged["set to 0"]["within tolerance"] == judged["times 2"]["within tolerance"] == 0
    shares = {way: number["different"]/total for way, number in judged.items()}
    assert shares["set to 0"] > 0.33 and shares["times 1.2"] > 0.08 and shares["times 2"] > 0.33, shares
    exact = control({"moons/fig2": [row for row in found["moons/fig2"] if re.search(r": (quadrature|monte_carlo)\.(?!relative_spread)", row.name)]})
    assert all(number["different"] == sum(number.values()) > 40 for number in exact.values()), exact
    false = json.loads((root/"figures/moons/table1.json").read_text(encoding="utf-8"), parse_float=lambda text: 0.)["values"]  # all at once
    off = counts(compare_values("moons/table1", false, json.loads((root/"figures/moons/table1.json").read_text(encoding="utf-8"))["values"]))
    assert off["within tolerance"] == 0 and off["different"] > 50, off


def test_the_command_line_compares_folders(tmp_path, capsys):
    committed = find_root() / "figures"
    same = compare_folders(committed, committed, ["moons", "digits"], "demo")
    assert "moons/table1" in same and all(row.verdict in ("identical", "not compared") for rows in same.values() for row in rows)
    result = json.loads((committed / "moons/table1.json").read_text(encoding="utf-8"))
    result["values"]["zero_score_D_L"][0] += 1
    for folder, values in (("a", result), ("b", json.loads((committed / "moons/table1.json").read_text(encoding="utf-8")))):
        (tmp_path / folder / "moons").mkdir(parents=True)
        (tmp_path / folder / "moons/table1.json").write_text(json.dumps(values), encoding="utf-8")
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out
    assert "zero_score_D_L[0]" in said and "Control: of" in said and "copies" not in said
    assert main([str(tmp_path / "b"), str(tmp_path / "b")]) == 0 and "copies, from no other run: moons/table1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing to compare with"): main([str(tmp_path), str(tmp_path / "none")])
    assert table_of(same).startswith("| result |")


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    "A repository with two results, and the figures of another run, in which one is 5% off."
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    for shift in (1.05, 1.):
        for name in ("table1", "fig1"):
            save_result(name, {"D_L": [0.16*shift, 0.05, 0.012*shift]}, preset=None, dataset="moons", seeds=[0], device="cpu", started=0., title="D_L")
        if shift > 1: shutil.move(tmp_path/"figures", tmp_path/"other")
    return tmp_path/"other", tmp_path/"figures"


def test_what_runs_only_if_asked_for_is_not_missed(two_runs, capsys):
    "The trainings of 07a are compared where both have them."
    ours, figures = two_runs
    for folder in (figures, ours):
        shutil.copy(figures/"moons/fig1.json", folder/"moons/trainings.json")
        assert main([str(ours), str(figures)]) == 0
        assert ("moons/trainings" in capsys.readouterr().out) is (folder == ours)


def test_the_record_is_about_the_files_that_were_compared(two_runs, capsys):
    "A result that is made anew takes its verdict with it; a copied file is no other run."
    ours, figures = two_runs
    assert main([str(ours), str(figures)]) == 0 and "written: figures/verify.json" in capsys.readouterr().out
    record = json.loads((figures/"verify.json").read_text(encoding="utf-8"))["values"]
    assert record["sha256"] == {name: sha256(figures/f"{name}.json") for name in ("moons/fig1", "moons/table1")}
    assert record["run"]["dirty"] is False and record["notebooks"] is None and "2 | 2 | 2 |" in (figures/"verify.md").read_text(encoding="utf-8")
    assert summary(record, figures).endswith("values 2 identical, 2 within tolerance, 2 not judged")
    page = (figures/"verify.md").read_text(encoding="utf-8")
    for said in ("# Values that were compared", f"on {', '.join(record['run']['devices'])}, commit", "[moons/table1](moons/table1.json)", "- **not judged**: ", "Control: of"):
        assert said in page, said
    assert "no tolerance was needed" not in page  # one is 5% off
    path = figures/"moons/fig1.json"
    path.write_text(path.read_text(encoding="utf-8").replace("0.16", "0.12"), encoding="utf-8")
    assert summary(record, figures).endswith("values 1 identical, 1 within tolerance, 1 not judged; 1 of 2 results have been made anew since, and are not counted")
    assert main([str(ours), str(figures)]) == 1
    record = json.loads((figures/"verify.json").read_text(encoding="utf-8"))["values"]
    assert summary(record, figures).endswith("values 2 identical, 1 within tolerance, 2 not judged, 1 different, 0 missing")
    assert "committed 0.12" in (figures/"verify.md").read_text(encoding="utf-8")
    shutil.copy(path, ours/"moons/fig1.json")
    assert record_of(compare_folders(ours, figures), ours, figures)["results"].keys() == {"moons/table1"}
    for file in figures.glob("moons/*.json"): file.unlink()
    assert summary(record, figures) == summary({}, figures) == ""


def test_a_run_is_recorded_with_its_notebooks(two_runs, monkeypatch, capsys):
    "Of the run itself, which takes minutes, only what it leaves: results, and the list of notebooks that were executed."
    ours, figures = two_runs
    folder = figures.parent/"runs"/"verify"/"abc"
    shutil.copytree(ours, folder/"clone"/"figures")
    shutil.copytree(figures, folder/"committed")
    monkeypatch.setattr(dlsm.verify, "fresh_clone", lambda root: folder)
    for ran, status in ((["moons/03_dlsm", "moons/04_moons"], 0), (["moons/04_moons"], 1)):
        monkeypatch.setattr(dlsm.verify, "run_all", lambda *args, ran=ran: (ran, ["moons/03_dlsm", "moons/04_moons"]))
        assert main(["--dataset", "moons"]) == status
        said = f"notebooks {len(ran)} / 2 executed; values 2 identical, 2 within tolerance, 2 not judged"
        record = json.loads((figures/"verify.json").read_text(encoding="utf-8"))["values"]
        assert capsys.readouterr().out.rstrip().endswith(said) and summary(record, figures).endswith(said)


def test_copies_are_not_recorded(two_runs, capsys):
    _, figures = two_runs
    assert main([str(figures), str(figures)]) == 0 and "written" not in capsys.readouterr().out and not (figures/"verify.json").exists()


def test_the_committed_record_belongs_to_the_committed_figures(root):
    "README.md shows what figures/verify.json says of the figures that are committed, and nothing that it says of others."
    def git(*args): return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=True).stdout
    if not (root/".git").exists(): pytest.skip("not a git repository")
    if git("status", "--porcelain", "--", "figures", "README.md", "nbs/index.ipynb").strip(): pytest.skip("figures/, README.md or the index is not as committed")
    record = json.loads((root/"figures/verify.json").read_text(encoding="utf-8"))["values"]
    shown = re.findall(r"^\*\*(?:Run again in a fresh clone|Compared with another run)\*\*: (.*?) \(\[counts", (root/"README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert shown == list(filter(None, [summary(record, root/"figures")])), "run nbs/index.ipynb and `make readme`"


def test_every_story_notebook_counts(root):
    known = known_notebooks(root, "demo", ["moons", "digits"])
    assert len(known) == len(set(known)) and {"moons/04_moons", "digits/07_evaluation", "all/09_report"} <= set(known)
    assert {name.partition("/")[2] for name in known} == {p.stem for p in root.glob("nbs/0*.ipynb")} - {"07a_trainings"} | {"index"}  # only if asked for
