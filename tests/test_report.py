"""The report: rules of verdicts, missing results, and numbers that come from the results and from nowhere else."""
import json
import re
import subprocess

import numpy as np
import pytest

from dlsm.checks import FIG5_CLAIMS, TABLE1_CLAIMS, too_far
from dlsm.files import atomic_write, sha256
from dlsm.plots import METHOD_NAMES
from dlsm.report import ITEMS, made_on, others, rows, status_table, trained_for
from dlsm.runs import load_result, paper
from dlsm.verdicts import VERDICTS, Claim, exists, markdown_table, number, read_results, verdict

papermill = pytest.importorskip("papermill")

MADE = {"dataset": "moons", "preset": {"name": "demo", "score_net": "preconditioned"}, "seeds": [0, 1], "device": "CPU",
        "wall_seconds": 75., "versions": {"torch": "2.15.0"}, "commit": "0123456789", "dirty": False, "time": "2026-01-01T00:00:00+00:00",
        "inputs": {}, "title": "made up", "path": "figures/made_up.json"}
METHODS = ("base", "scaling", "posterior_sm", "dlsm", "oracle")


def table1():
    "A Table 1 that is the printed one; with the joint network, errors are half as large."
    printed = {what: paper("table1", what) for what in ("D_P", "D_L", "precision", "recall")}
    def block(factor):
        return {what: {m: p and [(np.array(p) * (factor if what in ("D_P", "D_L") else 1)).tolist(), [0., 0.]] for m, p in row.items()}
                for what, row in printed.items()}
    return MADE | {"id": "table1", "paper": printed,
                   "values": {"zero_score_D_L": [0.15, 0.15], "mean_and_sd": {"paper": block(1.), "joint": block(0.5)}}}


def fig5():
    printed = paper("fig5_final_values")
    final = {what: {"ce": p["ce"], "dlsm_prime": p["dlsm"], "total": p["total"]}
             for what, p in (("d_l", printed["score_error_D_L"]), ("ce", printed["cross_entropy"]))}
    return MADE | {"id": "fig5", "paper": printed,
                   "values": {"final": {"paper": final}, "lowest_D_L_under_ce": {"paper": 0.125}, "steps": {"paper": [0, 1234]}}}


def fig1(worst=0.99):
    return MADE | {"id": "fig1", "paper": None, "values": {"oracle_precision_recall": [{"precision": 1., "recall": worst}] * 2}}


def put(home, *results, folder="figures"):
    for r in results: atomic_write(home/folder/r["dataset"]/f"{r['id']}.json", json.dumps(r))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    return tmp_path


def row(what, results): return next(r for r in rows(results) if r["what"] == what)


# ---- rules

def test_the_interval_of_a_ratio_is_that_of_its_logarithm():
    claim = Claim("more", "a / b", lambda t: t["a"] / t["b"], low=1., ratio=True)
    trainings = [{"a": a, "b": 1.} for a in (1.2, 1.3, 40., 60., 50.)]
    told = claim.check({"a": 30.5, "b": 1.}, None, trainings)
    logs = np.log([t["a"] for t in trainings])
    assert 0 < told["low"] < np.exp(logs.mean()) < told["high"] and told["low"] * told["high"] == pytest.approx(np.exp(2 * logs.mean()))
    turned = Claim("less", "b / a", lambda t: t["b"] / t["a"], high=1., ratio=True).check({"a": 30.5, "b": 1.}, None, trainings)
    assert turned["high"] == pytest.approx(1 / told["low"]) and turned["outcome"] == told["outcome"]  # whichever is on top


def test_numbers():
    assert number("a", 1., 1.25, 0.25)["ok"] and not number("a", 1., 1.26, 0.25)["ok"] and not number("a", 1., 0.7, 0.25)["ok"]
    assert number("a", 1., 0.1, 0.25, less_is_fine=True)["ok"] and not number("a", 1., 1.3, 0.25, less_is_fine=True)["ok"]
    assert not number("a", [1., 1.], [1., 2.], 0.25)["ok"] and number("a", [1., 1.], [1., 2.])["ok"] is None
    assert number("a", 0., 0., 0.25)["ok"] and not number("a", 0., 0.3, 0.25)["ok"]
    assert number("a", None, 1., 0.25)["ok"] is None and number("a", 1., None, 0.25)["ok"] is None
    with pytest.raises(ValueError): number("a", [1., 1.], [1., 1., 1.], 0.25)


