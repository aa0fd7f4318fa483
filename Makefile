PYTHON ?= python3
VENV ?= .venv
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo check test lint

demo: $(VENV)/installed
	$(VENV)/bin/python demo/demo.py

check: lint
	$(PYTEST) -m "not slow"

test: $(VENV)/installed
	$(PYTEST)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m mypy .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --requirement requirements.txt
	touch $@
