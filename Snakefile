"""From notebooks to figures: a rule runs one notebook with papermill and names what it writes.

    make reproduce                                  # the same as
    snakemake --cores all --config preset=demo      # presets: smoke, demo, paper; for CIFAR without a GPU also cpu
    snakemake --cores all moons_04_moons            # one notebook, after those that it needs
    snakemake --cores all --config trainings=5      # images trained five times, too (07a, 07b)
    snakemake --profile profiles/slurm              # as jobs of a cluster

The executed notebooks land in runs/<preset>/notebooks/. A notebook runs again when it, a module that it imports, or a notebook
before it has changed. To add a notebook, add its line to STORY.
"""
import json
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# notebook: data sets, the notebooks before it, and the results it writes (the .json, which is written last)
MOONS, IMAGES, DIGITS, ALL = ["moons"], ["digits", "cifar10", "cifar100"], ["digits"], ["all"]  # "all": once, whatever the data sets of the run
STORY = {
    "00_parzen":        (MOONS, [], []),
    "01_dsm":           (MOONS, [], []),
    "02_decomposition": (MOONS, [], []),
    "03_dlsm":          (MOONS, [], ["moons/fig2"]),
    "04_moons":         (MOONS, [], ["moons/levels", "moons/fig1", "moons/table1"]),
    "05_cifar":         (IMAGES, [], ["{dataset}/fig6_quality", "{dataset}/fig6_gradients", "{dataset}/fig6_alpha", "{dataset}/fig6_denoising", "{dataset}/fig6_alpha_by_level", "{dataset}/fig6"]),
    "06_sampling":      (IMAGES, ["05_cifar"], ["{dataset}/fig3", "{dataset}/fig3_alpha", "{dataset}/fig3_nfe"]),
    "07_evaluation":    (IMAGES, ["06_sampling"], ["{dataset}/table2", "{dataset}/frontier", "{dataset}/cas", "{dataset}/fig4"]),
    "07a_trainings":    (IMAGES, ["07_evaluation"], ["{dataset}/trainings_frontier", "{dataset}/trainings"]),
    "07b_ceiling":      (DIGITS, ["05_cifar", "07a_trainings"], ["{dataset}/ceiling", "{dataset}/ceiling_trainings"]),
    "08_ablations":     (MOONS, ["04_moons"], ["moons/fig5", "moons/fig5_sweep"]),
    "08a_networks":     (MOONS, ["04_moons"], ["moons/fig5_parts"]),
    "08b_levels":       (MOONS, ["04_moons"], ["moons/levels_causes"]),
    "08c_balance":      (DIGITS, ["05_cifar"], ["{dataset}/balance"]),  # for CIFAR by hand: five more trainings of stage 2
    "09_report":        (ALL, ["03_dlsm", "04_moons", "05_cifar", "06_sampling", "07_evaluation", "07a_trainings", "07b_ceiling", "08_ablations",
                               "08a_networks", "08b_levels", "08c_balance"], ["report"]),
    "index":            (ALL, ["09_report"], []),
}
STORY = {name: row for name, row in STORY.items() if Path(workflow.basedir, "nbs", f"{name}.ipynb").exists()}


def one_of(what, values, allowed):
    "Stop with one line at a name that is not known."
    unknown = [value for value in values if value not in allowed]
    if unknown: raise WorkflowError(f"{what}={','.join(map(str, values))}: {', '.join(map(repr, unknown))} is not known; there are {', '.join(allowed)}")


PRESET = config.get("preset", "demo")
one_of("preset", [PRESET], ("smoke", "demo", "cpu", "paper"))
if not re.fullmatch("[1-9][0-9]*", str(config.get("trainings", 1))): raise WorkflowError(f"trainings={config['trainings']}: expected a whole number from 1 on")
TRAININGS = int(config.get("trainings", 1))
if TRAININGS < 2:  # as long again as 05 and 06 for each further training: only if asked for
    del STORY["07a_trainings"]
    STORY["07b_ceiling"][2].remove("{dataset}/ceiling_trainings")
