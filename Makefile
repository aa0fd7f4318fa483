PYTHON ?= python3

.PHONY: demo test lint

demo: .venv/installed
	.venv/bin/python demo/demo.py

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@
