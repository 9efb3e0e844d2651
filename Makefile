# `make help` lists what there is. Every target sets up .venv itself when it is missing or out of date.
PYTHON ?= python3
VENV   ?= .venv
GRID   ?= demo
START  ?= nbs/tutorials/explore.ipynb
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONNOUSERSITE := 1
export JUPYTER_PREFER_ENV_PATH := 1
export RAY_USAGE_STATS_ENABLED := 0
export DO_NOT_TRACK := 1

.PHONY: help setup demo benchmark lint test test-slow wheel lab docs export clean distclean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 picks the interpreter, GRID=name another params/name.yml for the demo,"
	@echo "  ARGS='...' goes on to the grid, pytest or JupyterLab: make test ARGS='-k backbones'."

setup: $(READY) ## install everything into .venv (the other targets do it when needed)

$(READY): settings.ini constraints.txt setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: '$(PYTHON)' not found; name an interpreter with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"make: Python 3.10 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; name another with PYTHON=...")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; install it first (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Setting up $(VENV) (minutes the first time, seconds later)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[workbook,hf,graph,onnx,docs,dev]'
	@$(BIN)/jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements >/dev/null 2>&1 || true
	@$(BIN)/python -W ignore -c 'import torchvision' 2>/dev/null || echo "torchvision does not fit torch here: import vlmadapt before open_clip and transformers (README, Questions)"
	@touch $@

demo: $(READY) ## run a small grid on the built-in synthetic benchmark, then its table and figures (3 minutes, two cores)
	@HF_HUB_OFFLINE=1 $(BIN)/vlmadapt grid params/$(GRID).yml $(ARGS)
	@HF_HUB_OFFLINE=1 $(BIN)/vlmadapt report $(GRID)

benchmark: $(READY) ## run every method on every dataset of the built-in synthetic benchmark (half an hour, two cores)
	@$(MAKE) --no-print-directory demo GRID=mini

lint: $(READY) ## format, rules and types of notebooks, tests and library (seconds)
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/basedpyright

test: $(READY) ## the tests that a change needs first (8 minutes, two cores)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(READY) ## the other tests: whole grids, every experiment and report, the site in a browser
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

wheel: $(READY) ## install the wheel without extras into an empty environment, and run README's lines there (minutes)
	@$(BIN)/python tools/try_wheel.py --python $(PYTHON)

lab: $(READY) ## open JupyterLab on the first tutorial
	@$(BIN)/jupyter lab $(START) --notebook-dir=. $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

docs: $(READY) ## build the site in _docs/html
	@$(BIN)/python tools/docs.py

export: $(READY) ## write what is derived: the library, README.md, environments, cells for visitors; clean the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python tools/derived.py

clean: ## remove what builds leave behind; keeps .venv and outputs/
	rm -rf build dist _docs *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV)
