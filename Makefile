# quickstart and test set themselves up; all else uses the same .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Set SETUP=no to use an environment that is ready (CI does).
SETUP ?= yes

.PHONY: quickstart test check slow results install clean

install: $(VENV)/.installed

# torch comes first and pinned: a looser range would pull several gigabytes of accelerator libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
ifeq ($(SETUP),yes)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[offline,plots,test]"
	touch $@
endif

quickstart: install
	$(BIN)/hf-cl train quickstart --output-dir runs/quickstart --overwrite

test: install
	$(BIN)/python -m pytest

slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_floors.py

results: install
	$(BIN)/python scripts/make_results.py

clean:
	rm -rf $(VENV) runs build dist
