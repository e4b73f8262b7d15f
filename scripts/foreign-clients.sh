#!/usr/bin/env bash
# Puts the foreign clients of tests/foreign.rs (Python's HTTP, gRPC and WebSocket libraries) under target/foreign.
# `.ci/run` calls it; run it yourself to have those stories told instead of skipped. It installs nothing outside the repository.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=target/foreign
requirements=scripts/foreign-requirements.txt
stamp=$venv/.installed

if [ -x "$venv/bin/python" ] && cmp -s "$requirements" "$stamp"; then
  echo "foreign clients: up to date in $venv"
  exit 0
fi

# The distribution's own Python where there is one: a version manager's shim may point anywhere.
python=/usr/bin/python3
[ -x "$python" ] || python=$(command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "foreign clients: a Python 3 with venv is needed (Debian: apt-get install python3-venv)" >&2
  exit 1
fi

rm -rf "$venv"
mkdir -p target
"$python" -m venv "$venv"
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --retries 5 --only-binary :all: -r "$requirements"; then
  echo "foreign clients: pip could not install $requirements; the package index must be reachable (see pip's message above)" >&2
  exit 1
fi
cp "$requirements" "$stamp"
echo "foreign clients: installed in $venv"
