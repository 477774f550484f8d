"""The project itself: code as the notebooks export it, clean notebooks, packaging, lock file, and every notebook run once."""
import ast
import configparser
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from conftest import unpacked
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TEXT = {".py", ".ipynb", ".md", ".ini", ".toml", ".yml", ".yaml", ".json", ".cff", ".lock", ".svg", ".in", ""}


@pytest.fixture(scope="module")
def settings(root):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def run(command, cwd):
    "Run a command of this environment in `cwd`, one thread a process; fail with the end of its output."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {k: v for k, v in os.environ.items() if k != "DLSM_ROOT"} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd), "PATH": path}
    done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}"
    return done.stdout


def contents(folder, pattern): return {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.glob(pattern))}


def differing(before, after): return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


# ---- code and notebooks

def test_exported_code_is_in_sync(copy):
    before = contents(copy/"dlsm", "*.py")
    run(["nbdev_export"], copy)
    names = differing(before, contents(copy/"dlsm", "*.py"))
    assert not names, f"run `make export`: dlsm/ differs from the notebooks in {names}"


def test_every_module_comes_from_a_notebook(root):
    exported = {m[1] for p in root.glob("nbs/*.ipynb") if (m := re.search(r"#\| ?default_exp (\w+)", p.read_text(encoding="utf-8")))}
    assert {p.stem for p in root.glob("dlsm/*.py")} - {"__init__", "_modidx"} == exported


def test_notebooks_are_clean(copy):
    before = contents(copy/"nbs", "*.ipynb")
    run(["nbdev_clean"], copy)
    names = differing(before, contents(copy/"nbs", "*.ipynb"))
    assert not names, f"run `make export`: not clean are {names}"


def test_readme_is_the_index(copy):
    if not (copy/"nbs/index.ipynb").exists(): pytest.skip("no index yet")
    before = (copy/"README.md").read_text(encoding="utf-8")
    run(["jupyter", "nbconvert", "--config", "nbs/readme.py"], copy)
    assert before == (copy/"README.md").read_text(encoding="utf-8"), "run `make readme`: README.md differs from nbs/index.ipynb"


