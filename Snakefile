"""From notebooks to figures: a rule runs one notebook with papermill and names what it writes.

    make reproduce                                  # the same as
    snakemake --cores all --config preset=demo      # presets: smoke, demo, paper
    snakemake --cores all moons/04_moons            # one notebook, after those that it needs

The executed notebooks land in runs/<preset>/notebooks/. A notebook runs again when it, a module that it imports, or a notebook
before it has changed. To add a notebook, add its line to STORY.
"""
import json
import re
import sys
from pathlib import Path

# notebook: data sets, the notebooks before it, and the results it writes (the .json, which is written last)
MOONS, IMAGES = ["moons"], ["digits", "cifar10", "cifar100"]
STORY = {
    "00_parzen":        (MOONS, [], []),
    "01_dsm":           (MOONS, [], []),
    "02_decomposition": (MOONS, [], []),
    "03_dlsm":          (MOONS, [], ["moons/fig2"]),
    "04_moons":         (MOONS, [], ["moons/fig1", "moons/table1"]),
    "08_ablations":     (MOONS, ["04_moons"], ["moons/fig5", "moons/fig5_sweep"]),
    "09_report":        (MOONS, ["03_dlsm", "04_moons", "08_ablations"], ["report"]),
    "index":            (MOONS, ["09_report"], []),
}
STORY = {name: row for name, row in STORY.items() if Path(workflow.basedir, "nbs", f"{name}.ipynb").exists()}
PRESET = config.get("preset", "demo")
DATASETS = config.get("dataset", "moons").split(",")

workdir: workflow.basedir


def cells(name):
    "The code cells of a notebook: (source, tags) of each."
    notebook = json.loads(Path("nbs", f"{name}.ipynb").read_text(encoding="utf-8"))
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in notebook["cells"] if c["cell_type"] == "code"]


def modules(source, found=()):
    "The files of dlsm that some source imports, and those that they import."
    for name in re.findall(r"^\s*(?:from|import) (?:dlsm)?\.(\w+)", source, flags=re.MULTILINE):
        path = Path("dlsm", f"{name}.py")
        if path.exists() and str(path) not in found: found = modules(path.read_text(encoding="utf-8"), (*found, str(path)))
    return found


def executed(name, dataset):
    return f"runs/{PRESET}/notebooks/{dataset}/{name}.ipynb"


def takes(name, parameter):
    "Whether the notebook has this parameter."
    return any(re.search(rf"^{parameter}\b", source, flags=re.MULTILINE) for source, tags in cells(name) if "parameters" in tags)


TARGETS = [(name, dataset) for name, (datasets, _, _) in STORY.items() for dataset in datasets if dataset in DATASETS]


rule all:
    input: [executed(*target) for target in TARGETS]


for story, data in TARGETS:
    figures = "runs/smoke/figures" if PRESET == "smoke" and takes(story, "preset") else "figures"

    rule:
        name: f"{data}/{story}"
        input:
            notebook = f"nbs/{story}.ipynb",
            modules = modules("\n".join(source for source, _ in cells(story))),
            before = [executed(name, data) for name in STORY[story][1] if name in STORY],
        output:
            notebook = executed(story, data),
            results = [update(f"{figures}/{result.format(dataset=data)}.json") for result in STORY[story][2]],
        threads: 1 if PRESET == "smoke" else 8  # on fewer cores: all of them
        params:
            python = sys.executable,
            unfinished = executed(story, data).replace(".ipynb", ".unfinished.ipynb"),  # stays for a look if a cell fails
            given = " ".join(f"-p {key} {value}" for key, value in {"preset": PRESET, "dataset": data}.items() if takes(story, key)),
        shell:
            "OMP_NUM_THREADS={threads} {params.python:q} -m papermill {input.notebook} {params.unfinished} {params.given}"
            " -k python3 --no-progress-bar --log-level WARNING && mv {params.unfinished} {output.notebook}"