DATASETS = str(config.get("dataset", "moons,digits")).split(",")
one_of("dataset", DATASETS, (*MOONS, *IMAGES))
if PRESET == "paper": DATASETS = [dataset for dataset in DATASETS if dataset != "digits"]  # which the paper does not use
if PRESET == "cpu": DATASETS = [dataset for dataset in DATASETS if dataset.startswith("cifar")]  # `demo` is for processors on the others
if not DATASETS: raise WorkflowError(f"preset={PRESET} is not for {config.get('dataset', 'moons,digits')}: {'it is for CIFAR' if PRESET == 'cpu' else 'the paper has no digits'}")

# What a job of a cluster reserves, by data set or notebook, and by preset: minutes, MB and GPUs. One that is cut off goes on from its last checkpoint.
CIFAR = {"cpu": (360, 16_000, 0), "demo": (60, 32_000, 1), "paper": (2880, 64_000, 1)}
TRAINED = {"paper": (720, 32_000, 1)}  # the moons, where the paper trains on them
USUAL = (60, 16_000, 0)
RESERVED = {"cifar10": CIFAR, "cifar100": CIFAR, "04_moons": TRAINED, "08_ablations": TRAINED, "08a_networks": TRAINED, "08b_levels": TRAINED}

# On a small machine little of `demo` gains from a second thread: its data sets run side by side, each on its share of the cores.
SHARES = len(DATASETS) if PRESET == "demo" else 1
THREADS = 1 if PRESET == "smoke" else max(1, min(8, (workflow.resource_settings.cores or 8) // SHARES))

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


def earlier(name, dataset):
    "The notebooks to run before this one: on the same data, or if they are not for these data on all that were asked for."
    known = {before: [d for d in STORY[before][0] if d in (*DATASETS, *ALL)] for before in STORY[name][1] if before in STORY}
    return [executed(before, d) for before, datasets in known.items() for d in ([dataset] if dataset in datasets else datasets)]


def waiting(name):
    "How many notebooks have to wait for this one, the report aside: what most wait for begins first."
    after = [other for other, (datasets, before, _) in STORY.items() if name in before and datasets != ALL]
    return len(after) + sum(map(waiting, after))


def takes(name, parameter):
    "Whether the notebook has this parameter."
    return any(re.search(rf"^{parameter}\b", source, flags=re.MULTILINE) for source, tags in cells(name) if "parameters" in tags)


def placed(result, name):
    "Where `dlsm.runs.figure_dir` puts a result: those of preset paper in a folder of their own; the report, which is about all, in none."
    path = Path(result)
    own = PRESET not in ("smoke", "demo", "cpu") and takes(name, "preset") and len(path.parts) > 1
    return path.parent / PRESET / path.name if own else path


TARGETS = [(name, dataset) for name, (datasets, _, _) in STORY.items() for dataset in datasets if dataset in (*DATASETS, *ALL)]


rule all:
    input: [executed(*target) for target in TARGETS]


for story, data in TARGETS:
    figures = "runs/smoke/figures" if PRESET == "smoke" and takes(story, "preset") else "figures"
    minutes, memory, gpus = RESERVED.get(data, RESERVED.get(story, {})).get(PRESET, USUAL)
    if story in ("07a_trainings", "07b_ceiling"): minutes *= TRAININGS

    rule:
        name: f"{data}_{story}"
        input:
            notebook = f"nbs/{story}.ipynb",
            modules = modules("\n".join(source for source, _ in cells(story))),
            before = earlier(story, data),
        output:
            notebook = executed(story, data),
            results = [update(f"{figures}/{placed(result.format(dataset=data), story)}.json") for result in STORY[story][2]],
        threads: THREADS
        priority: waiting(story)
        resources: runtime=minutes, mem_mb=memory, gpu=gpus
        params:
            python = sys.executable,
            unfinished = executed(story, data).replace(".ipynb", ".unfinished.ipynb"),  # stays for a look if a cell fails
            given = " ".join(f"-p {key} {value}" for key, value in {"preset": PRESET, "dataset": data, "trainings": TRAININGS}.items() if takes(story, key)),
        shell:
            "OMP_NUM_THREADS={threads} {params.python:q} -m papermill {input.notebook} {params.unfinished} {params.given}"
            " -k python3 --no-progress-bar --log-level WARNING && mv {params.unfinished} {output.notebook}"
