"""Committed results against those of another run."""
import json

import pytest

from dlsm.runs import find_root
from dlsm.verify import compare_folders, compare_values, counts, known_notebooks, main, table_of


@pytest.mark.parametrize(("ours", "verdict"), (({"D_L": 0.17}, "equal"), ({"D_L": 0.25}, "different"), ({}, "missing"), ({"D_L": None}, "different"), (None, "missing")))
def test_values_within_and_without_tolerance(ours, verdict):
    assert [row.verdict for row in compare_values("moons/table1", ours, {"D_L": 0.16})] == [verdict]


def test_what_nobody_trained_is_tight_and_times_are_left_out():
    assert [r.verdict for r in compare_values("moons/fig2", {"quadrature": {"C": 0.31301}}, {"quadrature": {"C": 0.31302}})] == ["different"]
    assert [r.verdict for r in compare_values("digits/fig3", {"seconds": 3.}, {"seconds": 300.})] == ["not compared"]
    assert [r.verdict for r in compare_values("digits/fig3", {"holds": False, "more": 1}, {"holds": True})] == ["different", "missing"]


def test_the_command_line_compares_folders(tmp_path, capsys):
    committed = find_root() / "figures"
    same = compare_folders(committed, committed, ["moons", "digits"], "demo")
    assert "moons/table1" in same and all(equal == total > 0 or "joint" in name for name, (equal, total, _) in ((n, counts(r)) for n, r in same.items()))
    result = json.loads((committed / "moons/table1.json").read_text(encoding="utf-8"))
    result["values"]["zero_score_D_L"][0] += 1
    for folder, values in (("a", result), ("b", json.loads((committed / "moons/table1.json").read_text(encoding="utf-8")))):
        (tmp_path / folder / "moons").mkdir(parents=True)
        (tmp_path / folder / "moons/table1.json").write_text(json.dumps(values), encoding="utf-8")
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1 and "zero_score_D_L[0]" in capsys.readouterr().out
    assert main([str(tmp_path / "b"), str(tmp_path / "b")]) == 0
    with pytest.raises(SystemExit, match="nothing to compare with"): main([str(tmp_path), str(tmp_path / "none")])
    assert table_of(same).startswith("| result |")


def test_every_story_notebook_counts(root):
    known = known_notebooks(root, "demo", ["moons", "digits"])
    assert len(known) == len(set(known)) and {"moons/04_moons", "digits/07_evaluation", "all/09_report"} <= set(known)
    assert {name.partition("/")[2] for name in known} == {p.stem for p in root.glob("nbs/0*.ipynb")} | {"index"}
