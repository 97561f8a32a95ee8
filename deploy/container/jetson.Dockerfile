# vpdeploy on a Jetson (L4T, arm64), with the TensorRT that JetPack brings. On the device, from the root of the sources:
#
#   docker build -f deploy/container/jetson.Dockerfile -t vpdeploy:jetson .
#   docker run --runtime nvidia --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     -p 127.0.0.1:8000:8000 -e VPDEPLOY_TOKEN -v "$PWD/zoo:/bundle" vpdeploy:jetson
#
# Choose the image of the JetPack that is on the device, and cuda-bindings of the same CUDA.
# Engines are built on the device: docker run ... vpdeploy:jetson build /bundle --runtime tensorrt
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

FROM ${BASE} AS build
ARG CUDA_BINDINGS="cuda-bindings>=12.6,<13"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vpdeploy vpdeploy
COPY train train
COPY export export
# The system's packages are seen: TensorRT's Python module is one of them.
RUN python3 -m venv --system-site-packages /opt/vpdeploy \
    && /opt/vpdeploy/bin/pip install '.[serve,grpc]' "${CUDA_BINDINGS}" \
    && /opt/vpdeploy/bin/vpdeploy serve --help > /dev/null

FROM ${BASE}
LABEL org.opencontainers.image.title="vpdeploy" org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin --groups video vpdeploy
COPY --from=build /opt/vpdeploy /opt/vpdeploy
ENV PATH=/opt/vpdeploy/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all
USER 10001:10001
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["vpdeploy"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "8000", "--grpc-port", "8001", "--log-format", "json"]
