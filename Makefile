# Two commands do everything on a fresh machine:
#   make quickstart   install, then run the whole job on the embedded model (CPU, offline, minutes)
#   make test         install with the test extra, then run the tests
# For hours, or for a night: make fuzz SECONDS=3600, make fuzz COUNT=100000 KINDS="recipe rows" (docs/fuzzing.md)
# An environment of your own: make test VENV=/path/to/venv PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

# Without an NVIDIA GPU the CPU build of torch is taken: the default one brings gigabytes of CUDA libraries.
ifeq ($(shell uname -s)-$(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu),Linux-)
TORCH ?= --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif

.PHONY: install quickstart test lint slow fuzz audit sbom docs
install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/recover run recipes/quickstart.yaml

test: $(STAMP)-test
	$(BIN)/python -m pytest -n auto --dist worksteal

slow: $(STAMP)-test
	$(BIN)/python -m pytest -m slow

fuzz: $(STAMP)-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RUST_BACKTRACE=0 $(BIN)/python dev/fuzz.py $(KINDS) \
		$(if $(COUNT),--count $(COUNT)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

lint: $(STAMP)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Known faults of the locked versions; skipped, with a word, where pip-audit or its database is not to be had.
audit: $(STAMP)-test
	-$(BIN)/pip install -q --retries 0 -e ".[audit]"
	$(BIN)/python dev/dependencies.py audit

# The documentation site, into build/site; a link that leads nowhere is an error. DOCS=--if-had: skipped, with a word,
# where mkdocs-material is not to be had.
docs: $(STAMP)
	-$(BIN)/pip install -q --retries 0 -c constraints.txt -e ".[docs]"
	$(BIN)/python dev/docs_site.py build $(DOCS)

sbom: $(STAMP)-test
	$(BIN)/python dev/dependencies.py sbom

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	touch $@

# DS_BUILD_OPS=0: no CUDA extension is compiled at installation.
$(STAMP): $(VENV)/.torch pyproject.toml constraints.txt
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(STAMP)-test: $(STAMP) pyproject.toml constraints.txt
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@
