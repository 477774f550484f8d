"""The Snakefile: which notebooks a run consists of, what they write, and how they are submitted to a cluster."""
import json
import os
import re
import stat
import subprocess
import sys

import pytest

pytestmark = pytest.mark.project


def snakemake(copy, preset, dataset, *options, env=None):
    "Run snakemake in a copy of the project; its exit code and all that it prints."
    command = [sys.executable, "-m", "snakemake", "--config", f"preset={preset}", f"dataset={dataset}", *options]
    run = subprocess.run(command, cwd=copy, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=120, check=False)
    return run.returncode, run.stdout + run.stderr


def planned(copy, preset, dataset):
    "Of a dry run: {rule: what it writes}."
    code, said = snakemake(copy, preset, dataset, "--cores", "all", "--dry-run", "--forceall")
    assert code == 0, said
    return {name: re.split(r", ", written) for name, written in re.findall(r"^rule (\w+):.*?^ +output: (.*?)$", said, re.MULTILINE | re.DOTALL)}


def test_one_command_runs_everything_on_any_data_set(copy):
    "Images are trained on, sampled and evaluated, and the report is written at the end, whatever the data set; nothing is written twice."
    rules = planned(copy, "demo", "moons,digits,cifar10")
    images = {f"{data}_{name}" for data in ("digits", "cifar10") for name in ("05_cifar", "06_sampling", "07_evaluation")}
    moons = {f"moons_{name}" for name in ("00_parzen", "01_dsm", "02_decomposition", "03_dlsm", "04_moons", "08_ablations", "08a_networks", "08b_levels")}
    assert rules.keys() == images | moons | {"digits_07b_ceiling", "digits_08c_balance", "all_09_report", "all_index"}
    written = [path for paths in rules.values() for path in paths]
    assert len(written) == len({*written})
    assert {"figures/digits/table2.json (update)", "figures/cifar10/table2.json (update)", "figures/report.json (update)"} <= {*written}


def test_other_trainings_are_made_if_asked_for(copy):
    "They take as long again as all the rest."
    code, said = snakemake(copy, "demo", "digits", "trainings=5", "--cores", "2", "--dry-run", "--forceall", "--printshellcmds")
    assert code == 0 and "rule digits_07a_trainings" in said and re.search(r"07a_trainings\.ipynb .*-p trainings 5", said), said
    assert re.search(r"07b_ceiling\.ipynb .*-p trainings 5", said) and said.count("ceiling_trainings.json") == 1, said
    for preset in ("demo", "smoke"):
        rules = planned(copy, preset, "digits")
        assert "digits_07a_trainings" not in rules and len(rules["digits_07b_ceiling"]) == 2, rules["digits_07b_ceiling"]  # the notebook and one result


@pytest.mark.parametrize("preset, folder", [("cpu", "figures/cifar10"), ("paper", "figures/cifar10/paper")])
def test_cifar_in_the_presets_of_its_own(copy, preset, folder):
    "Preset paper keeps its figures beside those of a reduced scale; the digits are in neither preset."
    rules = planned(copy, preset, "digits,cifar10")
    assert rules.keys() == {"cifar10_05_cifar", "cifar10_06_sampling", "cifar10_07_evaluation", "all_09_report", "all_index"}
    assert f"{folder}/fig6.json (update)" in rules["cifar10_05_cifar"]


@pytest.mark.parametrize(("config", "words"), [
    ({"dataset": "moons,cifar"}, "dataset=moons,cifar: 'cifar' is not known; there are moons, digits, cifar10, cifar100"),
    ({"preset": "demmo"}, "preset=demmo: 'demmo' is not known; there are smoke, demo, cpu, paper"),
    ({"trainings": "many"}, "trainings=many: expected a whole number"), ({"dataset": "digits", "preset": "paper"}, "the paper has no digits"),
    ({"dataset": "moons", "preset": "cpu"}, "preset=cpu is not for moons: it is for CIFAR")])
