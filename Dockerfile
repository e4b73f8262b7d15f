# syntax=docker/dockerfile:1
# The builder has a C compiler for aws-lc; the image that ships has neither shell nor package manager.
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
# How the allocator is compiled: without it an idle proxy is 3.5 MiB larger.
COPY .cargo ./.cargo
COPY src ./src
COPY benches ./benches
COPY config ./config
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --locked --release --bin infrar \
 && install -D target/release/infrar /out/usr/local/bin/infrar \
 && install -d -m 0700 /out/var/lib/infrar

FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="infrar" \
      org.opencontainers.image.description="A proxy beside each service, an edge gateway in each cloud, and the small control plane they share" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build --chown=65532:65532 /out/ /
# 65532 is distroless' `nonroot`, as a number so that Kubernetes' runAsNonRoot can see it.
USER 65532:65532
# The only path that is written to, and only where `state_dir` or `--data-dir` names it. The root may be read-only.
VOLUME /var/lib/infrar
EXPOSE 15000 15001 15006 7070
# No HEALTHCHECK: a proxy and a control plane run from this image, and what starts them knows which to ask, and where
# (`infrar health` for a proxy, /readyz for both; see deploy/sidecar/).
# The proxy answers SIGTERM by draining; give it at least `shutdown.deadline` (25 s) before SIGKILL.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/infrar"]
CMD ["proxy"]
