#!/usr/bin/env bash
# Brings what tests/foreign.rs drives: the clients of other languages (Python's HTTP, gRPC and WebSocket libraries, and schemathesis) into
# target/foreign, and the servers and tools beside them (nginx, promtool, h2load, curl, openssl) as Debian packages; and
# PostgreSQL, which tests/store.rs starts.
# `.ci/run` calls it; run it yourself to have those stories told instead of skipped. As root it installs packages that
# are missing; as anybody else it says which those are, brings what needs no root, and ends with 1.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'foreign clients: %s\n' "$1" >&2; }
fail() { say "$1"; exit 1; }

# ---- Debian packages ----

missing=()
PATH=$PATH:/usr/sbin:/sbin
need() { command -v "$1" >/dev/null 2>&1 || missing+=("${@:2}"); }
need curl curl ca-certificates
need openssl openssl
need nginx nginx-light
need promtool prometheus
need h2load nghttp2-client
# Debian keeps the server out of PATH, one folder for each version.
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
/usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3 python3-venv)

# Packages that bring a daemon must not start it: the tests run their own, on ports of their own.
policy=/usr/sbin/policy-rc.d
guard_services() {
  [ -e "$policy" ] && return
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 0755 "$policy"
  trap 'rm -f "$policy"' EXIT
}

install_packages() {
  guard_services
  say "installing ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "apt-get could not install: ${missing[*]}"
  fi
  rm -f "$log"
  missing=()
}

if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  install_packages
fi

# ---- Python clients ----

python_clients() {
  local venv=target/foreign requirements=scripts/foreign-requirements.txt python
  local stamp=$venv/.installed
  if [ -x "$venv/bin/python" ] && cmp -s "$requirements" "$stamp"; then
    say "the Python ones are up to date in $venv"
    return
  fi
  # The distribution's own Python where there is one: a version manager's shim may point anywhere.
  python=/usr/bin/python3
  [ -x "$python" ] || python=$(command -v python3 || true)
  if [ -z "$python" ] || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    fail "a Python 3 with venv is needed (Debian: apt-get install python3-venv)"
  fi
  rm -rf "$venv"
  mkdir -p target
  "$python" -m venv "$venv"
  if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --retries 5 --only-binary :all: -r "$requirements"; then
    fail "pip could not install $requirements; the package index must be reachable (see pip's message above)"
  fi
  cp "$requirements" "$stamp"
  say "the Python ones are installed in $venv"
}

python_clients

if [ "${#missing[@]}" -gt 0 ]; then
  fail "these Debian packages are missing: ${missing[*]} (as root this script installs them; without them their stories are skipped)"
fi