def test_wrong_names_are_one_line(copy, config, words):
    given = {"preset": "demo", "dataset": "moons"} | config
    code, said = snakemake(copy, given.pop("preset"), given.pop("dataset"), *(f"{k}={v}" for k, v in given.items()), "--cores", "2", "--dry-run")
    assert code != 0 and words in said and "Traceback" not in said, said


def test_data_sets_share_a_small_machine(copy):
    "Two data sets on two cores: a thread each, and what others wait for begins first. One data set has both cores."
    def threads(dataset, cores):
        code, said = snakemake(copy, "demo", dataset, "--cores", cores, "--dry-run", "--forceall")
        assert code == 0, said
        job = re.search(r"^rule digits_05_cifar:(.*?)(?=^rule |^Job stats)", said, re.MULTILINE | re.DOTALL)[1]
        shown = dict(re.findall(r"(threads|priority): (\d+)", job))  # one thread is not shown
        return int(shown.get("threads", 1)), int(shown["priority"])
    assert threads("moons,digits", "2") == (1, 4) and threads("digits", "2") == (2, 4) and threads("moons,digits", "16") == (8, 4)


@pytest.fixture
def cluster(tmp_path):
    "Stand-ins for the commands of Slurm, first on the path: sbatch notes what it was given and takes no job."
    folder = tmp_path/"bin"
    folder.mkdir()
    note = tmp_path/"submitted.json"
    commands = {"sbatch": f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(note)!r}, 'w'))\nsys.exit('full')\n",
                "scontrol": "#!/bin/sh\necho 'MinJobAge = 300 sec'\n", "sinfo": "#!/bin/sh\necho 'normal*|up'\n",
                "sacctmgr": "#!/bin/sh\necho me\n"}
    commands |= dict.fromkeys(("squeue", "sacct", "scancel"), "#!/bin/sh\n")
    for name, text in commands.items():
        (folder/name).write_text(text, encoding="utf-8")
        (folder/name).chmod(stat.S_IRWXU)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}, note


@pytest.mark.parametrize(("dataset", "rule", "needs"), [
    ("cifar10", "cifar10_05_cifar", ("-t 2880", "--mem 64000", "--gpus=1")), ("moons", "moons_04_moons", ("-t 720", "--mem 32000", "--gpus=1"))])
def test_profile_of_slurm(copy, cluster, dataset, rule, needs):
    "A notebook is submitted with the time, the memory and the GPU that its preset needs, to the account and partition that were named."
    pytest.importorskip("snakemake_executor_plugin_slurm", reason='needs dlsm[cluster]')
    env, note = cluster
    code, said = snakemake(copy, "paper", dataset, "--profile", "profiles/slurm", "--retries", "0",
                           "--slurm-init-seconds-before-status-checks", "1", "--default-resources",
                           "slurm_account=me", "slurm_partition=normal", "--", rule, env=env)
    assert code != 0 and "full" in said and note.exists(), said
    given = " ".join(json.loads(note.read_text(encoding="utf-8")))
    expected = ("-A me", "-p normal", *needs, "--cpus-per-task=8", f"--comment rule_{rule}")
    assert [wanted for wanted in expected if wanted not in given] == []


@pytest.mark.parametrize(("preset", "dataset", "gpus"), [
    ("paper", "moons,cifar100", {"moons_04_moons", "moons_08_ablations", "moons_08a_networks", "moons_08b_levels",
                                 *(f"cifar100_{name}" for name in ("05_cifar", "06_sampling", "07_evaluation"))}),
    ("demo", "moons,digits", set())])
def test_who_reserves_a_gpu(copy, preset, dataset, gpus):
    code, said = snakemake(copy, preset, dataset, "--cores", "all", "--dry-run", "--forceall")
    assert code == 0, said
    jobs = re.findall(r"^rule (\w+):.*?^ +resources: (.*?)$", said, re.MULTILINE | re.DOTALL)
    assert {name for name, resources in jobs if "gpu=1" in resources} == gpus and len(jobs) > len(gpus)
