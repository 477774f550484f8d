"""The notebook of sampling: wrong parameters in one line each, and its default run."""
import json

import pytest

nbformat = pytest.importorskip("nbformat")

pytestmark = pytest.mark.project

WRONG = [  # injected parameters, the line
    ({"dataset": "cifar"}, "dataset = 'cifar' is not allowed; did you mean cifar10? (dataset must be 'digits' or "),
    ({"preset": "paper"}, "preset = 'paper' is not allowed (preset must be 'smoke' or 'demo')"),
    ({"n_per_class": 0}, "n_per_class = 0 is not allowed (n_per_class must be a whole number from 1 to 999999 or "),
    ({"methods": "base,ours"}, "method = 'ours' is not known: base, scaling, dlsm"),
    ({"sampler": "euler-18"}, "sampler = 'euler-18' is not known: pc-N, heun-N or 2m-N"),
    ({"device": "cuda:99"}, "device = 'cuda:99' is not on this machine"),
    ({"score_checkpoints": "x"}, "unknown parameter score_checkpoints; did you mean score_checkpoint?"),
    ({"dataset": "cifar10", "data_dir": "nowhere"}, "data_dir = 'nowhere' is not a folder"),
    ({}, "score-0 of digits, preset smoke, has not been trained: run `papermill nbs/05_cifar.ipynb"),
]


def test_wrong_parameters_are_one_line_each(root, tmp_path, monkeypatch):
    "All in one kernel: the injected cell and the notebook's own check, once for each mistake."
    from nbclient import NotebookClient
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    monkeypatch.delenv("DLSM_DATA", raising=False)
    imports, parameters, check = [c for c in nbformat.read(root/"nbs/06_sampling.ipynb", 4).cells if c.cell_type == "code"][:3]
    assert "parameters" in parameters.metadata.tags and "check_parameters(" in check.source
    sources = [imports.source]
    for given, _ in WRONG: sources += [parameters.source, "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in given.items()), check.source]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    errors = [output for cell in notebook.cells for output in cell.outputs if output.output_type == "error"]
    assert len(errors) == len(WRONG)
    for (given, line), error in zip(WRONG, errors):
        assert error.ename == "ParameterError" and line in error.traceback[0], (given, error.traceback)
        assert len(error.traceback) == 1 and "\n" not in error.traceback[0]
    assert not list(tmp_path.glob("runs/**/*.json"))


def test_default_run(root, tmp_path, monkeypatch, untrained):
    "Few images of untrained networks, so that it stays short; the sets and results are those that other notebooks read."
    import papermill

    from dlsm.samples import load_samples, sample_dir
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    untrained()
    papermill.execute_notebook(root/"nbs/06_sampling.ipynb", tmp_path/"out.ipynb", {"device": "cpu", "n_per_class": 2, "sampler": "2m-5"},
                               kernel_name="python3", progress_bar=False, cwd=tmp_path)
    for method, alpha in (("base", None), ("scaling", None), ("dlsm", None), ("base", 10.), ("dlsm", 1.)):
        found = load_samples(sample_dir("digits", "smoke", method, 0, "2m-5", alpha))
        assert found.meta["alpha"] == (alpha or (10. if method == "scaling" else 1.)) and set(found.meta["histogram"]) == {2 if alpha is None else 3}
    results = {name: json.loads((tmp_path/f"runs/smoke/figures/digits/{name}.json").read_text(encoding="utf-8")) for name in ("fig3", "fig3_alpha", "fig3_nfe")}
    assert all("smoke" in result["title"] and result["dataset"] == "digits" for result in results.values())
    assert results["fig3"]["values"]["claims"] == {}  # two images of a class: none can be left out
    assert set(results["fig3"]["values"]["diversity"]) == {"real", "base", "scaling", "dlsm"} and len(results["fig3"]["inputs"]) == 3
    assert results["fig3_alpha"]["values"]["alphas"][0] == 0 and results["fig3_alpha"]["values"]["alphas"][-1] == 20
    assert not (tmp_path/"figures").exists()
