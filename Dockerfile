# Images of sidstream, all from one lock file:
#   runtime   agents, serving, gateway and every command that needs no torch
#   trainer   the same with the training libraries
#   mlflow    the model registry's server, nothing else
#
#   docker build --target runtime --tag sidstream:0.1.0 .

FROM python:3.12-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
# State and caches (bundles, the trainer's log) live under one folder that the user owns, so that a fresh named
# volume mounted there is writable.
RUN groupadd --gid 10001 sidstream \
    && useradd --uid 10001 --gid sidstream --home-dir /var/lib/sidstream --create-home --shell /usr/sbin/nologin sidstream
WORKDIR /var/lib/sidstream

# The lock, cut into one part for each image.
FROM base AS locks
WORKDIR /build
COPY pyproject.toml requirements.lock ./
COPY ops/lock_subset.py ops/
RUN mkdir /locks \
    && python ops/lock_subset.py > /locks/runtime.txt \
    && python ops/lock_subset.py --extra train > /locks/trainer.txt \
    && python ops/lock_subset.py --only mlflow > /locks/mlflow.txt

# The product's own wheel: pure Python, so one build serves every image.
FROM base AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY streams streams
COPY registry registry
COPY agents agents
COPY trainer trainer
COPY serving serving
COPY sidstream sidstream
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS mlflow
COPY --from=locks /locks/mlflow.txt /tmp/requirements.txt
RUN pip install --require-hashes --requirement /tmp/requirements.txt && rm /tmp/requirements.txt
COPY --chmod=0755 ops/healthy.py /opt/sidstream/healthy.py
RUN mkdir /var/lib/mlflow && chown sidstream:sidstream /var/lib/mlflow
USER sidstream
WORKDIR /var/lib/mlflow
ENV HEALTH_URL=http://127.0.0.1:5000/health
EXPOSE 5000
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s --retries=4 CMD ["python", "/opt/sidstream/healthy.py"]
# --allowed-hosts: MLflow refuses names that it does not know; `mlflow` is the name inside the compose network.
ENTRYPOINT ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "2", \
    "--backend-store-uri", "sqlite:////var/lib/mlflow/mlflow.db", \
    "--serve-artifacts", "--artifacts-destination", "/var/lib/mlflow/artifacts", \
    "--allowed-hosts", "mlflow,mlflow:5000,localhost,localhost:*,127.0.0.1,127.0.0.1:*"]

FROM base AS trainer
COPY --from=locks /locks/trainer.txt /tmp/requirements.txt
RUN pip install --require-hashes --requirement /tmp/requirements.txt && rm /tmp/requirements.txt
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-deps --no-index /tmp/wheels/*.whl && rm -r /tmp/wheels
USER sidstream
ENTRYPOINT ["sidstream"]
CMD ["trainer"]
# It answers nobody: what it does is in its log and in the registry.
HEALTHCHECK NONE

FROM base AS runtime
COPY --from=locks /locks/runtime.txt /tmp/requirements.txt
RUN pip install --require-hashes --requirement /tmp/requirements.txt && rm /tmp/requirements.txt
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-deps --no-index /tmp/wheels/*.whl && rm -r /tmp/wheels
COPY --chmod=0755 ops/healthy.py /opt/sidstream/healthy.py
USER sidstream
ENTRYPOINT ["sidstream"]
CMD ["--help"]
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s --retries=4 CMD ["python", "/opt/sidstream/healthy.py"]
