"""The notebook of the image trainings: wrong parameters in one line each, and a small run on the real CIFAR-10, end to end."""
import json
import os
import shutil
from pathlib import Path

import pytest

from dlsm.intervals import outcome

nbformat = pytest.importorskip("nbformat")

pytestmark = pytest.mark.project

WRONG = [  # injected parameters, a change of the world, the line
    ({"dataset": "cifar"}, "", "dataset = 'cifar' is not allowed; did you mean cifar10? (dataset must be 'digits' or "),
    ({"preset": "paper"}, "", "preset = 'paper' is not allowed (preset must be 'smoke' or 'demo')"),
    ({"dataset": "cifar100", "preset": "big"}, "", "preset = 'big' is not allowed (preset must be 'smoke' or 'cpu' or 'demo' or 'paper')"),
    ({"seed": -1}, "", "seed = -1 is not allowed"),
    ({"minutes": 5., "resume": False}, "", "minutes needs resume = True"),
    ({"stages": "3"}, "", "stages = '3' is not allowed (stages must be '1' or '2' or '1,2' or 'rest' or 'none')"),
    ({"device": "cuda:99"}, "", "device = 'cuda:99' is not on this machine"),
    ({"datasett": "digits"}, "", "unknown parameter datasett; did you mean dataset?"),
    ({"dataset": "cifar10", "data_dir": "nowhere"}, "", "data_dir = 'nowhere' is not a folder"),
    ({"dataset": "cifar10", "data_dir": "empty"}, "", "empty holds neither cifar-10-batches-py/ nor cifar-10-python.tar.gz"),
    ({"dataset": "cifar10", "data_dir": "damaged"}, "", "cifar-10-batches-py is damaged or incomplete: delete that folder"),
    ({"dataset": "cifar10", "data_dir": "unreadable"}, "", "cannot be read or written (Permission denied): check data_dir"),
    ({"stages": "2"}, "", "score-0 of digits, preset smoke, has not been trained: run `papermill nbs/05_cifar.ipynb"),
    ({"stages": "none"}, "import dlsm.monitor\ndlsm.monitor.free_memory = lambda device: 1e5", "too little memory for the exact scores of 1,442 images on cpu"),
    ({"stages": "2"}, "dlsm.monitor", "too little memory for stage 2 on digits, preset smoke, each of its classifiers"),
    ({}, "dlsm.monitor", "too little memory for stage 2 on digits, preset smoke, each of its classifiers"),
]
LATE = WRONG[-4:]  # told by the cells that begin the work


def source_of(notebook):
    "The code of the notebook as far as the tests of parameters need it: imports, parameters, check, and the cells after it."
    cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    end = next(i for i, c in enumerate(cells) if "load_score(cfg" in c.source)
    assert "parameters" in cells[1].metadata.tags and "check_parameters(" in cells[2].source
    return [c.source for c in cells[:end + 1]]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "Empty, damaged and unreadable data folders below an empty project."
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    monkeypatch.delenv("DLSM_DATA", raising=False)
    (tmp_path/"empty").mkdir()
    for name in ("damaged", "unreadable"):
        (tmp_path/name/"cifar-10-batches-py").mkdir(parents=True)
        (tmp_path/name/"cifar-10-batches-py/data_batch_1").write_bytes(b"no pickle")
    (tmp_path/"unreadable/cifar-10-batches-py").chmod(0)
    yield tmp_path
    (tmp_path/"unreadable/cifar-10-batches-py").chmod(0o700)


def test_wrong_parameters_are_one_line_each(root, folders):
    "All in one kernel: the injected cell and the notebook's own cells, once for each mistake."
    from nbclient import NotebookClient
    everybody = os.access(folders/"unreadable/cifar-10-batches-py", os.R_OK)  # the superuser reads what is forbidden
    cases = [case for case in WRONG if not (everybody and case[0].get("data_dir") == "unreadable")]
    imports, parameters, check, *work = source_of(root/"nbs/05_cifar.ipynb")
    sources, owner = [imports], [None]
    for i, (given, change, _) in enumerate(cases):
        injected = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in given.items())
        later = [*work] if (given, change) in [case[:2] for case in LATE] else []
        mine = [parameters, injected, *([change] if change else []), check, *later]
        sources, owner = sources + mine, owner + [i] * len(mine)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(folders)}}).execute()
    for i, (given, _, line) in enumerate(cases):  # the kernel goes on after an error: the first of a case is what its reader sees
        first = next(output for cell, of in zip(notebook.cells, owner) if of == i for output in cell.outputs if output.output_type == "error")
        assert first.ename == "ParameterError" and line in first.traceback[0], (given, first.traceback)
        assert len(first.traceback) == 1 and "\n" not in first.traceback[0], given
    assert not list(folders.glob("runs/**/step-*")) and not list(folders.glob("runs/**/*.json"))


