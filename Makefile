# Two commands to start: `make demo` and `make test`. Everything lands in .venv and in the user's cache directory.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-fast lint native wheel clean

demo: native
	$(BIN)/kvcompose demo

test: native
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/build_native.py --stock
	$(BIN)/python -m pytest

test-fast: native
	$(BIN)/python -m pytest -m "not model"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/patches.py check

native: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/build_native.py

# a wheel for every Linux machine of this kind; it lands in dist
wheel: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[wheel]"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/build_wheel.py

# the bindings without a llama.cpp of their own, and this checkout as it is; the library is built above, with its progress shown
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet cmake ninja platformdirs "tomli; python_version < '3.11'"
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/python -m pip install --quiet llama-cpp-python==0.3.36
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/build_native.py
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) kvcompose_gguf/lib
