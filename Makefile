# Everything runs in ./.venv, which the first call makes. `make help` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
# For `make demo`: options of the demo, such as ARGS="--limit 500".
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-cluster test-compose check lint servers bench soak stress pictures dist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

demo: $(VENV)/.demo ## replay real events through a real broker, one worker killed in the middle (ARGS="--help")
	@PYTHONPATH=examples/demo $(BIN)/python -m demo $(ARGS)

test: ## all tests: unit, contract, broker, with private servers
	@$(MAKE) --no-print-directory -j2 servers lint
	SHARDING_TEST_BROKERS=$${SHARDING_TEST_BROKERS:-4} scripts/with_servers scripts/run_tests

test-slow: $(VENV)/.dev ## further cases of what `make test` tests, some minutes
	$(BIN)/pytest -m hypothesis --hypothesis-profile deep tests/unit
	scripts/with_servers $(BIN)/pytest -m "slow and not cluster"

test-cluster: $(VENV)/.dev ## nodes of a private three-node cluster killed, restarted and paused, one after the other; three minutes
	scripts/install_servers rabbitmq-server
	$(BIN)/pytest -m cluster tests/faults

test-compose: $(VENV)/.dev ## docker-compose.yml on a Docker engine, with stand-ins for missing images; ten minutes (tests/support/compose/engine.py)
	$(BIN)/pytest -m compose --log-cli-level INFO tests/compose

check: lint ## lint, format, types, layers, unit tests; no server, under a minute
	$(BIN)/pytest -n 2 --dist loadgroup tests/unit

lint: $(VENV)/.dev ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

servers: ## the servers that the tests need, installed in one go if they are missing; none is started
	@scripts/install_servers

bench: $(VENV)/.dev ## the benchmarks, as ratios to stock Celery
	PYTHONPATH=tests scripts/with_servers $(BIN)/python -m benchmarks $(ARGS)

soak: $(VENV)/.dev ## workers under random faults for MINUTES=10; SEED=, WORKERS=3, BROKER=URL or cluster, FAULTS=kill,cut,…
	$(if $(filter cluster,$(BROKER)),scripts/install_servers rabbitmq-server)
	$(if $(BROKER),SHARDING_TEST_BROKER_URL=$(BROKER)) PYTHONPATH=tests scripts/with_servers $(BIN)/python -m soak \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(if $(WORKERS),--workers $(WORKERS)) \
		$(if $(FAULTS),--faults $(FAULTS)) $(ARGS)

stress: $(VENV)/.dev ## 8 processes on 50 keys of each claim store for SECONDS=60, some killed and paused; STORES="URL …"
	PYTHONPATH=tests scripts/with_servers $(BIN)/python -m stress $(if $(SECONDS),--seconds $(SECONDS)) $(STORES) $(ARGS)

pictures: $(VENV)/.dev ## the pictures of the README: Flower's page of shards, light and dark
	PYTHONPATH=tests scripts/with_servers $(BIN)/python scripts/make_pictures

dist: $(VENV)/.dev ## the wheel and the source archive, in dist; the same sources make the same bytes
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

clean: ## remove .venv, dist and caches
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The version is read from the package when that is installed.
INSTALLED := pyproject.toml scripts/make_venv celery_sharding/__init__.py

$(VENV)/.demo: $(INSTALLED)
	@scripts/make_venv $(VENV) demo

$(VENV)/.dev: $(INSTALLED)
	@scripts/make_venv $(VENV) dev,all
