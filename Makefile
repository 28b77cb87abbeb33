# SPDX-License-Identifier: Apache-2.0
# The targets are described in README.md; each works on a fresh Debian with git, make, gcc and python3 >= 3.11.
PYTHON := .venv/bin/python
SEEDS ?= 300
N ?= 200
T ?= 600
START ?= 1

.PHONY: setup demo test test-fast check bench soak faults chaos sim fuzz format clean

setup:
	@python3 -c 'import tomllib' 2>/dev/null || { echo 'setup: Python 3.11 or newer is needed (Debian 12 has it)' >&2; exit 1; }
	@python3 deploy/setup.py

demo: setup
	@$(PYTHON) -m deploy.demo --out build/demo

test: setup
	@$(PYTHON) -m pytest

test-fast:
	@python3 deploy/setup.py packages python helper
	@$(PYTHON) -m pytest tests/unit tests/sim tests/mesh -m "not guest"

check:
	@python3 deploy/setup.py packages python helper
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@clang-format --dry-run --Werror kernel/helper/*.[ch] kernel/helper/fuzz/*.[ch] kernel/guest/*.[ch]
	@kernel/helper/tidy build/helper

bench: setup
	@$(PYTHON) -m tests.bench $(B)

soak: setup
	@$(PYTHON) -m tests.soak --moves $(N)

chaos: setup
	@$(PYTHON) -m tests.chaos.split
	@$(PYTHON) -m tests.chaos.stopped
	@$(PYTHON) -m tests.chaos.leader --seconds $(T)

faults: setup
	@$(PYTHON) -m tests.faults $(or $(B),migration)

fuzz: T = 60
fuzz:
	@python3 deploy/setup.py packages python
	@$(PYTHON) -m tests.fuzz --seconds $(T)

sim:
	@python3 deploy/setup.py packages python
	@$(PYTHON) -m tests.sim.run --seeds $(SEEDS) --start $(START)

format:
	@.venv/bin/ruff check --fix --quiet . ; .venv/bin/ruff format . ; clang-format -i kernel/helper/*.[ch] kernel/helper/fuzz/*.[ch] kernel/guest/*.[ch]

clean:
	rm -rf build
