"""What all benchmarks share: the skipping of those for a GPU where there is none, and a record of what was compared.

`make bench` writes figures/benchmarks/cpu.json or cuda.json, which the report shows: for each comparison both times, measured in one run.
"""
import time

import pytest
import torch

from dlsm.runs import save_result

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STARTED = time.time()
compared = []


def pytest_addoption(parser):
    parser.addoption("--keep", action="store_true", help="write what was compared to figures/benchmarks/")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE.type == "cpu": item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def compare(benchmark):
    "Record a comparison: both values in the same unit, of which less is better, and the least ratio that is aimed at, if any."
    def record(what, ours, than, theirs, unit="s", aim=None):
        compared.append({"what": what, "ours": ours, "than": than, "theirs": theirs, "unit": unit, "ratio": theirs / ours, "aim": aim})
        benchmark.extra_info |= compared[-1]
    return record


def pytest_sessionfinish(session, exitstatus):
    "Keep a whole run, and none that failed."
    if not session.config.getoption("--keep") or exitstatus or not compared: return
    values = {"compared": compared, "threads": torch.get_num_threads(), "name": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None}
    kept = save_result(DEVICE.type, values, preset=None, dataset="benchmarks", seeds=[0], device=DEVICE, started=STARTED, title=f"Speed on {DEVICE.type}: ratios from one run")
    print(f"\nwritten: {kept}")
