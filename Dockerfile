# syntax=docker/dockerfile:1
# One image for serving and, with the extra `train`, for training. With CUDA, of which the driver alone comes from the host:
#   docker build -t focusllava:cuda .
#   docker build -t focusllava:cuda-train --build-arg EXTRA=train .
# Without: name PyTorch's index of CPU builds, from which pip takes the same version.
#   docker build -t focusllava:cpu --build-arg TORCH_INDEX=ADDRESS --build-arg MARCH=x86-64-v3 .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG EXTRA=serve
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
RUN python -m venv /opt/focusllava
ENV PATH=/opt/focusllava/bin:$PATH
WORKDIR /app
# Without its source the package is its dependencies and its commands: a layer that lasts until one of these files changes.
COPY pyproject.toml requirements.lock README.md LICENSE ./
RUN PIP_EXTRA_INDEX_URL="$TORCH_INDEX" pip install --constraint requirements.lock ".[$EXTRA]"

FROM ${PYTHON_IMAGE}
# Triton compiles its launchers, and services/compute the operators for the CPU, with a compiler; KubeRay's probes call wget.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends g++ wget && \
    rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 focusllava
COPY --from=build /opt/focusllava /opt/focusllava
WORKDIR /app
COPY . .
ENV PATH=/opt/focusllava/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 FOCUSLLAVA_CACHE=/var/cache/focusllava
# The processor for which the CPU's operators are compiled here, such as x86-64-v3; empty: each pod compiles its own, 20 s.
ARG MARCH=""
ENV FOCUSLLAVA_MARCH=$MARCH
RUN install -d -o focusllava -g focusllava "$FOCUSLLAVA_CACHE" && \
    if [ -n "$MARCH" ]; then python -m services.compute.native && chmod -R a+rX "$FOCUSLLAVA_CACHE"; fi
USER 1000
EXPOSE 8000 9000
HEALTHCHECK --start-period=10m CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
# One machine: docker run --gpus all --shm-size 2g -v /models:/models -p 8000:8000 IMAGE focusllava serve --host 0.0.0.0 MODEL
CMD ["focusllava", "serve", "--host", "0.0.0.0"]
