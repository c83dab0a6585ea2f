# Everything a person or a machine does with this tree. `make help` lists it.
#
# Works as root, through sudo and from a shell without HOME; installs missing
# Debian packages and, if no Go is found, the Go toolchain that go.mod names.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-builtin-rules --no-print-directory

# sudo resets PATH and some callers have no HOME; Go needs both.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin
ifeq ($(HOME),)
export HOME := $(shell getent passwd $$(id -u) | cut -d: -f6)
endif

# --- Go -----------------------------------------------------------------------
# Any Go from 1.21 fetches the version of go.mod by itself (GOTOOLCHAIN=auto).
# Without one, the same module that it would fetch is unpacked into build/go.
GO_VERSION := $(shell sed -n 's/^go //p' go.mod)
GO_ARCH := $(if $(filter aarch64,$(shell uname -m)),arm64,amd64)
GO_SHA256_amd64 := 6347bdd1fdc7c659d955d8034cd82ec23a5b776bf48b9dfc3a75088d2dacfe0e
GO_SHA256_arm64 := a2313f15b100a99fd202aaf11adce2cbeec3c684317eef414fc97054dc644d11
GO_OWN := $(CURDIR)/build/go/$(GO_VERSION)
GO_FOUND := $(shell export PATH='$(PATH)'; v=$$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) && \
	printf '%s\n' go1.21 "$$v" | sort -CV && command -v go)
GO := $(or $(GO_FOUND),$(GO_OWN)/bin/go)
ifeq ($(GO_FOUND),)
export PATH := $(GO_OWN)/bin:$(PATH)
endif

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The commit goes into the binaries where git can tell it.
VCS := $(if $(shell git rev-parse HEAD 2>/dev/null),-buildvcs=true,-buildvcs=false)
GOBUILD := $(GO) build -trimpath $(VCS) -ldflags '-s -w'

# --- Debian packages ----------------------------------------------------------
BUILD_PACKAGES := gcc libc6-dev libseccomp-dev pkg-config ca-certificates
TEST_PACKAGES := busybox-static nftables iproute2 containernetworking-plugins
VM_PACKAGES := debootstrap qemu-system-x86 e2fsprogs
BENCH_PACKAGES := containerd runc crun iptables

# $(call packages,names,command): installs those of the names that are missing;
# runs the command if that fails.
define packages
	@missing=$$(for p in $(1); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || printf '%s ' $$p; done); \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { echo "please install what your system calls these Debian packages: $$missing" >&2; exit 0; }; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	echo "installing $$missing"; \
	install="$$sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends $$missing"; \
	$$install >/dev/null 2>&1 || { $$sudo apt-get -o DPkg::Lock::Timeout=600 update -qq && $$install >/dev/null; } || \
	{ echo "cannot install $$missing" >&2; $(or $(2),exit 1); }
endef

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

# --- build --------------------------------------------------------------------
.PHONY: build
build: deps ## build bin/nodeagent, bin/nodeagent-shim, bin/nodeagent-cni
	@mkdir -p bin
	CGO_ENABLED=0 $(GOBUILD) -o bin/ ./cmd/nodeagent ./cmd/nodeagent-cni
	CGO_ENABLED=1 $(GO) build -trimpath $(VCS) -tags 'seccomp osusergo netgo' \
		-ldflags '-s -w -linkmode external -extldflags "-static"' -o bin/ ./cmd/nodeagent-shim
	@chown -R --reference=. bin 2>/dev/null || true

# The static program that test images and the demo's image contain.
.PHONY: testtool
testtool: deps
	@CGO_ENABLED=0 $(GOBUILD) -o build/testtool ./test/images/testtool

# A module of its own, because Kubernetes needs replace lines. Its build and its
# tests have the same flags, so that nothing is compiled twice; no commit goes
# into the binary, so that it is linked only when its code changes. Vet would
# read all of Kubernetes for eight minutes: make lint does.
CONTROLPLANE := cd controlplane && CGO_ENABLED=0 GOFLAGS='-trimpath -buildvcs=false' $(GO)

