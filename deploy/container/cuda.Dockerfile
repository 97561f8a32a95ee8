# vpdeploy on an NVIDIA GPU, x86-64. From the root of the sources:
#
#   docker build -f deploy/container/cuda.Dockerfile -t vpdeploy:cuda .
#   docker run --gpus all --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     -p 127.0.0.1:8000:8000 -e VPDEPLOY_TOKEN -v "$PWD/zoo:/bundle" vpdeploy:cuda
#
# The extra `rtx` is for GeForce and RTX; for data-centre GPUs: --build-arg EXTRAS=serve,grpc,tensorrt
ARG BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

FROM ${BASE} AS build
ARG EXTRAS=serve,grpc,rtx
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vpdeploy vpdeploy
COPY train train
COPY export export
RUN python3 -m venv /opt/vpdeploy \
    && /opt/vpdeploy/bin/pip install --extra-index-url https://pypi.nvidia.com ".[${EXTRAS}]" \
    && /opt/vpdeploy/bin/vpdeploy serve --help > /dev/null

FROM ${BASE}
LABEL org.opencontainers.image.title="vpdeploy" org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin vpdeploy
COPY --from=build /opt/vpdeploy /opt/vpdeploy
ENV PATH=/opt/vpdeploy/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["vpdeploy"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "8000", "--grpc-port", "8001", "--log-format", "json"]