def test_a_rule_that_counts_one_way_hides_no_deviation():
    "The largest deviation is shown whichever way it goes; a number is off by what its rule counts."
    better, worse = (number("a", [1., 1.], values, 0.25, less_is_fine=True) for values in ([0.4, 1.1], [0.4, 1.3]))
    assert better["ok"] and better["deviation"] == pytest.approx(-0.6) and not worse["ok"] and verdict([worse], [])[1] == "off: a +30%"
    larger, smaller = (number("a", 1., value, 0.25, more_is_fine=True) for value in (9., 0.7))
    assert larger["ok"] and larger["deviation"] == pytest.approx(8.) and not smaller["ok"] and smaller["rule"] == "at least -25%"
    result = table1()
    result["values"]["mean_and_sd"]["paper"]["D_L"]["dlsm"][0] = [0.02, 0.02]
    assert row("Table 1", [result])["deviation"] == f"D_L {METHOD_NAMES['dlsm']} -62%" and row("Table 1", [result])["verdict"] == "within tolerance"


def test_verdict():
    good, bad, shown = number("a", 1., 1., 0.1), number("b", 1., 2., 0.1), number("c", 1., 9.)
    claim = Claim("more", "x", lambda t: t["x"], low=1.)
    holds, fails, absent = (claim.check(t) for t in ({"x": 1.}, {"x": 0.5}, {}))
    assert (holds["outcome"], fails["outcome"], absent["outcome"]) == ("holds", "does not hold", "not measured")
    spread = claim.check({"x": 1.1}, trainings=[{"x": 0.9}, {}, {"x": 1.3}])  # one that was not measured counts for nothing
    assert spread["outcome"] == "undecided" and spread["low"] < 1 < spread["high"] and verdict([good], [spread]) == ("undecided", "undecided: more")
    assert claim.check({"x": 3.}, trainings=[{"x": 2.9}, {"x": 3.1}])["outcome"] == "holds"
    assert claim.check({"x": 0.1}, trainings=[{"x": 0.1}, {"x": 0.11}])["outcome"] == "does not hold"
    untestable, opened = (fails | {"outcome": told} for told in ("not testable", "open (α at the end of its range)"))
    cases = [([good, shown], [holds], "within tolerance"), ([good, bad], [holds], "numbers off"), ([shown], [holds], "claims hold"),
             ([good], [fails, spread], "contradicted"), ([good], [opened], "undecided"), ([good, bad], [fails, untestable], "contradicted"),
             ([], [], "not tested"), ([shown], [absent, untestable, holds | {"judged": False}], "not tested"), ([good], [absent], "within tolerance")]
    for numbers, claims, expected in cases:
        assert verdict(numbers, claims)[0] == expected and expected in VERDICTS
        assert verdict(numbers, claims, too_far=True)[0] == "off scale"
    assert verdict([good], [holds, absent, untestable]) == ("within tolerance", "all 1 numbers; not testable: more. not measured: more")
    assert verdict([], [absent]) == ("not tested", "no claim was tested; not measured: more")
    assert verdict([good], [holds, untestable | {"judged": False}]) == ("within tolerance", "all 1 numbers; shown, not judged, not testable: more")
    assert verdict([good, bad], [])[1] == "off: b +100%" and "more" in verdict([good], [fails])[1]
    assert verdict([good], [fails | {"judged": False}])[0] == "within tolerance"


def test_a_mean_that_no_training_is_near_to_is_called_wide():
    "Two groups of trainings may have the printed number between them."
    between = number("c", 0.4, 0.4, 0.5, each=[0.15, 0.65, None])
    assert between["ok"] and between["wide"] and verdict([between], []) == ("within tolerance", "all 1 numbers; wide, for a training by itself is off: c")
    assert not number("c", 0.4, 0.4, 0.5, each=[0.3, 0.5])["wide"] and not number("c", 0.4, 0.4, None, each=[0.1])["wide"]


def test_the_printed_numbers_agree_with_themselves():
    results = [table1(), fig5(), fig1()]
    found = [row(what, results)["verdict"] for what in ("Table 1", "Fig. 5", "Fig. 1")]
    assert found == ["within tolerance", "within tolerance", "claims hold"]
    for claim in row("Table 1", results)["claims"]:
        if claim["judged"]: assert claim["outcome"] == "holds" and claim["paper"] == pytest.approx(claim["ours"])


def test_a_number_that_is_off_and_a_claim_that_fails():
    result = table1()
    errors = result["values"]["mean_and_sd"]["paper"]["D_L"]
    errors["dlsm"][0] = [0.052, 0.08]
    found = row("Table 1", [result])
    assert found["verdict"] == "numbers off" and found["why"].startswith(f"off: D_L {METHOD_NAMES['dlsm']} +54%; shown, not judged")
    errors["base"][0] = [0.149, 0.149]
    assert "zero score" in row("Table 1", [result])["why"] and row("Table 1", [result])["verdict"] == "contradicted"
    assert "zero score" in row("Fig. 1", [result, fig1()])["why"]
    assert row("Fig. 1", [table1(), fig1(worst=0.9)])["verdict"] == "contradicted"


def test_posterior_score_matching_is_judged_between_the_papers_networks():
    result = table1()
    result["values"]["mean_and_sd"]["paper"]["D_P"]["posterior_sm"][0] = [0.02, 0.02]
    assert row("Table 1", [result])["verdict"] == "within tolerance"
    paper_nets = result | {"preset": {"name": "paper", "score_net": "paper"}}
    assert "posterior SM" in row("Table 1", [paper_nets])["why"]