.PHONY: controlplane
controlplane: deps ## build bin/controlplane, a Kubernetes control plane for tests
	@mkdir -p bin
	@[ -e bin/controlplane ] || echo "building Kubernetes' control plane: about a quarter of an hour on two cores, once"
	$(CONTROLPLANE) build -ldflags '-s -w' -o ../bin/ .
	@chown --reference=. bin bin/controlplane 2>/dev/null || true

.PHONY: deps
deps: $(if $(GO_FOUND),,$(GO_OWN)/bin/go)
	$(call packages,$(BUILD_PACKAGES))

.PHONY: test-deps
test-deps: deps
	$(call packages,$(TEST_PACKAGES),echo "tests that need them are skipped" >&2)

$(GO_OWN)/bin/go:
	$(call packages,ca-certificates curl unzip)
	@echo "no Go from 1.21 on found: fetching Go $(GO_VERSION) into build/go"
	@mkdir -p build/go
	@curl -fsSL --retry 3 -o build/go/go.zip \
		https://proxy.golang.org/golang.org/toolchain/@v/v0.0.1-go$(GO_VERSION).linux-$(GO_ARCH).zip
	@echo "$(GO_SHA256_$(GO_ARCH))  build/go/go.zip" | sha256sum --check --quiet
	@rm -rf build/go/unpacked && unzip -q build/go/go.zip -d build/go/unpacked
	@chmod -R +x build/go/unpacked/*/*/bin build/go/unpacked/*/*/pkg/tool
	@rm -rf $(GO_OWN) && mv build/go/unpacked/golang.org/toolchain@* $(GO_OWN)
	@rm -rf build/go/unpacked build/go/go.zip

# --- run, test, lint ----------------------------------------------------------
.PHONY: run
run: build testtool test-deps ## show it all: daemon, registry, pod; ARGS=--once ends by itself
	@$(GOBUILD) -o build/demo ./test/demo
	@./build/demo $(ARGS)

# Packages share one kernel: two at a time keeps timings honest on two cores.
# The smoke suite in the virtual machine has what is left of 40 minutes, 7 at
# most: where everything had to be compiled first that may be too little.
BEGIN := $(shell date +%s)
.PHONY: test
test: build testtool controlplane test-deps ## run all tests (as root; ARGS are passed to go test)
	@[ "$$(id -u)" = 0 ] || { echo "the tests make namespaces, mounts and cgroups: run 'sudo make test'" >&2; exit 1; }
	@start=$$SECONDS; failed=; \
	$(GO) test -tags seccomp -p 2 -timeout 25m $(ARGS) ./... || failed=1; \
	($(CONTROLPLANE) test -vet=off $(ARGS) ./...) || failed=1; \
	left=$$(($(BEGIN) + 2400 - $$(date +%s))); \
	$(MAKE) ARGS= WITHIN=$$((left < 1 ? 1 : left < 420 ? left : 420))s test-vm-smoke || failed=1; \
	if [ -z "$$failed" ]; then \
		echo "all tests passed in $$((SECONDS-start)) s"; \
	else \
		echo "TESTS FAILED after $$((SECONDS-start)) s: look for FAIL above" >&2; exit 1; \
	fi

.PHONY: soak
soak: build test-deps ## kill daemon and shim at random for a long time (SOAK=30m)
	$(GO) test -count=1 -timeout 24h -v -run 'Random|Often' ./test/crash -soak $(or $(SOAK),30m) $(ARGS)

# Debian 12 in qemu: systemd, cgroup v2, kernel 6.1. The first run makes the
# root file system, which is kept in build/vm.
.PHONY: test-vm
test-vm: deb test-deps ## test the package in a virtual machine (as root; ARGS=-suites=...)
	$(call packages,$(VM_PACKAGES))
	@$(GO) build -o build/vm/vm ./test/vm
	@build/vm/vm -package '$(DEB)' $(ARGS)

