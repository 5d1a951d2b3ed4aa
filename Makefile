# Two commands do everything on a fresh Debian 12 or 13, as root:
#   make demo    make test
# What they need is installed the first time and then left alone: Debian packages, and Python ones in .venv.

.DELETE_ON_ERROR:
.PHONY: help setup demo record bench test test-releases test-vm chaos deb lint typecheck man reference lock clean

# Debian's Python: the headers that NetfilterQueue is built with belong to it.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
CHAOS_ARGS ?=
# The tests of a file share a lab, so a file is one worker's.
WORKERS ?= 2

PACKAGES := \
	build-essential python3-dev python3-venv libnetfilter-queue-dev \
	charon-systemd strongswan-swanctl strongswan-pki strongswan-starter strongswan-charon \
	libcharon-extra-plugins libcharon-extauth-plugins libstrongswan-extra-plugins libstrongswan-standard-plugins \
	redis-server redis-tools freeradius \
	bird2 \
	iproute2 iputils-ping iptables nftables procps kmod tshark \
	prometheus faketime mandoc zsh fish

# Debian 13 has none.
ifeq ($(shell . /etc/os-release && echo $$VERSION_CODENAME),bookworm)
PACKAGES += vagrant
endif

DEVELOPMENT := mypy pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis ruff import-linter jsonschema types-PyYAML types-jsonschema

COMPILE = $(VENV)/lock/bin/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(VENV)/.project ## install what is missing, here and in .venv

$(VENV)/.packages: Makefile .ci/packages
	@.ci/packages $(PACKAGES)
	@mkdir -p $(@D) && touch $@

$(VENV)/.requirements: requirements-dev.lock $(VENV)/.packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(VENV)/.project: pyproject.toml $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup ## a session survives the death of its gateway
	@$(BIN)/ike-sa-sync lab demo

record: setup ## the demo's picture, docs/demo.svg, from a real run
	@$(BIN)/python docs/record.py docs/demo.svg $(BIN)/ike-sa-sync lab demo

bench: setup ## short benchmarks, into docs/performance.md
	@$(BIN)/ike-sa-sync bench report --short

test: lint typecheck ## everything: lint, types, all tests; names the slowest
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-releases: $(VENV)/.releases ## strongSwan 5.9.8, 6.0.1 and 6.1.0 with each other, the bank on Valkey 8, all from Debian
	@$(BIN)/python -m pytest -m releases $(PYTEST_ARGS)

$(VENV)/.releases: $(VENV)/.project
	@.ci/packages mmdebstrap
	@$(BIN)/python -m bridge.lab.releases
	@$(BIN)/python -m bridge.lab.valkey
	@touch $@

deb: $(VENV)/.deb-packages ## a Debian package with everything in it, into dist/
	@rm -rf build/deb && mkdir -p build/deb/source dist
	@git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --ignore-failed-read -cf - | \
		tar -xf - -C build/deb/source
	@cd build/deb/source && dpkg-buildpackage --build=binary --no-sign >../log 2>&1 || { tail -n 30 ../log; exit 1; }
	@mv build/deb/*.deb dist/ && rm -rf build/deb && ls dist/*.deb

$(VENV)/.deb-packages: debian/control $(VENV)/.packages
	@.ci/packages dpkg-dev debhelper
	@touch $@

test-vm: $(VENV)/.project deb ## provisioning, package and units on a Debian machine (qemu), and the lab on its kernel
	@.ci/packages qemu-system-x86 mmdebstrap e2fsprogs
	@PYTEST_ARGS='$(PYTEST_ARGS)' vagrant/vm/run .vm dist/ike-sa-sync_*.deb $(BIN)/python

chaos: setup ## random disturbances of three gateways, six clients and a Redis pair: CHAOS_ARGS='--rounds 200 --seed 1'
	@PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS_ARGS)

lint: setup ## ruff, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

typecheck: setup ## mypy --strict
	@$(BIN)/mypy

man: setup ## manual pages and shell completions, into build/man
	@$(BIN)/python man/build.py build/man

reference: setup ## docs/configuration.md, from bridge/config.py
	@$(BIN)/python man/build.py --markdown

lock: $(VENV)/.packages ## bring requirements.lock and requirements-dev.lock up to date
	@$(PYTHON) -m venv $(VENV)/lock && $(VENV)/lock/bin/python -m pip install --quiet pip-tools
	@printf '%s\n' $(DEVELOPMENT) >$(VENV)/development.in
	@CUSTOM_COMPILE_COMMAND='make lock' $(COMPILE) --upgrade \
		--output-file requirements-dev.lock pyproject.toml $(VENV)/development.in
	@CUSTOM_COMPILE_COMMAND='make lock' $(COMPILE) --constraint requirements-dev.lock \
		--output-file requirements.lock pyproject.toml
	@rm -rf $(VENV)/lock $(VENV)/development.in

clean: ## remove what the commands above made, but for Debian packages
	@if [ -x $(BIN)/ike-sa-sync ]; then $(BIN)/ike-sa-sync lab clean; fi
	@rm -rf $(VENV) .import_linter_cache .vm /var/cache/ike-sa-sync build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
