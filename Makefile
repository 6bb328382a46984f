# Two commands: `make train` and `make test` set up what they need. See CONTRIBUTING.md for the rest.
PYTHON ?= python3
RANKS ?= 2
CONFIG ?= configs/digits.yaml
VENV := .venv
BIN := $(VENV)/bin
# As many workers as tests/conftest.py says; what must not run beside other tests does so after them, by itself.
BESIDE := -n auto --dist worksteal
TESTED := not chaos and not compiles and not cluster
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help train test test-fast test-chaos test-long test-mpich test-deepspeed test-cluster lint format docs bench bench-all-reduce bench-overlap bench-adam bench-offload bench-deterministic bench-safety collectives parity kinds gallery clean

help:
	@echo "make train      train $(CONFIG) on $(RANKS) ranks (CONFIG=..., RANKS=... to change)"
	@echo "make test       the tests"
	@echo "make test-fast  the tests that take seconds"
	@echo "make test-chaos more ways of killing ranks"
	@echo "make test-long  the long forms: 1,000 kills, 100,000 wrong configurations, and so on; an hour"
	@echo "make test-mpich the tests over MPI with MPICH too (Open MPI is there)"
	@echo "make test-deepspeed  the tests that have DeepSpeed compile its Adam for the CPU"
	@echo "make test-cluster     the tests with emulated hosts, a Slurm of their own, and containers; as root"
	@echo "make lint       ruff and mypy"
	@echo "make docs       configuration.md, kinds.md, collectives.md, zero.md in docs/, again from schema, code and figures"
	@echo "make parity     docs/parity.md: every strategy on every transport against plain PyTorch"
	@echo "make bench      benchmarks/loop_overhead.py"
	@echo "make bench-all-reduce  benchmarks/all_reduce.py: every all-reduce against gloo's and MPI's; as root for all of it"
	@echo "make bench-overlap     benchmarks/overlap.py: how much of communication hides behind backward; as root"
	@echo "make bench-adam        benchmarks/cpu_adam.py: the update on the CPU against DeepSpeed's, torch's and the memory"
	@echo "make bench-offload     benchmarks/offload.py: how near offloaded training comes to what cannot be hidden; memory"
	@echo "make bench-deterministic  benchmarks/deterministic.py: what the same bits on any number of ranks cost"
	@echo "make bench-safety      benchmarks/safety.py: what everything that keeps a run safe costs"
	@echo "make collectives       the pictures of what these two measured"
	@echo "make kinds      benchmarks/kinds.py: every kind of learning against its figure"
	@echo "make gallery    docs/images/gallery.png: optimizers times schedules"
	@echo "make clean      remove what these commands made (not runs/)"

train: $(VENV)/.train
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(RANKS) -m distloop train $(CONFIG) --world.device cpu

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(BESIDE) -m "$(TESTED) and not alone"
	$(BIN)/python -m pytest -m "$(TESTED) and alone"

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest $(BESIDE) -m "$(TESTED) and not slow and not alone"
	$(BIN)/python -m pytest -m "$(TESTED) and not slow and alone"

test-chaos: $(VENV)/.dev
	$(BIN)/python -m pytest -m chaos

test-long: $(VENV)/.dev
	$(BIN)/python -m tests.long

test-mpich: $(VENV)/.dev .mpich/bin/mpiexec
	$(BIN)/python -m pytest tests/test_mpi.py

test-deepspeed: $(VENV)/.dev
	$(BIN)/python -m pytest -m compiles

test-cluster: $(VENV)/.dev
	$(BIN)/python -m pytest -m cluster

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/python docs/configuration.py
	$(BIN)/python docs/kinds.py
	$(BIN)/python docs/figures.py

parity: $(VENV)/.dev
	$(BIN)/python docs/parity.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/loop_overhead.py

bench-all-reduce: $(VENV)/.dev
	$(BIN)/python benchmarks/all_reduce.py

bench-overlap: $(VENV)/.dev
	$(BIN)/python benchmarks/overlap.py

bench-adam: $(VENV)/.dev
	$(BIN)/python benchmarks/cpu_adam.py

bench-offload: $(VENV)/.dev
	$(BIN)/python benchmarks/offload.py

bench-deterministic: $(VENV)/.dev
	$(BIN)/python benchmarks/deterministic.py

bench-safety: $(VENV)/.dev
	$(BIN)/python benchmarks/safety.py

collectives: $(VENV)/.dev
	$(BIN)/python benchmarks/pictures.py

kinds: $(VENV)/.dev
	$(BIN)/python benchmarks/kinds.py

gallery: $(VENV)/.dev
	$(BIN)/python docs/gallery.py

clean:
	rm -rf $(VENV) .mpich build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# What training needs, and what developing needs on top of it; made again when their description changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) (a minute or so) ..."
	$(INSTALL) --editable ".[digits,plots,tensorboard,rl]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) (a minute or so) ..."
	$(INSTALL) --editable ".[dev]"
	@touch $@

# Apart from $(VENV), whose MPI is Open MPI: an environment has one.
.mpich/bin/mpiexec: | $(VENV)/bin/python
	$(INSTALL) --ignore-installed --no-deps --prefix .mpich mpich
