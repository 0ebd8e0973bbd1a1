"""MLflow's client for the registry: silent, errors that name the remedy, None for what is absent."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from registry.settings import RegistrySettings
from streams.errors import SidstreamError

# MLflow takes no more of them in one request.
METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100


class Tracking:
    """One MLflow server. Methods other than `operation` raise MLflow's errors: call them inside of it."""

    def __init__(self, settings: RegistrySettings) -> None:
        """Raise SidstreamError where no address is set."""
        if not settings.tracking_uri:
            raise SidstreamError(
                "no MLflow address: start the local stack with `sidstream up`, "
                "or set SIDSTREAM_REGISTRY__TRACKING_URI"
            )
        self._settings = settings
        self.uri = settings.tracking_uri

    @cached_property
    def client(self) -> Any:
        """MLflow's own client."""
        _quieten(self._settings)
        # The import takes four seconds, so that it waits for the first request.
        from mlflow.tracking import MlflowClient

        # After the import, which sets these loggers to INFO.
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        return MlflowClient(self.uri, self.uri)

    @contextlib.contextmanager
    def operation(self, what: str) -> Iterator[Any]:
        """Give the client, and turn its errors into a SidstreamError that MLflow could not do `what`."""
        client = self.client
        from mlflow.exceptions import MlflowException

        try:
            yield client
        except (MlflowException, OSError) as error:
            first_line = str(error).strip().splitlines()[0][:200]
            raise SidstreamError(
                f"MLflow at {self.uri} could not {what}: {first_line}; "
                "see `sidstream doctor`, or correct SIDSTREAM_REGISTRY__TRACKING_URI"
            ) from error

    def new_run(self, experiment_name: str, name: str) -> str:
        """The id of a new run; an absent experiment is created first."""
        client = self.client
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(experiment_name)
        if experiment is None:
            try:
                id = client.create_experiment(experiment_name)
            except MlflowException:
                # Another process created it in the meantime; any other cause fails here.
                id = client.get_experiment_by_name(experiment_name).experiment_id
        else:
            id = experiment.experiment_id
        return str(client.create_run(id, run_name=name).info.run_id)

    def log(self, run: str, metrics: Mapping[str, float], params: Mapping[str, Any]) -> None:
        """Log metrics and parameters of a run, in as few requests as MLflow takes."""
        client = self.client
        from mlflow.entities import Metric, Param

        now = time.time_ns() // 1_000_000
        numbers = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
        texts = [Param(name, str(value)) for name, value in params.items()]
        for low in range(0, len(numbers), METRICS_PER_REQUEST):
            client.log_batch(run, metrics=numbers[low : low + METRICS_PER_REQUEST])
        for low in range(0, len(texts), _PARAMS_PER_REQUEST):
            client.log_batch(run, params=texts[low : low + _PARAMS_PER_REQUEST])

    def add_version(self, model: str, run: str, path: str, tags: dict[str, str]) -> str:
        """Create a version of a model from the artifact at `path` of a run, and return its number.

        An absent model is created first.
        """
        client = self.client
        from mlflow.exceptions import MlflowException

        if self.model(model) is None:
            try:
                client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        created = client.create_model_version(model, f"runs:/{run}/{path}", run_id=run, tags=tags)
        return str(created.version)

    def model(self, name: str) -> Any:
        """The registered model, or None."""
        return _or_none(self.client.get_registered_model, name)

    def version(self, model: str, number: str) -> Any:
        """The model version with this number, or None."""
        return _or_none(self.client.get_model_version, model, number)

    def by_alias(self, model: str, alias: str) -> Any:
        """The model version that an alias names, or None."""
        return _or_none(self.client.get_model_version_by_alias, model, alias)

    def versions(self, model: str) -> list[Any]:
        """Every version of a model, in MLflow's order."""
        rows: list[Any] = []
        token = None
        while True:
            page = self.client.search_model_versions(f"name = '{model}'", max_results=1000, page_token=token)
            rows.extend(page)
            token = page.token
            if not token:
                return rows

    def version_with(self, model: str, key: str, value: str) -> str | None:
        """The number of a model's version with this tag, or None."""
        rows = self.client.search_model_versions(f"name = '{model}' and tags.{key} = '{value}'")
        return str(rows[0].version) if rows else None


def _or_none(request: Any, *args: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return request(*args)
    except MlflowException as error:
        # MLflow 3: an alias that is not set is INVALID_PARAMETER_VALUE, an absent model the other code.
        missing = error.error_code == "RESOURCE_DOES_NOT_EXIST" or "alias" in str(error).lower()
        if missing and error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            return None
        raise


def _quieten(settings: RegistrySettings) -> None:
    """Turn off MLflow's links, progress bars, hints and usage reports, unless the environment sets them."""
    for name, value in {
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(settings.timeout_s),
        # Seven retries with growing pauses would hide for two minutes that a server is gone: 1 + 2 + 4 s.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }.items():
        os.environ.setdefault(name, value)
