# Two commands do everything on a fresh Debian 12 or 13, as root:
#   make demo    make test
# What they need is installed the first time and then left alone: Debian packages, and Python ones in .venv.

.DELETE_ON_ERROR:
.PHONY: help setup demo record dashboard bench test test-releases test-vm test-vagrant test-compiled test-dist test-ansible chaos dist deb debs lint typecheck man reference lock clean

# Debian's Python: the headers that NetfilterQueue is built with belong to it.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
CHAOS_ARGS ?=
DIST ?= dist
# The tests of a file share a lab, so a file is one worker's.
WORKERS ?= 2
# of `make test` on two cores; CONTRIBUTING.md has the same figure
TEST_MINUTES := 20

PACKAGES := \
	build-essential python3-dev python3-venv libnetfilter-queue-dev \
	charon-systemd strongswan-swanctl strongswan-pki strongswan-starter strongswan-charon \
	libcharon-extra-plugins libcharon-extauth-plugins libstrongswan-extra-plugins libstrongswan-standard-plugins \
	redis-server redis-tools freeradius freeradius-utils \
	bird2 frr keepalived \
	iproute2 iputils-ping iptables nftables procps kmod tshark \
	prometheus faketime mandoc zsh fish

# Debian 13 has none.
ifeq ($(shell . /etc/os-release && echo $$VERSION_CODENAME),bookworm)
PACKAGES += vagrant
endif

DEVELOPMENT := mypy pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis ruff import-linter jsonschema types-PyYAML types-jsonschema

BUILD = $(VENV)/build/bin/python -m build --no-isolation
# where test-compiled has its tree
COMPILED := $(VENV)/compiled

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

dashboard: setup ## the dashboard's picture, docs/dashboard.svg, with the data of a real failover
	@$(BIN)/python docs/dashboard.py docs/dashboard.svg

bench: setup ## short benchmarks, into docs/performance.md
	@$(BIN)/ike-sa-sync bench report --short

test: lint typecheck ## everything: lint, types, all tests; names the slowest
	@echo "All tests take about $(TEST_MINUTES) minutes on two cores; the last line has the time that they took here."
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-releases: $(VENV)/.releases test-compiled ## strongSwan 5.9.8, 6.0.1 and 6.1.0 with each other, the bank on Valkey 8, all from Debian
	@$(BIN)/python -m pytest -m 'releases and not (dist or vm)' $(PYTEST_ARGS)

# In a tree of its own, with the extensions of the wheel: a module whose extension lies beside it is not read.
test-compiled: $(VENV)/.project $(VENV)/.build ## all tests again, with the modules compiled that a packet passes
	@rm -rf $(COMPILED) && mkdir -p $(COMPILED)/tree $(COMPILED)/wheel
	@IKE_SA_SYNC_COMPILE=1 $(BUILD) --wheel --outdir $(COMPILED) >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@$(BIN)/python -m zipfile -e $(COMPILED)/*.whl $(COMPILED)/wheel
	@git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -cf - | tar -xf - -C $(COMPILED)/tree
	@cd $(COMPILED)/wheel && find . -name '*.so' -exec cp --parents -t ../tree {} +
	@cd $(COMPILED)/tree && IKE_SA_SYNC_CODE=compiled PYTHONPATH=$(CURDIR)/$(COMPILED)/tree $(CURDIR)/$(BIN)/python -m pytest \
		-n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

$(VENV)/.releases: $(VENV)/.project
	@.ci/packages mmdebstrap
	@$(BIN)/python -m bridge.lab.releases
	@$(BIN)/python -m bridge.lab.unpacked valkey frr
	@touch $@

dist: $(VENV)/.build ## what pip installs: the source and two wheels, one of them compiled, into dist/; the same octets each time
	@mkdir -p $(DIST)
	@export SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)}; \
		{ IKE_SA_SYNC_COMPILE= $(BUILD) --outdir $(DIST) && IKE_SA_SYNC_COMPILE=1 $(BUILD) --wheel --outdir $(DIST); } \
		>$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@ls $(DIST)/*.whl $(DIST)/*.tar.gz

# The build backends are pinned, as all that is installed here.
$(VENV)/.build: requirements-build.lock $(VENV)/.packages
	@$(PYTHON) -m venv --clear $(VENV)/build
	@$(VENV)/build/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-build.lock
	@touch $@

deb: $(VENV)/.deb-packages ## a Debian package with everything in it, for this release, into dist/
	@debian/build $(DIST)

debs: $(VENV)/.deb-packages ## the same for Debian 12 and 13
	@.ci/packages mmdebstrap && mkdir -p $(DIST)
	@for release in bookworm trixie; do debian/in-release $$release $(DIST) debian/build $(DIST) || exit 1; done

test-dist: $(VENV)/.project $(VENV)/.build $(VENV)/.deb-packages ## what dist, deb and debs make: installs on Debian 12 and 13, is the same each time
	@.ci/packages mmdebstrap
	@$(BIN)/python -m pytest -m dist tests/test_dist.py $(PYTEST_ARGS)

$(VENV)/.deb-packages: debian/control $(VENV)/.packages
	@.ci/packages dpkg-dev debhelper
	@touch $@

test-vm: $(VENV)/.project deb ## provisioning, package and units on a Debian machine (qemu), and the lab on its kernel
	@.ci/packages qemu-system-x86 mmdebstrap e2fsprogs
	@PYTEST_ARGS='$(PYTEST_ARGS)' vagrant/vm/run .vm "$$(ls -t dist/ike-sa-sync_*+deb$$(. /etc/os-release && echo $$VERSION_ID)_*.deb | head -n 1)" $(BIN)/python

test-vagrant: $(VENV)/.project deb ## the Vagrant lab: vagrant up on emulated machines, failovers, reboots
	@.ci/packages vagrant vagrant-libvirt libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 \
		qemu-utils mmdebstrap dnsmasq-base rsync openssh-client socat e2fsprogs tcpdump
	@vagrant/emulated/run .vm/vagrant $(BIN)/python -m pytest -m vagrant tests/test_vagrant_up.py --log-cli-level=INFO \
		--override-ini=log_cli_format='%(message)s' $(PYTEST_ARGS)

chaos: setup ## random disturbances of three gateways, six clients and a Redis pair: CHAOS_ARGS='--rounds 200 --seed 1'
	@PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS_ARGS)

test-ansible: $(VENV)/.ansible ## the Ansible role, on hosts of the lab
	@IKE_SA_SYNC_ANSIBLE=$(CURDIR)/$(VENV)/ansible/bin/ansible-playbook $(BIN)/python -m pytest -m ansible tests/test_ansible.py $(PYTEST_ARGS)

# Not in the project's own environment: Ansible has requirements of its own.
$(VENV)/.ansible: ansible/requirements.txt $(VENV)/.project
	@$(PYTHON) -m venv --clear $(VENV)/ansible
	@$(VENV)/ansible/bin/python -m pip install --quiet --disable-pip-version-check -r ansible/requirements.txt
	@touch $@

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
	@printf '%s\n' build cython hatchling mypy setuptools wheel >$(VENV)/build.in
	@CUSTOM_COMPILE_COMMAND='make lock' $(COMPILE) --upgrade --output-file requirements-build.lock $(VENV)/build.in
	@rm -rf $(VENV)/lock $(VENV)/development.in $(VENV)/build.in

clean: ## remove what the commands above made, but for Debian packages
	@if [ -x $(BIN)/ike-sa-sync ]; then $(BIN)/ike-sa-sync lab clean; fi
	@rm -rf $(VENV) .import_linter_cache .vm /var/cache/ike-sa-sync build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
