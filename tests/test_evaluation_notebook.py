"""The notebook of the evaluation: wrong parameters and missing sets in one line each, and a small run on the real CIFAR-10, end to end."""
import json
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

pytestmark = pytest.mark.project

WRONG = [  # injected parameters, the line
    ({"dataset": "cifar"}, "dataset = 'cifar' is not allowed; did you mean cifar10? (dataset must be 'digits' or "),
    ({"preset": "paper"}, "preset = 'paper' is not allowed (preset must be 'smoke' or 'demo')"),
    ({"features": "inception"}, "features = 'inception' is not allowed"),
    ({"dataset": "cifar10", "features": "pixels"}, "features = 'pixels' is not allowed"),
    ({"seed": -1}, "seed = -1 is not allowed"),
    ({"weights": 3}, "weights = 3 is not allowed (weights must be a text or None)"),
    ({"feature": "pixels"}, "unknown parameter feature; did you mean features?"),
    ({"seed": 5}, "samples/base-2m-9-5 is missing: run `papermill nbs/06_sampling.ipynb"),
]


def test_wrong_parameters_are_one_line_each(root, tmp_path, monkeypatch):
    "All in one kernel: the injected cell and the notebook's own cells as far as the loading of the sample sets."
    from nbclient import NotebookClient
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    sources = [c.source for c in nbformat.read(root/"nbs/07_evaluation.ipynb", 4).cells if c.cell_type == "code"]
    imports, parameters, check, load = sources[:4]
    assert "check_parameters(" in check and "load_samples(" in load
    cells = [imports]
    for given, _ in WRONG:
        cells += [parameters, "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in given.items()), check, *([load] if given == WRONG[-1][0] else [])]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = [output for cell in notebook.cells for output in cell.outputs if output.output_type == "error"]
    assert len(told) == len(WRONG)
    for (given, line), error in zip(WRONG, told):
        assert line in error.traceback[0] and len(error.traceback) == 1 and "\n" not in error.traceback[0], (given, error.traceback)


def test_smoke_run_on_the_real_cifar10(root, tmp_path, monkeypatch):
    "Networks of a few steps, sets of a few images, EfficientNet's features and a ResNet-50 of two steps."
    import papermill

    from dlsm.image_presets import IMAGES
    from dlsm.samples import load_networks, make_samples
    from dlsm.sampling_presets import SAMPLING
    from dlsm.stages import train
    data = os.environ.get("DLSM_DATA")
    if not data or not Path(data, "cifar-10-batches-py").is_dir():
        pytest.skip("needs CIFAR-10: set DLSM_DATA to the folder that holds cifar-10-batches-py/")
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    image, settings = IMAGES["cifar10"]["smoke"], SAMPLING["cifar10"]["smoke"]
    for stage in ("score", "ce", "total"): train("cifar10", "smoke", stage, device="cpu")
    score, classifiers = load_networks(image)
    for method in ("base", "scaling", "dlsm"): list(make_samples(image, settings, method, score, classifiers[method]))
    for method in ("base", "dlsm"):
        for alpha in settings.alphas: list(make_samples(image, settings, method, score, classifiers[method], alpha=alpha, n_per_class=settings.n_frontier))
    papermill.execute_notebook(root/"nbs/07_evaluation.ipynb", tmp_path/"out.ipynb", {"dataset": "cifar10", "device": "cpu", "features": "efficientnet"},
                               kernel_name="python3", progress_bar=False, cwd=tmp_path)
    result = json.loads((tmp_path/"runs/smoke/figures/cifar10/table2.json").read_text(encoding="utf-8"))
    values = result["values"]
    assert values["features"] == "EfficientNet-Lite0 (64 px)" and "EfficientNet-Lite0 (64 px)" in result["title"] and "smoke" in result["title"]
    assert "FID" not in values and "IS" not in values and values["comparable"] == []  # the printed numbers stand in the file, and none is compared
    assert len(values["frechet_distance"]) == 3 and all(v > 0 for v in values["frechet_distance"])
    assert all(c["outcome"] == "not measured" for c in values["claims"] if c["row"].startswith("cw_"))  # three images of a class are too few
    assert all((tmp_path/f"runs/smoke/figures/cifar10/{name}").exists() for name in ("table2.md", "fig4.png", "frontier.png", "cas.png"))
