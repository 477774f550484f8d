"""What all tests share: a copy of the project to try things in, and the skipping of GPU tests where there is none."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    "Skip GPU tests visibly without CUDA, and run what takes minutes last; but first in several processes, so that none of them waits for another at the end."
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    last = "PYTEST_XDIST_WORKER" not in os.environ
    items.sort(key=lambda item: (item.get_closest_marker("project") is not None) == last)


def pytest_report_header():
    return f"torch {torch.__version__}, {'CUDA' if torch.cuda.is_available() else 'no CUDA'}, {os.cpu_count()} CPUs"


@pytest.fixture(scope="session")
def root():
    "The root of the repository."
    return ROOT


def unpacked(root):
    "The files of the project where no git tells them from what was built, as in an unpacked archive: all but folders of these names at the root, and caches anywhere."
    built = {"runs", "data", "build", "dist"}
    caches = {"__pycache__", ".ipynb_checkpoints", "_proc", "_docs", ".snakemake", ".pytest_cache", ".ruff_cache", ".benchmarks"}
    def kept(parts):
        return parts[0] not in built and not parts[0].startswith(".venv") and not any(part in caches or part.endswith(".egg-info") for part in parts)
    return [name for path in root.rglob("*") if kept((name := path.relative_to(root)).parts)]


@pytest.fixture(scope="session")
def tracked(root):
    "The files of the project: those that git tracks or would, or in an unpacked archive all that are not built."
    if (root/".git").exists():
        listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                                cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    else: listed = unpacked(root)
    return [root/name for name in listed if (root/name).is_file()]


@pytest.fixture(scope="session")
def copy(root, tracked, tmp_path_factory):
    "A copy of the project, so that what a test exports, cleans or runs never touches the working tree."
    target = tmp_path_factory.mktemp("project")/"dlsm"
    for path in tracked:
        place = target/path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)
    return target


@pytest.fixture
def untrained():
    "A function that writes finished trainings of digits, preset smoke, below `$DLSM_ROOT`: with the weights they began with."
    def write():
        from dlsm.checkpoints import save_checkpoint
        from dlsm.image_presets import IMAGES
        from dlsm.images import LOSSES, classifier_net, score_net
        from dlsm.networks import seeded
        from dlsm.runs import run_dir
        from dlsm.stages import classifier_config, score_config
        preset = IMAGES["digits"]["smoke"]
        score, classifier = (seeded(lambda net=net: net(preset), 0) for net in (score_net, classifier_net))
        trainings = [("score-0", score, score_config(preset, 0), preset.score.steps)]
        trainings += [(f"classifier-{loss}-0", classifier, classifier_config(preset, loss, score, 0), preset.classifier.steps) for loss in LOSSES]
        for name, net, config, steps in trainings: save_checkpoint(run_dir("digits", "smoke", name), steps, dict.fromkeys(("model", "ema"), net.state_dict()), {}, config, [])
    return write
