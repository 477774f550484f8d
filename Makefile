# Everything that is done to this project is done from here; `make` alone lists it.
# Only make and Python 3.11 or newer are needed: the first call installs requirements.lock into .venv.
PRESET = demo
DATASET = moons,digits
TRAININGS =
CORES = all
PROFILE =
PYTHON =

python = .venv/bin/python
new_enough = -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

# glibc returns a training's large tensors to the system in every step and asks for them again; kept, steps on a CPU take two thirds of the time.
export MALLOC_MMAP_THRESHOLD_ = 1073741824
export MALLOC_TRIM_THRESHOLD_ = 4294967296

help: ## list what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

reproduce: .venv/.ready ## run the notebooks that are not up to date and write figures/ (PRESET=demo DATASET=moons,digits TRAININGS= CORES=all PROFILE=)
	@$(python) -m snakemake $(if $(PROFILE),--profile $(PROFILE),--cores $(CORES)) --config preset=$(PRESET) dataset=$(DATASET) $(if $(TRAININGS),trainings=$(TRAININGS)) \
	  --rerun-triggers mtime --rerun-incomplete --nolock --keep-going --quiet rules

test: .venv/.ready ## check everything: exported code, notebooks, tests, every notebook once, the package
	@OMP_NUM_THREADS=1 $(python) -m pytest --durations=10 --numprocesses=auto --maxprocesses=4 --dist=worksteal

verify: .venv/.ready ## run everything in a fresh clone and compare every value with the committed ones (PRESET DATASET CORES)
	@$(python) -m dlsm.verify --preset $(PRESET) --dataset $(DATASET) --cores $(CORES)

lab: .venv/.ready ## open JupyterLab on the index
	@$(python) -m jupyter lab nbs/index.ipynb

bench: .venv/.ready ## run the benchmarks and keep what they compare in figures/benchmarks/
	@$(python) -m pytest benchmarks --benchmark-enable --keep -s

export: .venv/.ready ## write dlsm/ from the notebooks, and clean the notebooks
	@.venv/bin/nbdev_export && .venv/bin/nbdev_clean

readme: .venv/.ready ## write README.md from nbs/index.ipynb
	@$(python) -m jupyter nbconvert --config nbs/readme.py

lock: .venv/.ready ## choose new versions of all requirements
	@$(python) -m uv pip compile setup.py --all-extras --universal --python-version 3.11 --upgrade --quiet \
	  --no-header --no-annotate --no-emit-index-url --output-file requirements.lock

clean: ## remove smoke runs, caches and built packages; trained models, data and figures stay
	@rm -rf runs/smoke runs/*/smoke .snakemake build dist *.egg-info .pytest_cache .ruff_cache .benchmarks

# uv if there is one, else venv and pip. The stamp is written last, so an interrupted installation goes on at the next call.
.venv/.ready: requirements.lock settings.ini setup.py
	@set -e; if ! $(python) $(new_enough); then \
	  for candidate in $(PYTHON) python3.13 python3.12 python3.11 python3 python; do \
	    if $$candidate $(new_enough); then found=`$$candidate -c 'import sys; print(sys.executable)'`; break; fi; done; \
	  if [ -z "$$found" ]; then echo "Python 3.11 or newer is needed and was not found; name it: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	  rm -rf .venv; echo "Making .venv with $$found"; \
	  if command -v uv >/dev/null; then uv venv --quiet --python "$$found" .venv; else "$$found" -m venv .venv; fi; fi; \
	echo "Installing requirements.lock (up to 6 GB with CUDA)"; \
	if command -v uv >/dev/null; then install="uv pip install --quiet --compile-bytecode --python $(python)"; \
	else install="$(python) -m pip install --quiet --disable-pip-version-check --use-pep517"; fi; \
	$$install --no-deps -r requirements.lock; $$install --no-deps --no-build-isolation -e .; touch $@

.PHONY: help reproduce test verify lab bench export readme lock clean
