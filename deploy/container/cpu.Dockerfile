# vpdeploy on a CPU, x86-64 or arm64. From the root of the sources:
#
#   docker build -f deploy/container/cpu.Dockerfile -t vpdeploy:cpu .
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     -p 127.0.0.1:8000:8000 -e VPDEPLOY_TOKEN -v "$PWD/zoo:/bundle" vpdeploy:cpu
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vpdeploy vpdeploy
COPY train train
COPY export export
# The wheel for CPUs alone, in place of the one with CUDA, which is ten times as large; the two must not be mixed.
RUN python -m venv /opt/vpdeploy \
    && /opt/vpdeploy/bin/pip install '.[serve,grpc]' \
    && /opt/vpdeploy/bin/pip uninstall -y onnxruntime-gpu \
    && /opt/vpdeploy/bin/pip install --force-reinstall --no-deps onnxruntime \
    && /opt/vpdeploy/bin/vpdeploy serve --help > /dev/null

FROM ${BASE}
LABEL org.opencontainers.image.title="vpdeploy" org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin vpdeploy
COPY --from=build /opt/vpdeploy /opt/vpdeploy
ENV PATH=/opt/vpdeploy/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
USER 10001:10001
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["vpdeploy"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "8000", "--grpc-port", "8001", "--log-format", "json"]