def test_what_the_text_says_of_pictures():
    "Fig. 3 on average, Fig. 4 for most classes; what goes class by class is shown and decides nothing."
    def result(id, values): return MADE | {"id": id, "dataset": "cifar10", "paper": None, "values": values}
    def fig3(average): return result("fig3", {"claims": {text: {"difference": -0.1, "low": -0.2, "high": 0., "outcome": told} for text, told in
                                                           (("less diverse, on average", average), ("less diverse in every class", "undecided"))}})
    def fig4(low): return result("fig4", {"differences": {"recall": {"share": {"value": 0.75, "low": low, "high": 1.}}}})
    assert [row("Fig. 3", [fig3(average)])["verdict"] for average in ("holds", "undecided", "the opposite holds")] == ["claims hold", "undecided", "contradicted"]
    assert row("Fig. 3", [fig3("holds")])["why"] == "no printed number; shown, not judged, undecided: less diverse in every class"
    assert [row("Fig. 4, CIFAR-10", [fig4(low)])["verdict"] for low in (0.6, 0.5)] == ["claims hold", "undecided"]  # three of four bars may be chance
    nothing = [("Fig. 3", result("fig3", {"claims": {}})), ("Fig. 4, CIFAR-10", result("fig4", {"differences": {}})), ("Table 2, CIFAR-10", table2(*["not measured"] * 3))]
    assert [row(what, [made])["verdict"] for what, made in nothing] == ["not tested"] * 3
    (stand_in,) = [r for r in rows([nothing[0][1] | {"dataset": "digits"}]) if r["dataset"] == "digits"]
    assert (stand_in["verdict"], stand_in["why"]) == ("stand-in", "no claim was tested")


def table2(*outcomes, **more):
    claims = [{"claim": f"claim {i}", "row": "recall", "paper": 0.1, "difference": 0.1, "low": 0., "high": 0.2, "of_paper": True, "outcome": told, "why": "so many"}
              for i, told in enumerate(outcomes)]
    return MADE | {"id": "table2", "dataset": "cifar10", "paper": None, "values": {"claims": claims} | more}


def test_a_claim_at_its_floor_is_left_out_and_images_too_far_from_the_data_test_nothing():
    "A single claim that cannot be tested is dropped and named; too_far, or in an older result no claim that could be tested, takes the table and both pictures."
    def result(id, **values): return MADE | {"id": id, "dataset": "cifar10", "paper": None, "values": values}
    fig3 = result("fig3", claims={"less diverse": {"difference": -0.1, "low": -0.2, "high": 0., "outcome": "holds"}})
    fig4 = result("fig4", differences={"recall": {"share": {"value": 0.9, "low": 0.6, "high": 1.}}})
    def found(table):
        of_other = table | {"preset": {"name": "demo", "k": 3}}  # the settings of each notebook are its own; its preset's name is not
        return [row(what, [fig3, fig4, of_other])["verdict"] for what in ("Table 2, CIFAR-10", "Fig. 3", "Fig. 4, CIFAR-10")]
    floor = table2(*["holds"] * 13, "not testable")
    assert found(floor) == found(table2(*["holds"] * 13, "not testable", too_far=None)) == ["claims hold"] * 3
    assert row("Table 2, CIFAR-10", [floor])["why"] == "no printed number; not testable: claim 13"
    assert found(table2("not testable", "the opposite holds", *["holds"] * 12)) == ["contradicted", "claims hold", "claims hold"]  # it hides nothing
    for far in (table2("not testable", "not measured"), table2("not testable", "not testable", too_far="Too far.")): assert found(far) == ["off scale"] * 3
    assert "not testable: claim 0" in row("Table 2, CIFAR-10", [table2("not testable")])["why"]
    fair = table2("holds", "not testable")
    fair["values"]["claims"][1]["of_paper"] = False
    assert found(fair) == ["claims hold"] * 3
    assert too_far(table2("not testable", too_far="Too far.")) == "Too far." and not too_far(fair) and "Nothing about cifar10" in too_far(table2("not testable"))


def test_what_is_nearer_to_real_images_is_said():
    "Less diverse than base may be nearer to the real images' diversity."
    found = {"diversity": {"real": {"mean": 1.}, "base": {"mean": 1.2}, "scaling": {"mean": 0.85}}}
    (shown,) = [r for r in rows([MADE | {"id": "fig3", "dataset": "digits", "paper": None, "values": found}]) if r["dataset"] == "digits"]
    assert shown["remark"] == "distance from the real images' diversity: Base 0.20, Scaling 0.15"