def test_smoke_run_on_the_real_cifar10(root, tmp_path, monkeypatch):
    "Both stages, in two calls: the second finds the score model of the first."
    import papermill
    data = os.environ.get("DLSM_DATA")
    if not data or not Path(data, "cifar-10-batches-py").is_dir():
        pytest.skip("needs CIFAR-10: set DLSM_DATA to the folder that holds cifar-10-batches-py/")
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))

    def run(**parameters):
        given = {"dataset": "cifar10", "device": "cpu"} | parameters
        return papermill.execute_notebook(root/"nbs/05_cifar.ipynb", tmp_path/"out.ipynb", given, kernel_name="python3",
                                          progress_bar=False, cwd=tmp_path)

    def says(notebook, text): return any(text in output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))

    stopped = run(minutes=1e-9)
    assert says(stopped, "stage 1: 1 of 10 steps, the time is up; the same call goes on from here") and not says(stopped, "stage 2, ce")
    first = run(stages="1")
    assert not (tmp_path/"runs/smoke/figures").exists()
    assert (tmp_path/"runs/cifar10/smoke/score-0/log.jsonl").exists()
    assert says(first, "stage 1 on cifar10, preset smoke") and says(first, "50,000 images, 9 steps of 16")
    second = run(stages="2", data_dir=str(Path(data).resolve()))
    late = run(stages="2", minutes=1e-9)
    assert says(late, "everything is trained, nothing measured, the time is up; the same call goes on from here") and not says(late, "a level")
    for finished in (first, second):  # the pictures of stage 1 outlast their run
        shown = [output for cell in finished.cells if cell.source.startswith("with in_one_line(): score = load_score") for output in cell.outputs]
        assert any("image/png" in output.get("data", {}) for output in shown)
    result = json.loads((tmp_path/"runs/smoke/figures/cifar10/fig6.json").read_text(encoding="utf-8"))
    values = result["values"]
    assert result["dataset"] == "cifar10" and "smoke" in result["title"] and (tmp_path/"runs/smoke/figures/cifar10/fig6.png").exists()
    assert len(values["sigmas"]) >= 12 and values["pixels"] == 3072 and values["memorises"][0] and not values["memorises"][-1]
    assert {"ce", "scaling", "dlsm_prime", "total", "zero", "prior", "oracle"} == set(values["methods"]["p_sigma"])
    zero, ten, one = (values["methods"]["p_sigma"][name]["D_L"]["mean"][-1][0] for name in ("zero", "scaling", "ce"))
    assert 0 < zero < 1e-2 and ten > one > 0
    assert values["claims"] == {text: outcome(row["low"], row["high"], -1) for text, row in values["claim_intervals"].items()}
    assert values["levels_compared"][-1] == values["sigmas"][-1]
    assert all(values["claims"][f"CE × 10 is worse than no guidance, {points}"] == "holds" for points in ("p_sigma", "held_out"))
    for id in ("fig6_quality", "fig6_gradients", "fig6_alpha", "fig6_denoising"):
        assert all((tmp_path/f"runs/smoke/figures/cifar10/{id}.{kind}").exists() for kind in ("json", "png"))


def test_kept_weights_are_measured_without_a_training(root, tmp_path, monkeypatch, untrained):
    "In a clean root that holds nothing but them; the result names them."
    import papermill

    from dlsm.image_presets import IMAGES
    from dlsm.registry import keep_weights
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    untrained()
    files = {f"weights/{name}" for name in keep_weights(IMAGES["digits"]["smoke"])}
    shutil.rmtree(tmp_path/"runs")
    papermill.execute_notebook(root/"nbs/05_cifar.ipynb", tmp_path/"out.ipynb", {"stages": "none", "device": "cpu"}, kernel_name="python3",
                               progress_bar=False, cwd=tmp_path)
    result = json.loads((tmp_path/"runs/smoke/figures/digits/fig6.json").read_text(encoding="utf-8"))
    assert set(result["inputs"]) == files and len(files) == 4 and result["values"]["trainings"] == {}
    equal = [text for text in result["values"]["claims"] if "Total" in text and "CE" in text]  # the same weights: nothing holds, either way
    assert len(equal) == 4 and all(set(result["values"]["claim_intervals"][text].values()) == {0.} and result["values"]["claims"][text] == "undecided" for text in equal)
    assert not list(tmp_path.glob("runs/**/step-*"))


def test_the_rest_is_trained_where_some_weights_are_kept(root, tmp_path, monkeypatch, untrained):
    "As on a second machine: the score model and one classifier are not trained again."
    import papermill

    from dlsm.image_presets import IMAGES
    from dlsm.registry import keep_weights
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    untrained()
    for loss in ("dlsm_prime", "total"): shutil.rmtree(tmp_path/f"runs/digits/smoke/classifier-{loss}-0")
    keep_weights(IMAGES["digits"]["smoke"], partial=True)
    shutil.rmtree(tmp_path/"runs")
    papermill.execute_notebook(root/"nbs/05_cifar.ipynb", tmp_path/"out.ipynb", {"stages": "rest", "device": "cpu"}, kernel_name="python3",
                               progress_bar=False, cwd=tmp_path)
    assert {path.parent.name for path in tmp_path.glob("runs/digits/smoke/*/step-*")} == {"classifier-dlsm_prime-0", "classifier-total-0"}
    result = json.loads((tmp_path/"runs/smoke/figures/digits/fig6.json").read_text(encoding="utf-8"))
    assert {Path(name).stem for name in result["inputs"]} == {"score-0", "classifier-ce-0"} and {"dlsm_prime", "total"} <= set(result["values"]["trainings"])
