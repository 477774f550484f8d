"""What all benchmarks share: the skipping of those for a GPU where there is none, and a record of what was compared.

`make bench` writes figures/benchmarks/cpu.json or cuda.json, which the report shows: for each comparison both times, measured in one run. A benchmark that fails
is left out, and where a machine is lent for minutes the benchmarks may be run in parts, file by file: a part replaces what it measures, and keeps what
another one has measured on the same card at the same commit.
"""
import time

import pytest
import torch

from dlsm.runs import figure_dir, load_result, provenance, save_result

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STARTED = time.time()
compared, failed = [], set()


def pytest_addoption(parser):
    parser.addoption("--keep", action="store_true", help="write what was compared to figures/benchmarks/")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE.type == "cpu": item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_runtest_logreport(report):
    if report.failed: failed.add(report.nodeid)


@pytest.fixture
def compare(benchmark, request):
    "Record a comparison: both values in the same unit, of which less is better, and the least ratio that is aimed at, if any."
    def record(what, ours, than, theirs, unit="s", aim=None):
        found = {"what": what, "ours": ours, "than": than, "theirs": theirs, "unit": unit, "ratio": theirs / ours, "aim": aim}
        compared.append((request.node.nodeid, found))
        benchmark.extra_info |= found
    return record


def pytest_sessionfinish(session):
    "Keep what was compared by benchmarks that passed, beside what an earlier part of the same run has measured."
    passed = {found["what"]: found for node, found in compared if node not in failed}
    if not session.config.getoption("--keep") or not passed: return
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    def keep(compared):
        values = {"compared": list(compared.values()), "threads": torch.get_num_threads(), "name": name}
        return save_result(DEVICE.type, values, preset=None, dataset="benchmarks", seeds=[0], device=DEVICE, started=STARTED,
                           title=f"Speed on {DEVICE.type}: ratios from one run")
    path, run = figure_dir("benchmarks") / f"{DEVICE.type}.json", provenance(DEVICE, STARTED)
    before = load_result(DEVICE.type, "benchmarks") if path.exists() else None
    rows = {row["what"]: row for row in before["values"]["compared"]} if before else {}
    same = before and run["commit"] and (before["commit"], before["values"]["name"]) == (run["commit"], name) and not (before["dirty"] or run["dirty"])
    if not same and len(passed) < len(rows):
        print(f"\nnot written: {len(passed)} comparisons, and {path.name} has {len(rows)} of another commit or card; remove it to begin anew")
    else: print(f"\nwritten: {keep(rows | passed if same else passed)}")
