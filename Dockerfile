# The GeoPrelabel backend:   docker build -t geoprelabel .
#                            docker run --stop-timeout 110 -p 9090:9090 -v geoprelabel:/data geoprelabel
# For a GPU:                 docker build --build-arg TORCH=cu130 …, then run with --gpus all -e DEVICE=cuda
# MLflow's server, if wanted: docker build --target mlflow -t geoprelabel-mlflow .
#
# At run time it writes to /data and /tmp alone: --read-only --tmpfs /tmp works.

# Which build of torch: cpu, or a CUDA one such as cu130. The registry's own build for Linux brings several GB of CUDA.
ARG TORCH=cpu

FROM python:3.12.12-slim-bookworm AS build
ARG TORCH
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_INPUT=1

RUN python -m venv /opt/geoprelabel
ENV PATH=/opt/geoprelabel/bin:$PATH
WORKDIR /src

# Dependencies first, so that a change of our code leaves these layers alone.
COPY requirements.txt requirements-dev.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url "https://download.pytorch.org/whl/$TORCH" \
        --constraint requirements.txt "$(grep '^torch==' requirements.txt)"
# Without dependencies: the lock is complete, and pip knows no overrides for label-studio-ml's stale pins.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --requirement requirements.txt
# The extras postgres and s3, in the versions that are tested.
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -E '^(psycopg|psycopg-binary|boto3|botocore|jmespath|s3transfer)==' requirements-dev.txt >extras.txt \
    && pip install --no-deps --requirement extras.txt

COPY LICENSE README.md pyproject.toml requirements.in ./
COPY backend backend
COPY configs configs
COPY demo demo
COPY model_weights model_weights
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && pip uninstall --yes pip


# MLflow's server with a database driver and an object store's client, for compose's profile "mlflow".
FROM python:3.12.12-slim-bookworm AS mlflow
WORKDIR /src
COPY requirements.txt requirements-dev.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -E '^(psycopg|psycopg-binary|boto3)==' requirements-dev.txt >mlflow.txt \
    && sed -n 's/^mlflow-skinny==/mlflow==/p' requirements.txt >>mlflow.txt \
    && pip install --requirement mlflow.txt
USER 10001:10001
WORKDIR /tmp
EXPOSE 5000
ENTRYPOINT ["mlflow"]
CMD ["server", "--host", "0.0.0.0"]


FROM python:3.12.12-slim-bookworm AS geoprelabel

LABEL org.opencontainers.image.title="GeoPrelabel" \
      org.opencontainers.image.description="A Label Studio ML backend for aerial, satellite and drone imagery" \
      org.opencontainers.image.licenses="Apache-2.0"

# The one system library that the raster and vector wheels expect to find. Nothing is installed later, and nobody becomes
# another user: pip, what could bring it back, and the setuid bits go.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 \
    && rm -rf /var/lib/apt/lists/* \
    && pip uninstall --yes --root-user-action=ignore pip \
    && rm -r /usr/local/lib/python3*/ensurepip \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 10001 geoprelabel \
    && useradd --uid 10001 --gid geoprelabel --no-create-home --home-dir /data geoprelabel \
    && install --directory --owner geoprelabel --group geoprelabel /data

COPY --from=build /opt/geoprelabel /opt/geoprelabel

# HOME holds the caches of libraries. A GPU's driver comes from the host; the two NVIDIA names ask for it.
ENV PATH=/opt/geoprelabel/bin:$PATH \
    HOME=/data \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    GEOPRELABEL_DATA_DIR=/data \
    PORT=9090

# By number, so that a cluster can see that it is not root.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 9090

HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=3)"]

ENTRYPOINT ["geoprelabel"]
CMD ["serve"]
