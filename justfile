# The recipes of a working day. `just --list` names them; each is one line of cargo that works without just too.

# What CI asks of a change, without installing anything.
check: fmt-check lint doc deny test

# Rewrite the sources as rustfmt wants them.
fmt:
    cargo fmt

fmt-check:
    cargo fmt --check

lint:
    cargo clippy --all-targets -- -D warnings

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

deny:
    cargo deny check --hide-inclusion-graph bans licenses sources

# All tests, or those whose name contains the given words.
test *words:
    cargo test {{words}}

# What tests/foreign.rs drives: the clients of other languages, into target/foreign, and servers and tools (as root).
foreign-clients:
    scripts/foreign-clients.sh

# Three simulated clouds with live traffic.
demo:
    cargo run --release -- demo

# The hot stages, measured by criterion.
bench:
    cargo bench

# One parser of foreign bytes under the fuzzer (nightly and cargo-fuzz): `just fuzz http1_request`.
fuzz target seconds="60":
    cargo +nightly fuzz run {{target}} -- -max_total_time={{seconds}}

image tag="infrar":
    docker build --tag {{tag}} .

# The whole of CI, as it runs on a bare machine.
ci:
    .ci/run
