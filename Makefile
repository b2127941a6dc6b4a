# Every target sets itself up in .venv first, once.
VENV ?= .venv
WORKERS ?= 2
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: quickstart test check slow prove results install clean

install: $(VENV)/.installed

# torch comes first and pinned, so that a build of it which is chosen for this machine is not replaced later.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[offline,plots,test]"
	touch $@

quickstart: install
	$(BIN)/hf-cl train quickstart --output-dir runs/quickstart --overwrite
	@echo "hf-cl is in $(BIN); put it on your path with: source $(BIN)/activate"

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

slow: install
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_floors.py

# HF_CL_DATA=FOLDER make prove; PROVE="--tasks 6" for a rehearsal. Again, it goes on where it stopped.
prove: install
	$(BIN)/python scripts/prove.py $(PROVE)

results: install
	$(BIN)/python scripts/make_results.py

clean:
	rm -rf $(VENV) build dist
