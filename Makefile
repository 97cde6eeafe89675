# `make demo` and `make test` each set up everything they need in .venv; a second run starts at once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test nightly lint kernels audit soak clean

setup:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found: install Python 3.10 or newer, or run make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) launch/bootstrap.py

demo: setup
	@$(BIN)/python -m launch.demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache > .venv/imports.log 2>&1 || { cat .venv/imports.log; exit 1; }

# Once, beside the linters: else every process of the tests compiles its own.
kernels: setup
	$(BIN)/python -m tests.compiled

test: setup
	@$(MAKE) --no-print-directory -j2 lint kernels
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not alone and not nightly"
	$(BIN)/python -m pytest -q -m "alone and not nightly"

# What takes too long for every change: jobs that die and restart, and a hundred thousand damaged messages.
nightly: setup
	$(BIN)/python -m pytest -q --timeout 1200 -m nightly
	COMPRESSION_PLUGINS_FUZZ_CASES=100000 $(BIN)/python -m pytest -q --timeout 7200 tests/fuzz tests/parameter_server/test_checkpoint.py

# Known vulnerabilities of what is installed: at each release. Needs the network; pip-audit lives in a folder of its own.
audit: setup
	@test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit; } || { echo "make audit: pip-audit could not be installed; it needs the package index" >&2; exit 2; }
	.venv/audit/bin/pip-audit --path $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") --skip-editable --progress-spinner off

# 20,000 steps of two ranks with all schemes in turn, 20 minutes at most: memory flat, residuals bounded.
soak: setup
	@$(BIN)/python -m launch.soak

clean:
	rm -rf .venv out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