def test_the_ratio_of_fig_5_is_shown_beside_the_printed_one():
    "The claim has the bound of Table 1; how large the ratio is, is a number."
    result = fig5()
    result["values"]["final"]["paper"]["d_l"]["total"] *= 1.2  # each within its tolerance, their ratio not
    result["values"]["final"]["paper"]["d_l"]["ce"] *= 0.85
    result["values"]["lowest_D_L_under_ce"]["paper"] = 0.1
    found = row("Fig. 5", [result])
    assert {c["claim"]: c["outcome"] for c in found["claims"]}[FIG5_CLAIMS[1].text] == "holds" and found["verdict"] == "numbers off"
    assert found["why"] == "off: D_L, L_CE / L_Total -29%"
    better = fig5()
    better["values"]["final"]["paper"]["d_l"]["total"] *= 0.6
    assert row("Fig. 5", [better])["verdict"] == "within tolerance" and row("Fig. 5", [better])["deviation"] == "D_L, L_CE / L_Total +67%"  # a better DLSM is no fault


def test_table_2_is_compared_where_it_can_be():
    "Numbers: those that the notebook names. Claims: the paper's are judged, ours is shown; an FID is called so where it is one."
    claims = [{"claim": f"{text}ours has the lower FID", "row": "frechet_distance", "other": "base", "of_paper": not text, "paper": -1.85,
               "difference": -2., "low": -3., "high": -1. + 2 * bool(text), "outcome": "undecided" if text else "holds"}
              for text in ("", "with each classifier at its own best α, ")]
    values = {"precision": [0.1, 0.1, 0.1], "CAS": [0.9, 0.9, 0.9], "claims": claims}
    def result(**more): return MADE | {"id": "table2", "dataset": "cifar10", "values": values | more, "paper": paper("table2", "cifar10")}
    found = row("Table 2, CIFAR-10", [result(comparable=[])])
    assert found["numbers"] == [] and found["verdict"] == "claims hold" and "own best α, DLSM has the lower Fréchet distance" in found["why"]
    assert [n["name"] for n in row("Table 2, CIFAR-10", [result(comparable=["CAS"])])["numbers"]] == ["CAS"]


def test_the_command_makes_what_the_row_shows():
    "A result of preset cpu is not made by a command for a GPU."
    made = MADE | {"id": "fig3", "dataset": "cifar10", "values": {}, "paper": None}
    def lines(preset): return status_table(rows([made | {"preset": {"name": preset}}])).splitlines()
    for preset, given in (("cpu", "dataset=cifar10 preset=cpu`"), ("demo", "dataset=cifar10`"), ("paper", "dataset=cifar10 preset=paper`")):
        assert next(line for line in lines(preset) if line.startswith("| Fig. 3")).count(given) == 1
    both = status_table(rows([table1(), table1() | {"preset": {"name": "paper", "score_net": "paper"}}]))  # minutes, where there is a choice
    assert next(line for line in both.splitlines() if line.startswith("| Table 1")).count("`snakemake -c all moons_04_moons`") == 1


# ---- what is missing, what else is there

def test_a_result_says_where_it_was_trained():
    "Trainings that another machine did are read from their checkpoints: the report names that machine, and what they took where all of it is known."
    def result(**trainings): return {"device": "CPU", "values": {"trainings": trainings}}
    here, there = {"seconds": 2., "device": "CPU"}, {"seconds": 3., "device": "some GPU"}
    assert made_on(result(a=here)) == "CPU" == made_on({"device": "CPU", "values": {}}) and made_on(result(a=there, b=here, c=there)) == "CPU; trained on some GPU"
    assert trained_for(result(a=here, b=there)) == 5. and trained_for(result(a=here, b=there | {"seconds": None})) is trained_for(result(a=None)) is None


def test_nothing_yet(home):
    assert read_results() == read_results("smoke") == []
    found = rows([])
    assert [r["what"] for r in found] == [i.what for i in ITEMS] and {r["verdict"] for r in found} == {"not made"}
    assert status_table(found).count("not made") == len(ITEMS)


def test_every_preset_and_stand_in_has_its_row():
    results = [table1(), table1() | {"preset": {"name": "paper", "score_net": "paper"}},
               MADE | {"id": "table2", "dataset": "digits", "values": {"FID": 1.}, "paper": None},
               MADE | {"id": "table2", "dataset": "cifar10", "paper": paper("table2", "cifar10"),
                       "values": paper("table2", "cifar10") | {"comparable": [key for key in paper("table2", "cifar10") if key != "CAS"]}}]
    found = rows(results)
    assert [r["preset"] for r in found if r["what"] == "Table 1"] == ["paper", "demo"]  # the paper's settings first
    tables = [(r["dataset"], r["verdict"]) for r in found if r["what"] == "Table 2, CIFAR-10"]
    assert tables == [("cifar10", "within tolerance"), ("digits", "stand-in")]
    assert "CAS" not in [n["name"] for r in found for n in r["numbers"]]  # it was not named as comparable
    assert "demo, on digits" in status_table(found)
    assert [r["id"] for r in others([*results, MADE | {"id": "fig6"}])] == ["fig6"]


