# Every target does the set-up it needs. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := lockstep configs data_pipeline cluster registry trainer serving

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "received $$($(PYTHON) --version); Python 3.11 or newer is needed. Use make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: setup
setup: $(READY) ## Virtual environment with the pinned versions

data/flights/.ready: lockstep/examples.py | $(READY)
	$(BIN)/lockstep example flights
	@touch $@

.PHONY: train
train: $(READY) data/flights/.ready ## The main job: flights, two workers, from data to artifact
	$(BIN)/lockstep train configs/flights.yaml

.PHONY: test
test: lint ## Lint, types and all tests but the long ones
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target types unit
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target integration contract

.PHONY: lint
lint: $(READY) ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(READY) ## Types
	$(BIN)/mypy $(PACKAGES)

.PHONY: unit
unit: $(READY) ## Tests without Ray
	$(BIN)/pytest tests/unit

.PHONY: integration
integration: $(READY) ## Tests with training processes
	$(BIN)/pytest -m "not long and not chaos" tests/contract/parity tests/integration tests/chaos

# It gives way to integration, which leaves a third of two cores unused.
.PHONY: contract
contract: $(READY) ## Tests with real files, databases and packages, and of all manifests
	nice -n 19 $(BIN)/pytest -m "not long and not chaos" --ignore tests/contract/parity tests/contract tests/deploy

.PHONY: k8s-check
k8s-check: $(READY) ## All manifests against the rules of Kubernetes, KubeRay and the operator; a part of test
	$(BIN)/pytest -m "not long" tests/deploy

.PHONY: test-all
test-all: lint types unit ## All tests but those of test-chaos, the long ones too, and docs/parity.md
	LOCKSTEP_PARITY_REPORT=docs/parity.md $(BIN)/pytest -m "not chaos" tests/contract tests/integration tests/chaos tests/deploy

.PHONY: test-chaos
test-chaos: $(READY) ## Every fault in every phase, fifty random kills, several hosts
	$(BIN)/pytest -m chaos tests/chaos tests/integration

.PHONY: test-clients
test-clients: $(READY) ## Clients of others, unmodified, in an environment of their own
	$(BIN)/python -m tests.clients.run

.PHONY: parity-legacy
parity-legacy: $(READY) ## The second opinion: tf_keras under the same strategy, for docs/parity.md
	$(BIN)/python -m tests.contract.parity.legacy build/parity-legacy.json

.PHONY: format
format: $(READY) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: bench-step
bench-step: $(READY) ## Steps and examples a second beside plain Keras and tf_keras
	$(BIN)/python -m benchmarks.step

.PHONY: bench-data
bench-data: $(READY) ## Rows a second beside Ray Data, tf.data and plain decoding
	$(BIN)/python -m benchmarks.data

.PHONY: bench-recovery
bench-recovery: $(READY) data/flights/.ready ## Seconds lost to kills, and the cost of checkpoints
	$(BIN)/python -m benchmarks.recovery

.PHONY: bench-serving
bench-serving: $(READY) ## Predictions a second, online and in batches, beside Ray Serve and Ray Data
	$(BIN)/python -m benchmarks.serving

.PHONY: bench-queue
bench-queue: $(READY) ## Decisions of the queue at 10,000 jobs and 1,000 nodes
	$(BIN)/python -m benchmarks.queue

.PHONY: catalog
catalog: $(READY) ## The table of Keras names, after a change of the Keras version
	$(BIN)/python -m trainer.catalog

.PHONY: lock
lock: $(READY) ## Resolve the versions anew
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --extra examples --extra dev --extra postgres --extra mlflow --extra kubernetes --no-header --no-annotate pyproject.toml -o requirements.lock
	for kind in cpu gpu; do $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --extra postgres --extra mlflow --extra kubernetes $$(test $$kind = gpu && echo --extra gpu) --no-header --no-annotate \
	  -c requirements.lock pyproject.toml -o deploy/docker/$$kind.lock; done

.PHONY: clean
clean: ## Remove what was built, not data and runs
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