def test_notebooks_hold_no_error_and_one_parameters_cell(root):
    for path in sorted(root.glob("nbs/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(o["output_type"] == "error" for c in cells for o in c.get("outputs", [])), f"{path.name} holds an error"
        assert path.stat().st_size <= 2**20, f"{path.name} is larger than 1 MB"
        if re.match("0[4-8]_", path.name): assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1, path.name


def test_stored_outputs_name_no_folder_of_a_machine(root):
    "Warnings come with the file of the kernel, and temporary folders with their names."
    for path in sorted(root.glob("nbs/*.ipynb")):
        outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
        text = "".join("".join(o.get("text", "")) + "".join("".join(v) for kind, v in o.get("data", {}).items() if kind.startswith("text/")) for o in outputs)
        assert not (found := re.search(r"(/tmp|/home|/Users|/root|/var/folders)/\S*", text)), f"{path.name}: {found[0]}"


def test_notebooks_leave_the_root_as_it_was(root):
    "Several run in one process: a notebook that moves the root for its checks puts it back."
    for path in root.glob("nbs/1*.ipynb"):
        source = "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
        if 'environ["DLSM_ROOT"] =' in source: assert re.search(r'del os.environ\["DLSM_ROOT"\]|environ.pop\("DLSM_ROOT"\)', source), path.name


def test_every_story_notebook_has_a_rule(root):
    rules = (root/"Snakefile").read_text(encoding="utf-8")
    assert not [p.stem for p in root.glob("nbs/0*.ipynb") if f'"{p.stem}":' not in rules]


def test_code_is_linted(copy):
    run(["ruff", "check", "--no-cache", "."], copy)


def names_of_the_machine(text, home, root):
    "Paths of a machine, addresses of registries, folders of a build: those in a text. A home or a clone counts if its path has two parts; `/` and `/dlsm` are everywhere."
    words = {"pypi" + ".org", "files.python" + "hosted", "down" + "load.pytorch", "conda" + ".anaconda", "." + "carry"}
    folders = {"/".join(["", "work", ""]), "/".join(["", "root", ""]), *(f"{place.as_posix()}/" for place in (home, root) if len(place.parts) > 2)}
    plain = re.sub(r"https?://[^\s)>\"'`]+", "", text)  # an address is no path
    return sorted({word for word in words if word in text} | {folder for folder in folders if re.search(rf"(?<![\w.-]){re.escape(folder)}", plain)})


def test_tracked_files_name_nothing_of_the_machine(root, tracked):
    "No path of a machine, no registry's address; only the script of continuous integration knows its neighbour."
    neighbour = "../" + "shared"
    found = []
    for path in tracked:
        if path.suffix not in TEXT: continue
        text, name = path.read_text(encoding="utf-8", errors="ignore"), path.relative_to(root).as_posix()
        found += [(name, word) for word in names_of_the_machine(text, Path.home(), root)]
        if neighbour in text and name != ".ci/run": found.append((name, neighbour))
    assert not found


@pytest.mark.parametrize(("text", "home", "root", "found"), (
    ("a // b, see https://example.org/a/b", "/", "/src/a", []), ("the folder dlsm/ and https://example.org/dlsm/dlsm/", "/home/me", "/dlsm", []),
    ("https://example.org/home/me/x", "/home/me", "/src/a", []), ("data/home/me/x", "/home/me", "/src/a", []),
    ("in '/home/me/x' and file:///src/a/b", "/home/me", "/src/a", ["/home/me/", "/src/a/"]), ("=/src/a/b", "/", "/src/a", ["/src/a/"]),
    ("/".join(["", "work", "x"]) + " ." + "carry", "/", "/dlsm", ["." + "carry", "/".join(["", "work", ""])])))
def test_which_names_are_a_machines(text, home, root, found):
    assert names_of_the_machine(text, Path(home), Path(root)) == sorted(found)


def test_an_unpacked_archive_has_the_same_files(root, tracked, tmp_path):
    "Without git, files are known by their place: what was built is left out, and tests/data is not taken for the data."
    built = {"data/x.bin", "runs/x.pt", ".venv/x.py", ".venv-old/x.py", "dlsm/__pycache__/x.pyc", "dlsm.egg-info/PKG-INFO", "nbs/.ipynb_checkpoints/x.ipynb"}
    ours = {path.relative_to(root).as_posix() for path in tracked}
    for name in ours | built:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    found = {name.as_posix() for name in unpacked(tmp_path) if (tmp_path/name).is_file()}
    assert found == ours and "tests/data/parity_keys.json" in found


# ---- requirements

def all_requirements(settings):
    "Those of the library and of its extras, in the order of settings.ini."
    return [wanted for key in settings if key.endswith("requirements") for wanted in settings[key].split()]


def test_lock_satisfies_settings(root, settings):
    locked = {}
    for line in (root/"requirements.lock").read_text(encoding="utf-8").splitlines():
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "==" and requirement.url is None, line
        locked.setdefault(canonicalize_name(requirement.name), []).append((pin.version, requirement.marker))
    for wanted in map(Requirement, all_requirements(settings)):
        versions = locked.get(canonicalize_name(wanted.name), [])
        assert versions and all(wanted.specifier.contains(version) for version, _ in versions), f"run `make lock`: {wanted}"
        for python in ("3.11", "3.12", "3.13"):
            env = default_environment() | {"python_version": python, "python_full_version": f"{python}.1"}
            assert sum(marker is None or marker.evaluate(env) for _, marker in versions) == 1, f"{wanted} for Python {python}"


def test_environment_lists_the_same_requirements(root, settings):
    dependencies = yaml.safe_load((root/"environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert pip == [*all_requirements(settings), "-e ."], "the requirements of settings.ini and its extras, then dlsm itself"
    assert {"git", "make", "pip", f"python>={settings['min_python']}"} <= {entry for entry in dependencies if isinstance(entry, str)}
    assert "conda env create -f environment.yml" in (root/"README.md").read_text(encoding="utf-8")


def test_modules_import_only_what_the_library_requires(root, settings):
    "At import time; a function may still import something optional."
    owners = {module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()}
    installed = set().union(*owners.values())
    allowed, queue = set(), [Requirement(r).name for r in settings["requirements"].split()]
    while queue:
        if (name := canonicalize_name(queue.pop())) in allowed: continue
        allowed.add(name)
        needs = map(Requirement, requires(name) or []) if name in installed else []
        queue += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    for path in root.glob("dlsm/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dlsm"}:
                assert owners.get(top, set()) & allowed, f"{path.name} imports {top}, which settings.ini does not require"


def test_citation(root, settings):
    citation = yaml.safe_load((root/"CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings["version"] and citation["authors"] == [{"name": settings["author"]}]
    assert citation["license"] == "Apache-2.0" and len(citation["preferred-citation"]["authors"]) == 9
    assert f"## {settings['version']}" in (root/"CHANGELOG.md").read_text(encoding="utf-8")


def test_one_address_or_none(root, settings):
    "README.md, settings.ini and CITATION.cff name the same public address, or none of them does; nothing is installed from another."
    readme, citation = ((root/name).read_text(encoding="utf-8") for name in ("README.md", "CITATION.cff"))
    cited = re.search(r"^@software\{.*?^\}", readme, re.MULTILINE | re.DOTALL)[0]
    named = {"settings.ini": settings["git_url"], "CITATION.cff": yaml.safe_load(citation).get("repository-code", ""),
             "README.md": "".join(re.findall(r"url *= *\{(.*?)\}", cited))}
    (address,) = {url.rstrip("/") for url in named.values()}  # one
    assert all(address and url.startswith(address) for url in re.findall(r"git\+([^\s\"]+)", readme))
    assert address or not re.search(r"git(hub|lab)\.\w+[/:]dlsm", readme + citation + (root/"settings.ini").read_text(encoding="utf-8"))
    assert f"version = {{{settings['version']}}}" in cited


def test_no_formula_was_broken_by_an_escape(root):
    "`\\tilde` written as a tab and `ilde`, and its like."
    for path in sorted(root.glob("nbs/*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown": assert not re.search(r"[\x00-\x09\x0b-\x1f]", "".join(cell["source"])), (path.name, cell["id"])


def test_commands_of_the_readme_have_parameters_that_exist(root):
    "papermill only warns of an unknown one."
    commands = re.findall(r"^papermill (nbs/\S+) (.*)$", (root/"README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [Path(path).stem for path, _ in commands] == ["05_cifar", "06_sampling", "07_evaluation"]
    for path, options in commands:
        cells = json.loads((root/path).read_text(encoding="utf-8"))["cells"]
        (known,) = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        given = dict(re.findall(r"-p (\w+) (\S+)", options))
        assert given.keys() <= {*re.findall(r"^(\w+):", known, re.MULTILINE)} and (given["dataset"], given["preset"]) == ("cifar10", "cpu"), path


# ---- what takes minutes

@pytest.mark.project
def test_machinery_notebooks(copy):
    run(["nbdev_test", "--file_re", "^1", "--n_workers", str(min(4, os.cpu_count())), "--do_print"], copy)


@pytest.mark.project
def test_every_story_notebook_runs_on_its_defaults(copy):
    run([sys.executable, "-m", "snakemake", "--cores", "all", "--keep-going", "--quiet", "rules", "--config", "preset=smoke", "trainings=2"], copy)
    ran = {path.stem for path in (copy/"runs/smoke/notebooks").rglob("*.ipynb")}
    assert ran == {path.stem for path in (copy/"nbs").glob("0*.ipynb")} | {path.stem for path in (copy/"nbs").glob("index.ipynb")}


@pytest.mark.project
def test_wheel_in_an_empty_environment(copy, settings, tmp_path):
    """Build the archive and from it the wheel, install the wheel into an empty environment, and import every module.

    The requirements are not installed again (6 GB): a path file shows the environment the packages installed here, but not
    this project, because path files found that way (an editable install is one) are not followed. The workflow `wheel`
    installs everything anew. No network is needed: setuptools, which builds, is installed here too."""
    run([sys.executable, "-m", "uv", "build", "--offline", "--no-build-isolation", "--python", sys.executable, "--quiet", "--out-dir", tmp_path/"dist"], copy)
    (sdist,), (wheel,) = tmp_path.glob("dist/*.tar.gz"), tmp_path.glob("dist/*.whl")
    inside = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"settings.ini", "LICENSE", "CITATION.cff", "dlsm/paper.json"} <= inside
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    assert {n.partition("/")[0] for n in names} == {"dlsm", f"dlsm-{settings['version']}.dist-info"}
    assert any(n.endswith("/LICENSE") for n in names) and "License-Expression: Apache-2.0" in metadata
    assert {p.relative_to(copy).as_posix() for p in copy.glob("dlsm/*") if p.is_file()} <= set(names)
    required = [Requirement(line.partition(": ")[2]) for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    for key, extra in (("requirements", ""), ("evaluation_requirements", "evaluation"), ("dev_requirements", "dev"),
                       ("cluster_requirements", "cluster")):
        expected = {(r.name, r.specifier) for r in map(Requirement, settings[key].split())}
        assert {(r.name, r.specifier) for r in required if extra in str(r.marker or "") and bool(r.marker) == bool(extra)} == expected

    run([sys.executable, "-m", "venv", "--without-pip", tmp_path/"env"], tmp_path)
    python = tmp_path/"env/bin/python"
    run([sys.executable, "-m", "uv", "pip", "install", "--offline", "--quiet", "--no-deps", "--python", python, wheel], tmp_path)
    (packages,) = (tmp_path/"env").glob("lib/python*/site-packages")
    (packages/"requirements.pth").write_text(os.path.dirname(os.path.dirname(pytest.__file__)))
    code = ("import dlsm, importlib, pkgutil; print(dlsm.__file__, dlsm.__version__)\n"
            "for module in pkgutil.iter_modules(dlsm.__path__): importlib.import_module(f'dlsm.{module.name}')\n"
            "from dlsm.runs import paper; paper('table1')")
    place, version = run([python, "-I", "-c", code], tmp_path).split()
    assert Path(place).is_relative_to(packages.resolve()) and version == settings["version"]
