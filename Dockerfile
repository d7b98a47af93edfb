# The GPU image: locked Python packages on a CUDA base image. The wheels contain the CUDA libraries, so the
# small `base` variant is enough. Any Debian or Ubuntu base with Python >= 3.11 works: --build-arg BASE_IMAGE=...
#
#   docker build -t mochi .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD":/work mochi snakemake --cores all
ARG BASE_IMAGE=nvidia/cuda:13.0.0-base-ubuntu24.04

# ---------------------------------------------------------------- base of both stages
FROM ${BASE_IMAGE} AS system
# No pinned versions: Debian and Ubuntu delete old versions from their archives, so the build would soon fail.
# hadolint ignore=DL3008
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates git python3 tini && \
    rm -rf /var/lib/apt/lists/*

# ---------------------------------------------------------------- locked packages
FROM system AS environment
# hadolint ignore=DL3008
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv && \
    rm -rf /var/lib/apt/lists/*
# `none` leaves out torch and its CUDA libraries (most of the image), to test the rest in a minute.
ARG TORCH=locked
# The lock is complete, hence --no-deps.
RUN --mount=type=bind,source=requirements.lock,target=/tmp/requirements.lock \
    --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    python3 -m venv /opt/venv && \
    awk -v torch="${TORCH}" \
      '/^[^ ]/ { left_out = torch == "none" && /^(torch|torchvision|triton|nvidia-|cuda-)/ } !left_out' \
      /tmp/requirements.lock > /tmp/chosen.txt && \
    /opt/venv/bin/pip install --no-deps --require-hashes -r /tmp/chosen.txt && \
    rm /tmp/chosen.txt && \
    printf '#!/bin/sh\nexec python -m mochi "$@"\n' > /opt/venv/bin/mochi && \
    chmod 755 /opt/venv/bin/mochi

# ---------------------------------------------------------------- the image
FROM system
LABEL org.opencontainers.image.title="mochi" \
      org.opencontainers.image.description="Hard negative mixing for contrastive learning, from raw images to the paper's tables" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=environment /opt/venv /opt/venv
COPY --chmod=755 container/entrypoint.sh /usr/local/bin/mochi-entrypoint
# The source is where a clone is mounted: with `-v "$PWD":/work` the code of the clone runs, otherwise the
# code of the image.
COPY . /work
# Home and work folders that any uid can write to. git must trust a mounted clone of another uid.
RUN mkdir -m 1777 /home/mochi && chmod -R a+rwX /work && git config --system --add safe.directory '*'
# A uid given by `--user` has no entry in /etc/passwd, so the user name that Python looks up is set here.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/mochi \
    XDG_CACHE_HOME=/home/mochi/.cache \
    USER=mochi \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
USER 1000:1000
# On SIGINT Snakemake stops its jobs; on SIGTERM it waits for them until it is killed.
STOPSIGNAL SIGINT
ENTRYPOINT ["tini", "-g", "--", "mochi-entrypoint"]
CMD ["snakemake", "--cores", "all"]