def test_smoke_results_are_apart(home):
    put(home, table1(), MADE | {"id": "fig2", "preset": None, "values": {}, "paper": None})
    put(home, table1() | {"preset": {"name": "smoke"}}, folder="runs/smoke/figures")
    assert [r["path"] for r in read_results("smoke")] == ["runs/smoke/figures/moons/table1.json", "figures/moons/fig2.json"]
    assert len(read_results("demo")) == 2 == len(read_results("paper"))


def test_cells_cannot_break_a_table():
    assert markdown_table((c for c in "ab"), [(1, 2)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert markdown_table(("a",), [("p(y|x)",)]).splitlines()[2] == r"| p(y\|x) |"


# ---- the notebook

@pytest.fixture
def report(root, home, tmp_path):
    "Run the notebook in a root that holds nothing but results; give report.md and report.json."
    def run(preset="demo"):
        paths = root/"nbs/09_report.ipynb", tmp_path/"out.ipynb"
        papermill.execute_notebook(*paths, {"preset": preset}, kernel_name="python3", progress_bar=False)
        folder = home/("runs/smoke/figures" if preset == "smoke" else "figures")
        return (folder/"report.md").read_text(encoding="utf-8"), json.loads((folder/"report.json").read_text(encoding="utf-8"))
    return run


def test_report_reads_its_numbers(report, home):
    "Every number of Table 1 and Fig. 5 is changed, and found in the report."
    results = [table1(), fig5(), fig1()]
    for r in results[:2]: r["values"]["trainings"] = {"paper": {"seconds": 125., "device": "CPU"}}  # those of 04, which 08 reads
    new = iter(np.arange(0.1011, 0.9, 0.0071).round(3).tolist())
    expected = []
    def change(tree, key):
        tree[key] = [next(new) for _ in tree[key]] if isinstance(tree[key], list) else next(new)
        expected.append(tree[key])
    for block in results[0]["values"]["mean_and_sd"].values():
        for methods in block.values():
            for m in METHODS:
                if methods[m]: change(methods[m], 0)
    for values in results[1]["values"]["final"]["paper"].values():
        for loss in values: change(values, loss)
    put(home, *results)
    text, saved = report()
    for value in expected: assert " / ".join(f"{v:.3f}" for v in np.ravel(value)) in text
    base = np.mean(results[0]["values"]["mean_and_sd"]["paper"]["D_L"]["base"][0])
    first = saved["values"]["claims"][0]
    assert first["claim"] == TABLE1_CLAIMS[0].text and first["found"]["demo, paper"]["ours"] == pytest.approx(base / 0.15)
    assert saved["inputs"] == {f"figures/moons/{r['id']}.json": sha256(home/f"figures/moons/{r['id']}.json") for r in results}
    assert text.count("trainings 2 min 5 s") == text.count("| as Fig. 1, trainings 2 min 5 s |") == 1  # longer than the notebook took, and told once
    assert "1 min 15 s" in text and "01234567" in text and "1,234" in text


def test_finding_follows_the_numbers(report, home):
    def by_loss(*values): return {loss: [[v, v + 0.02], [v - 0.02, v]] for loss, v in zip(("ce", "total"), values)}
    def causes(**changed):
        relative = {"ce": 0.1, "total": 0.2, "lam": 0.3, "even": 0.19, "even_lam": 0.15, "exact": 0.21, "exact_lam": 0.6} | changed
        each = {loss: [[v, 2 * v], [v, 2 * v]] for loss, v in relative.items()}
        return {"steps": 1_234, "levels": [3., 5.], "relative_D_L": {"joint": each, "paper": each}}
    put(home, table1(), *(MADE | {"id": name, "title": name, "dataset": "moons", "paper": None, "values": values} for name, values in (
        ("levels", {"sigmas": [3., 5.], "relative_D_L": {"paper": by_loss(0.31, 0.71)}}), ("levels_causes", causes()))))
    text, saved = report()
    for said in ("| preset demo: L_CE | 0.30 | 0.32 |", "| preset demo: L_Total | 0.70 | 0.72 |", "| L_Total − L_CE | +0.40 ± 0.00 | +0.40 ± 0.00 |",
                 "At σ = 3 and 5 cross-entropy's gradients are nearer", "after 1,234 steps",
                 "| L_CE | 0.10 | 0.20 |", "| L_Total, λ = 0.125 | 0.20 | 0.40 |", "λ = 2, 16 times as much | 0.30 | 0.60 |", "| … with both | 0.15 | 0.30 |",
                 "and λ = 2 | 0.60 | 1.20 |", "with both, at σ = 3 50% of the gap to L_CE is closed (50 to 50% in 2 trainings; +0.05 ± 0.00 is left)",
                 "within 5% of what it is"):
        assert said.lower() in saved["values"]["finding"]["text"].lower(), said
    assert "No: at σ = 3 and 5 cross-entropy's gradients are nearer to the exact ones, with the printed network" in saved["values"]["found"]
    assert saved["values"]["finding"]["text"].startswith(saved["values"]["finding"]["short"])
    put(home, MADE | {"id": "levels_causes", "title": "other", "dataset": "moons", "paper": None, "values": causes(even_lam=0.25, exact=0.3)})
    assert not [said for said in ("With both", "prior score makes little") if said in report()[1]["values"]["finding"]["text"]]  # only what the numbers say
    base, ours = (np.mean(paper("table1", "D_L", m)) for m in ("base", "dlsm"))
    for value in (base, ours, base / 2, ours / 2): assert f"{value:.3f}" in saved["values"]["finding"]["text"]
    assert "(-50%)" in saved["values"]["finding"]["text"] and saved["values"]["finding"]["text"] in text


def test_stand_ins_bring_their_claims(report, home):
    "Those of Table 2 as `07_evaluation` judged them, and the score mismatch on images, with their numbers; no verdict."
    def claim(text, difference, told):
        return {"claim": text, "row": "recall", "method": "dlsm", "other": "base", "of_paper": True, "sign": 1, "paper": 0.0123, "difference": difference,
                "low": -0.4321, "high": 0.2468, "outcome": told, "why": "so many"}
    claims = [claim("ours is better", 0.1357, "holds"), claim("scaling raises precision", 0.1, "holds"), claim("ours is much better", -0.2711, "undecided"),
              claim("not measured", None, "not measured") | {"low": None, "high": None}]
    table = {"images_per_class": 12, "features": "pixels", "claims": claims, "methods": ["base", "scaling", "dlsm"], "comparable": [], "real_images": {"recall": 0.9753},
             "recall": [0.4141, 0.5, 0.6], "interval": {"recall": {"base": [0.4041, 0.4241], "scaling": None, "dlsm": [0.5, 0.7]}}}
    rows_ = {name: {"D_L": 1.2342 + i, "D_P": 0.7531, "cosine": 0.6161} for i, name in enumerate(("ce", "scaling", "dlsm_prime", "total"))}
    rows_["dlsm_prime"]["cosine"] = 0.0161  # its probabilities are lost, and its gradients point anywhere
    errors = {"p_sigma": rows_, "held_out": rows_}
    best = {name: {"alpha": 0.5, "D_L": 2.8 - i, "D_L_at_1": 2.9 - i} for i, name in enumerate(("ce", "dlsm_prime", "total"))}
    over = {f"{name} has a smaller D_L than CE": {"difference": -0.1731, "low": -0.1931, "high": -0.1531} for name in ("Total", "DLSM'")}
    at_alpha = {"at_best_alpha": best | {"differences": over, "cosines": over}, "images": 77}
    trainings = {"score": {"steps": 70, "seconds": 65., "images_per_s": 1_234., "flops_per_image": 2.51e9}}
    preset = {"name": "demo", "score": {"batch": 48}, "classifier": {"reduce": "sum"}}
    by_level = {name: {"D_L": {"mean": [[1., 2.], [2.25 * size, 3.]]}} for name, size in (("ce", 1.), ("scaling", 2.), ("dlsm_prime", 3.), ("total", 4.), ("zero", 1.))}
    kept = {"sigmas": [0.1, 1.25], "methods": {"p_sigma": by_level, "held_out": by_level}, "held_out_quality": {
        name: [{"accuracy": 0.1, "nll": 50., "ece": ece}] for name, ece in (("ce", 0.1), ("dlsm_prime", 0.9))}}
    on_digits = MADE | {"dataset": "digits", "paper": None}
    put(home, table1(), on_digits | {"id": "table2", "title": "Table 2: digits, reduced", "values": table},
        on_digits | {"id": "fig6", "title": "Fig. 6: digits, reduced", "values": {"relative_to_zero_score": errors, "levels_compared": [1.25],
                                                                                       "trainings": trainings} | kept, "preset": preset},
        on_digits | {"id": "fig6_alpha", "title": "Times α: digits, reduced", "values": at_alpha})
    again = {"claim": "ours is better", "differences": [0.1, 0.2], "value": 0.1571, "low": -0.4, "high": 0.7142, "outcome": "undecided"}
    put(home, on_digits | {"id": "trainings", "title": "over trainings", "values": {"n_trainings": 2, "features": "pixels", "claims": [again]}})
    text, saved = report()
    assert "on the digits 2.00 and 1.00, of which 0.17 ± 0.02 and 0.17 ± 0.02 are left" in saved["values"]["found"]
    row_ = next(line for line in text.splitlines() if line.startswith("| DLSM is better | + |"))
    assert row_.endswith("| 0.136 (-0.432 … 0.247) | holds | **undecided**, 0.157 (-0.400 … 0.714) |") and "| over 2 trainings |" in text
    found = [r for r in saved["values"]["rows"] if r["dataset"] == "digits"]
    assert [(r["verdict"], r["why"]) for r in found if r["what"].startswith("Table 2")] == [("stand-in", "of 3 claims 2 hold; undecided: 1")]
    assert "- digits, demo, pixels, undecided: *DLSM is much better*: so many." in text
    taken = f"| digits, demo | stage 1: score model | 70 × 48 | 1,234 | 1 min 5 s | 2.51 | {1_234 * 2.51:,.0f} | CPU |"
    assert taken in text and saved["values"]["rates"]["CPU (measured: 3.1 TFLOP/s)"] == pytest.approx(1_234 * 2.51e9)
    total = sum(saved["values"]["operations"]["cifar10"].values())
    assert 2e19 < total < 4e19 and f"| {float(f'{total / (1_234 * 2.51e9) / 3600:.2g}'):,.0f} |" in text and "assumed" in text
    assert next(line for line in text.splitlines() if line.startswith("| scaling raises precision | precision, scaling − base")).endswith(", not judged |")
    assert "| recall ↑ | 0.414 ± 0.010 | 0.500 |" in text and "| FID ↓ | 4.10 |" in text  # Table 2 row by row: ours, and the printed one
    for number_ in ("0.136", "-0.271 (-0.432 … 0.247)", "1.234", "4.234", "0.753", "0.616", "σ = 1.2", "12 images", "| 4.234 | 4.000 |",
                    "**L_DLSM′ collapsed**", "larger by their number (digits: 64)",
                    "-0.173 (-0.193 … -0.153)", "77 images", "| L_Total | 0.5 | 0.900 | 0.800 |"): assert number_ in text, number_


def test_what_cannot_be_tested_is_said_and_not_judged(report, home):
    "Of images that nobody would recognise nothing is said, but that."
    claims = [{"claim": f"scaling raises {row}", "row": row, "method": "scaling", "other": "base", "of_paper": True, "sign": 1, "paper": 0.1,
               "difference": 0.1, "low": 0., "high": 0.2, "outcome": "not testable", "why": f"base's images cover {share} of the real ones"}
              for row, share in (("precision", "7%"), ("recall", "8%"))]
    table = {"images_per_class": 12, "features": "pixels", "claims": claims, "methods": ["base", "scaling", "dlsm"], "comparable": [],
             "real_images": {}, "interval": {}}
    made = MADE | {"id": "table2", "dataset": "cifar10", "preset": {"name": "cpu"}, "title": "Table 2: cifar10, reduced", "paper": None, "values": table}
    floor = [claims[0] | {"outcome": "holds", "why": "so many"}, claims[1] | {"why": "base has 0.0001, next to the floor, 0"}]
    put(home, made, made | {"dataset": "cifar100", "preset": {"name": "demo"}, "values": table | {"claims": floor}})
    text, saved = report()
    assert text.count("Nothing about cifar10 follows from this run") == 2 and "Nothing about cifar100" not in text
    assert "- cifar100, demo, pixels, not testable: *scaling raises recall*: base has 0.0001, next to the floor, 0." in text
    assert "on CIFAR-100 (preset demo, smaller than the paper) 1 of 2 claims of Table 2 hold" in saved["values"]["found"]
    assert "**off scale** (not testable: scaling raises precision; scaling raises recall)" in text
    assert "*scaling raises precision; scaling raises recall*: base's images cover 7 / 8% of the real ones." in text  # the same reason once
    assert "CIFAR-10 was run at a small scale only" in saved["values"]["found"]
    with_the_papers = made | {"preset": {"name": "paper"}, "values": table | {"claims": floor, "too_far": None}}
    atomic_write(home/"figures/cifar10/paper/table2.json", json.dumps(with_the_papers))
    found = report()[1]["values"]["found"]
    assert "on CIFAR-10 1 of 2 claims of Table 2 hold" in found and "small scale" not in found


def test_what_exact_gradients_would_do(report, home):
    "Its numbers are in the report; the landing page says what of them is told apart, over several trainings where there are some."
    def e(value, half=0.01): return {"value": value, "low": value - half, "high": value + half}
    def ceiling(*gaps):
        guides, ways = ("ce", "total", "oracle"), [f"constant, {g}" for g in ("ce", "total", "oracle")] + ["by level, ce"]
        return MADE | {"id": "ceiling", "title": "exact gradients, reduced", "dataset": "digits", "paper": None, "values": {
            "images": 1_234, "images_of_the_sweep": 432, "alphas": [1., 2.], "least": dict.fromkeys(ways, 2.), "features": "pixels", "floor": {"training": 0.0551},
            "gaps": dict(zip(("constant, total - constant, ce", "constant, oracle - constant, ce", "constant, oracle - at α = 1"), map(e, gaps))),
            "at_one": {g: {"of_their_class": e(0.51 + i / 10), "frechet_distance": e(0.1234)} for i, g in enumerate(guides)}, "above_floor": dict.fromkeys(ways, 0.1449),
            "curves": {name: {"of_their_class": [0.4, 0.6789], "distance": [e(0.5), e(0.2 - 0.05 * name.endswith("oracle"))]} for name in ways}}}
    put(home, table1(), ceiling(0.0021, -0.0321, -0.04))
    text, saved = report()
    for said in ("1,234 images, in the second table 432", "| exact gradients | 0.710 ± 0.010 | 0.123 ± 0.010 |",
                 "| L_CE, α of each level | 2 | 0.200 ± 0.010 | 0.145 | 0.679 |", "L_Total − L_CE +0.002 (-0.008 … +0.012)",
                 "exact gradients − at α = 1 -0.040", "Fréchet distance, pixels"):
        assert said in text, said
    found = saved["values"]["found"]
    assert "51% of base's images are of their class, 61% of DLSM's, and 71% with the exact gradients beside the same score model (one training)" in found
    assert "0.200 (pixels; as many real images 0.055); DLSM's is not told apart, that of the exact gradients lower by 0.032 (0.022 … 0.042)" in found
    means = {"of class: ce": 0.3333, "constant, total - constant, ce": 0.02, "least: constant, ce": 0.4321}
    rows_ = [e(value) | {"id": id, "what": f"over {id}", "each": [value]} for id, value in means.items()]
    put(home, MADE | {"id": "ceiling_trainings", "title": "several, reduced", "dataset": "digits", "paper": None, "values": {"n_trainings": 7, "rows": rows_}})
    text, saved = report()
    assert "33% of base's images" in saved["values"]["found"] and "(means of 7 trainings)" in saved["values"]["found"] and "| over of class: ce | 0.333 |" in text
    assert "distance of 0.432 (pixels; as many real images 0.055); DLSM's is higher by 0.020 (0.010 … 0.030)" in saved["values"]["found"]


def test_smoke_report_of_nothing(report, home):
    put(home, table1())
    text, saved = report("smoke")
    assert "mean nothing" in text and {r["verdict"] for r in saved["values"]["rows"]} == {"not made"} and "Not made." in text


# ---- what is committed

def test_departures_name_what_exists(root):
    source = "".join("".join(c["source"]) for c in json.loads((root/"nbs/09_report.ipynb").read_text(encoding="utf-8"))["cells"])
    places = re.findall(r'"(dlsm\.[\w.]+)"', source)
    assert len(places) >= 9 and all(map(exists, places)), [p for p in places if not exists(p)]


def test_committed_report_is_of_the_committed_figures(root, monkeypatch):
    if not (root/".git").exists(): pytest.skip("not a clone")
    listed = ["git", "status", "--porcelain", "figures", "nbs/index.ipynb", "nbs/09_report.ipynb"]
    changed = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout
    if changed: pytest.skip(f"not as committed:\n{changed}")
    monkeypatch.setenv("DLSM_ROOT", str(root))
    report = load_result("report", None)
    now = {r["path"]: sha256(root/r["path"]) for r in read_results()}
    assert report["inputs"] == now, "figures/ has changed: run nbs/09_report.ipynb and nbs/index.ipynb, then `make readme`"
    cells = json.loads((root/"nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", []))
    assert all(text in shown for text in (status_table(report["values"]["rows"]), report["values"]["finding"]["short"], report["values"]["found"]))


def test_times_on_the_landing_page_are_of_what_ran(root, home):
    "The longest notebook of `make reproduce` is one that it runs; CIFAR's is the sum of 05 to 07, of which a part may be training."
    def made(id, dataset, preset, seconds, **values):
        return MADE | {"id": id, "dataset": dataset, "preset": {"name": preset}, "wall_seconds": seconds, "values": values}
    put(home, made("table1", "moons", "demo", 60.), made("trainings", "digits", "demo", 600.), made("fig6", "cifar100", "demo", 6_000.))
    put(home, *(made(id, "cifar10", "cpu", seconds) for id, seconds in (("fig6", 100.), ("fig3", 20.), ("table2", 3.), ("trainings", 1_000.), ("balance", 1_000.))))
    atomic_write(home/"figures/report.json", json.dumps({"values": {"trainings": [{"dataset": "cifar10", "preset": "cpu", "seconds": 90.}]}}))
    cells = {c["id"]: "".join(c["source"]) for c in json.loads((root/"nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]}
    names = {}
    for id in ("f00d1001", "f00d1003", "f00d1005"): exec(cells[id], names)
    assert names["said"] == ["its longest notebook, 04_moons, 1 min 0 s where the committed figures were made"]
    assert names["told"] == ["CIFAR-10 in preset `cpu`: trainings 1 min 30 s, 05 to 07 with what was trained in the same run 2 min 3 s"]


def test_links_of_the_readme_and_index_lead_somewhere(root):
    for name in ("README.md", "nbs/index.ipynb"):
        text = (root/name).read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        assert len(links) > 10
        missing = [link for link in links if not ((root/name).parent/link).resolve().exists()]
        assert not missing, f"{name}: {missing}"