# The shortest walk through the machine, the last part of `make test`: bounded,
# and skipped with a message where there is no qemu, no mirror or no time.
.PHONY: test-vm-smoke
test-vm-smoke: deb test-deps ## the smoke suite of test-vm, if this host can do it within WITHIN (7m)
	$(call packages,$(VM_PACKAGES),echo "without them there is no virtual machine" >&2)
	@$(GO) build -o build/vm/vm ./test/vm
	@build/vm/vm -package '$(DEB)' -suites smoke -within $(or $(WITHIN),7m) $(ARGS)

.PHONY: critest
critest: build test-deps ## run the CRI validation suite CRITEST=file (as root; ARGS=-ginkgo.focus=...)
	@$(GO) run ./test/critest -critest $(or $(CRITEST),critest) -- $(ARGS)

.PHONY: lint
lint: deps ## go vet, gofmt, staticcheck, house rules
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	[ -z "$$unformatted" ] || { echo "gofmt these: $$unformatted" >&2; exit 1; }
	$(GO) vet -tags seccomp ./...
	$(GO) run $(STATICCHECK) -tags seccomp ./...
	$(CONTROLPLANE) vet ./...
	$(GO) test -count=1 ./test/house

.PHONY: generate
generate: deps ## make generated files anew
	$(GO) generate ./...

# --- measures -----------------------------------------------------------------
.PHONY: bench
bench: build controlplane test-deps ## run the Go benchmarks
	$(GO) test -tags seccomp -p 1 -run '^$$' -bench . -benchmem $(ARGS) ./...
	$(GO) run ./test/bench/policy

.PHONY: bench-policy
bench-policy: build test-deps ## measure what policy costs flows, beside none and nftables (as root)
	@$(GO) run ./test/bench/policy $(ARGS)

.PHONY: bench-compare
bench-compare: build test-deps ## measure this runtime beside Debian's containerd
	$(call packages,$(BENCH_PACKAGES))
	$(GO) run ./test/bench -nodeagent bin/nodeagent -out build/bench.json $(ARGS)

# --- install ------------------------------------------------------------------
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
# A tag, or the day and the commit, in a form that dpkg orders.
VERSION ?= $(shell git describe --tags --match 'v*' 2>/dev/null | sed 's/^v//; s/-/+/g' | grep . || \
	git log -1 --format=0.0.0+git%cd.%h --date=format:%Y%m%d%H%M 2>/dev/null || echo 0.0.0)
DEB := build/nodeagent_$(VERSION)_$(GO_ARCH).deb

.PHONY: install
install: $(if $(BUILT),,build) ## install binaries, unit, configuration, completion, manual under PREFIX
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin bin/nodeagent bin/nodeagent-shim bin/nodeagent-cni
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/lib/systemd/system
	bin/nodeagent completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/nodeagent
	bin/nodeagent man $(DESTDIR)$(PREFIX)/share/man/man8
	install -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man8 packaging/man/*.8
	sed 's|@BINDIR@|$(PREFIX)/bin|' packaging/nodeagent.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/nodeagent.service
	install -D -m 644 packaging/sysctl.conf $(DESTDIR)$(PREFIX)/lib/sysctl.d/60-nodeagent.conf
	install -D -m 644 packaging/modules-load.conf $(DESTDIR)$(PREFIX)/lib/modules-load.d/nodeagent.conf
	@[ -e $(DESTDIR)$(SYSCONFDIR)/nodeagent/config.yaml ] || { \
		install -d $(DESTDIR)$(SYSCONFDIR)/nodeagent; \
		bin/nodeagent config default > $(DESTDIR)$(SYSCONFDIR)/nodeagent/config.yaml; }

.PHONY: deb
deb: build ## make the Debian package, build/nodeagent_VERSION_ARCH.deb
	@rm -rf build/deb
	@$(MAKE) install BUILT=1 DESTDIR=build/deb PREFIX=/usr >/dev/null
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || date +%s)} packaging/deb/build.sh build/deb '$(VERSION)' '$(DEB)'

.PHONY: clean
clean: ## remove what was built
	rm -rf bin build
