#!/bin/sh
# Runs infrar as a subject of the benchmark: run.sh WORK [sidecar], WORK being the benchmark's work directory.
# With `sidecar` only the one process that serves all listeners but base + 7 (for memory, start-up and handshakes).
#   BINARY       the binary to measure (default: this repository's release build)
#   WORKERS      data-plane threads per process (the benchmark sets it)
#   PROTOCOL     h2 (default) or h1: what the hops of e5 and g speak
#   TOKEN_CACHE  verified tokens kept on base + 3 (default 10000; 0: every token is verified)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$1
binary=${BINARY:-$here/../../target/release/infrar}
export INFRAR_WORKERS="${WORKERS:-1}"

# The files name certificates and tokens relative to themselves, so they are put beside the peers' configurations.
conf=$work/conf/${NAME:-infrar}
mkdir -p "$work/conf"
sed "s/protocol: h2/protocol: ${PROTOCOL:-h2}/; s/:20008/:${BASE:-2000}8/" "$here/project.yaml" > "$conf-project.yaml"
for file in sidecar caller; do
  sed "s/token_cache: 10000/token_cache: ${TOKEN_CACHE:-10000}/; s/project: project/project: ${NAME:-infrar}-project/; s/:2000\([0-9]\)/:${BASE:-2000}\1/; s/:20010/:${BASE:-2000}9/; s/:20020/:${BASE:-2000}0/" "$here/$file.yaml" > "$conf-$file.yaml"
done

[ "${2:-}" = sidecar ] && exec "$binary" proxy --config "$conf-sidecar.yaml"

"$binary" proxy --config "$conf-sidecar.yaml" & sidecar=$!
"$binary" proxy --config "$conf-caller.yaml" & caller=$!
trap 'kill "$sidecar" "$caller" 2>/dev/null || true' TERM INT
# The first wait ends with the signal, the second with the processes.
wait || true
wait || true
