# syntax=docker/dockerfile:1

# The GeoPrelabel backend: docker build -t geoprelabel . && docker run -p 9090:9090 -v geoprelabel:/data geoprelabel
# For a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130, and run with --gpus all -e DEVICE=cuda.

FROM python:3.12.12-slim-bookworm AS build

# Where pip may look for torch beside the registry, whose own build for Linux brings several GB of CUDA packages.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_INPUT=1

RUN python -m venv /opt/geoprelabel
ENV PATH=/opt/geoprelabel/bin:$PATH
WORKDIR /src

# Dependencies first, so that a change of our code leaves these layers alone.
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint requirements.txt "$(grep '^torch==' requirements.txt)"
# Without dependencies: the lock is complete, and pip knows no overrides for label-studio-ml's stale pins.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --requirement requirements.txt

COPY LICENSE README.md pyproject.toml requirements.in ./
COPY backend backend
COPY configs configs
COPY demo demo
COPY model_weights model_weights
RUN pip install --no-cache-dir --no-deps --no-build-isolation .


FROM python:3.12.12-slim-bookworm

LABEL org.opencontainers.image.title="GeoPrelabel" \
      org.opencontainers.image.description="A Label Studio ML backend for aerial, satellite and drone imagery" \
      org.opencontainers.image.licenses="Apache-2.0"

# The one system library that the raster and vector wheels expect to find.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 \
    && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 10001 geoprelabel \
    && useradd --uid 10001 --gid geoprelabel --no-create-home --home-dir /data geoprelabel \
    && install --directory --owner geoprelabel --group geoprelabel /data

COPY --from=build /opt/geoprelabel /opt/geoprelabel

ENV PATH=/opt/geoprelabel/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GEOPRELABEL_DATA_DIR=/data \
    PORT=9090

# By number, so that a cluster can see that it is not root.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 9090

HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=3)"]

ENTRYPOINT ["geoprelabel"]
CMD ["serve"]
