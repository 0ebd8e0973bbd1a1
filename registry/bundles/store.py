"""Bundles and codebooks in MLflow: artifacts with a version, aliases and tags; nothing is pickled.

A bundle is uploaded as plain files of a run, and a model version points at it. A downloaded bundle is checked
digest by digest and cached in a folder named by its content.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.bundles.bundle import Bundle, load_bundle
from registry.bundles.codebook import Codebook
from registry.bundles.tracking import METRICS_PER_REQUEST, Tracking
from registry.settings import RegistrySettings
from streams.errors import SidstreamError

PREVIOUS_CHAMPION = "previous-champion"
# Tag of a version: candidate -> shadow -> canary -> trial -> promoted, rejected, inconclusive; rolled-back.
STATE = "state"
CURRENT = "current"
_BUNDLE = "bundle"
_CODEBOOK = "codebook.safetensors"
_ENCODER = "encoder"
_CYCLE_SENTENCE = "sidstream.journal"
# MLflow cuts longer tags of a run (characters).
_MAX_TAG_LENGTH = 5000


@dataclass(frozen=True)
class Version:
    """One model version as the registry lists it; `created` in milliseconds."""

    version: str
    bundle: str
    kind: str
    created: int
    aliases: tuple[str, ...]
    tags: dict[str, str]
    metrics: dict[str, float]


class Registry:
    """The model registry of one recommender. Methods raise SidstreamError when MLflow does not answer."""

    def __init__(self, settings: RegistrySettings) -> None:
        self._mlflow = Tracking(settings)
        self.name = settings.name
        self.tracking_uri = self._mlflow.uri
        self.cache = settings.cache_folder
        self.codebooks = f"{settings.name}-codebook"

    # Codebooks

    def publish_codebook(
        self, codebook: Codebook, encoder: Path | None = None, metrics: Mapping[str, float] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """Store a codebook, make it the current one and return its id; a stored one only gets the alias.

        `encoder`: the folder of its sentence encoder, which agents need to give new items their SIDs.
        `metrics` and `params`: the figures of its fit, and what it was fitted with.
        """
        with tempfile.TemporaryDirectory() as folder, self._mlflow.operation("store the codebook") as client:
            version = self._mlflow.version_with(self.codebooks, "codebook", codebook.id)
            if version is None:
                codebook.save(Path(folder) / _CODEBOOK)
                run = self._mlflow.new_run(self.name, f"codebook-{codebook.id}")
                client.log_artifact(run, str(Path(folder) / _CODEBOOK))
                if encoder is not None:
                    client.log_artifacts(run, str(encoder), _ENCODER)
                self._mlflow.log(run, metrics or {}, params or {})
                tags = {"codebook": codebook.id, "embedder": codebook.embedder}
                version = self._mlflow.add_version(self.codebooks, run, _CODEBOOK, tags)
                client.set_terminated(run)
            client.set_registered_model_alias(self.codebooks, CURRENT, version)
        return codebook.id

    def codebook(self, id: str | None = None) -> Codebook:
        """The codebook with this id, or the current one. Raises SidstreamError where there is none."""
        if id is not None:
            cached = self._codebook_file(id)
            if cached.is_file():
                with contextlib.suppress(SidstreamError):
                    return Codebook.load(cached)
        with self._mlflow.operation("find the codebook") as client:
            if id is None:
                model_version = self._mlflow.by_alias(self.codebooks, CURRENT)
            else:
                number = self._mlflow.version_with(self.codebooks, "codebook", id)
                model_version = client.get_model_version(self.codebooks, number) if number else None
        if model_version is None:
            which = f"codebook {id}" if id else "codebook"
            raise SidstreamError(f"the registry has no {which}: make one with `sidstream codebook fit`")
        expected_id = model_version.tags["codebook"]
        cached = self._codebook_file(expected_id)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            with self._mlflow.operation(f"fetch codebook {expected_id}") as client:
                path = Path(client.download_artifacts(model_version.run_id, _CODEBOOK, folder))
            codebook = Codebook.load(path)
            if codebook.id != expected_id:
                raise SidstreamError(
                    f"the registry's file of codebook {expected_id} is codebook {codebook.id}; store it again"
                )
            path.replace(cached)
        return codebook

    def encoder(self, codebook: str) -> Path:
        """The folder of a codebook's sentence encoder, from the cache or downloaded.

        Its content is verified where it is opened. Raises SidstreamError where the registry has none.
        """
        with self._mlflow.operation(f"find codebook {codebook}") as client:
            number = self._mlflow.version_with(self.codebooks, "codebook", codebook)
            model_version = client.get_model_version(self.codebooks, number) if number else None
        if model_version is None:
            raise SidstreamError(
                f"the registry has no codebook {codebook}: make one with `sidstream codebook fit`"
            )
        final = self.cache / "encoders" / str(model_version.tags["embedder"])
        if not final.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as folder:
                with self._mlflow.operation(f"fetch the encoder of codebook {codebook}") as client:
                    path = Path(client.download_artifacts(model_version.run_id, _ENCODER, folder))
                # Another process may have been faster; the folder's name says that the content is the same.
                with contextlib.suppress(OSError):
                    path.rename(final)
        return final

    def current_codebook(self) -> str | None:
        """The id of the current codebook, or None."""
        with self._mlflow.operation("find the codebook"):
            model_version = self._mlflow.by_alias(self.codebooks, CURRENT)
        return None if model_version is None else str(model_version.tags["codebook"])

    # Bundles

    def register(
        self,
        bundle: Bundle,
        run_metrics: Mapping[str, float] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload a bundle as a new model version; a registered bundle is not uploaded again.

        Returns the version. The bundle is verified first.
        """
        manifest = load_bundle(bundle.path).manifest
        with self._mlflow.operation(f"store bundle {manifest.bundle}") as client:
            registered = self._mlflow.version_with(self.name, "bundle", manifest.bundle)
            if registered is not None:
                return registered
            run = self._mlflow.new_run(self.name, f"{manifest.kind}-{manifest.bundle}")
            self._mlflow.log(run, run_metrics or {}, params or {})
            client.log_artifacts(run, str(bundle.path), _BUNDLE)
            tags = {
                "bundle": manifest.bundle,
                "kind": manifest.kind,
                "codebook": manifest.codebook,
                "parent": manifest.lineage.parent or "",
                "reference": manifest.lineage.reference or "",
                STATE: "candidate",
            }
            # The version comes last: a crash before it leaves a run that nothing points at.
            version = self._mlflow.add_version(self.name, run, _BUNDLE, tags)
            client.set_terminated(run)
        return version

    def fetch(self, version_or_alias: str) -> Bundle:
        """The bundle of a version or alias, from the cache or downloaded; every digest is verified."""
        model_version = self._find(version_or_alias)
        bundle_id = model_version.tags["bundle"]
        cache = self.cache
        final = cache / bundle_id
        if final.is_dir():
            try:
                return _verified(final, bundle_id)
            except SidstreamError:
                # Damaged on this disk: the registry still has it.
                shutil.rmtree(final, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            with self._mlflow.operation(f"fetch bundle {bundle_id}") as client:
                path = Path(client.download_artifacts(model_version.run_id, _BUNDLE, folder))
            _verified(path, bundle_id)
            # Another process may have been faster; the folder's name says that the content is the same.
            with contextlib.suppress(OSError):
                path.rename(final)
        return _verified(final, bundle_id)

    def alignment_reference(self, bundle: Bundle) -> Bundle:
        """The fine-tuned bundle from which an aligned one was trained; other bundles are returned unchanged.

        An aligned bundle whose reference is no longer registered is returned unchanged, too.
        """
        reference = bundle.manifest.lineage.reference
        if reference is None:
            return bundle
        with self._mlflow.operation(f"find bundle {reference}"):
            version = self._mlflow.version_with(self.name, "bundle", reference)
        return bundle if version is None else self.fetch(version)

    def versions(self) -> list[Version]:
        """Every model version, newest first."""
        with self._mlflow.operation("list the models") as client:
            model = self._mlflow.model(self.name)
            if model is None:
                return []
            by_version: dict[str, list[str]] = {}
            for alias, version in model.aliases.items():
                by_version.setdefault(str(version), []).append(alias)
            return [
                Version(
                    version=str(row.version),
                    bundle=row.tags.get("bundle", ""), kind=row.tags.get("kind", ""),
                    created=row.creation_timestamp, tags=dict(row.tags),
                    aliases=tuple(sorted(by_version.get(str(row.version), []))),
                    metrics=dict(client.get_run(row.run_id).data.metrics),
                )
                for row in sorted(self._mlflow.versions(self.name), key=lambda row: -int(row.version))
            ]  # fmt: skip

    # Aliases, tags and records

    def alias(self, name: str) -> str | None:
        """The version that an alias names, or None."""
        with self._mlflow.operation(f"read alias {name}"):
            model_version = self._mlflow.by_alias(self.name, name)
        return None if model_version is None else str(model_version.version)

    def version(self, version_or_alias: str) -> str:
        """The version that a version or alias names. Raises SidstreamError where there is none."""
        return str(self._find(version_or_alias).version)

    def set_alias(self, name: str, version: str) -> None:
        """Point an alias at a version."""
        with self._mlflow.operation(f"set alias {name}") as client:
            client.set_registered_model_alias(self.name, name, version)

    def drop_alias(self, name: str) -> None:
        """Remove an alias. An alias that is not set is no error."""
        if self.alias(name) is not None:
            with self._mlflow.operation(f"remove alias {name}") as client:
                client.delete_registered_model_alias(self.name, name)

    def tag(self, version: str, key: str, value: str) -> None:
        """Set a tag of a version."""
        with self._mlflow.operation(f"tag version {version}") as client:
            client.set_model_version_tag(self.name, version, key, value)

    def tags(self, version: str) -> dict[str, str]:
        """The tags of a version."""
        return dict(self._find(version).tags)

    def store_decision(self, version: str, record: Mapping[str, Any]) -> None:
        """Store a decision record with the run of a version.

        It counts once the version's tag `decision` names it.
        """
        model_version = self._find(version)
        with self._mlflow.operation(f"store decision {record['decision']}") as client:
            client.log_dict(model_version.run_id, dict(record), f"decisions/{record['decision']}.json")

    def decision(self, version: str, id: str | None = None) -> dict[str, Any]:
        """A decision record stored with a version (default: the newest)."""
        model_version = self._find(version)
        decision_id = id or model_version.tags.get("decision")
        if not decision_id:
            raise SidstreamError(f"version {version} has no decision record: no trial of it was ended yet")
        with (
            tempfile.TemporaryDirectory() as folder,
            self._mlflow.operation(f"read decision {decision_id}") as client,
        ):
            path = client.download_artifacts(model_version.run_id, f"decisions/{decision_id}.json", folder)
            record: dict[str, Any] = json.loads(Path(path).read_text())
        return record

    def store_decision_plot(self, version: str, decision: str, png: bytes) -> None:
        """Store the plot of a decision (PNG) beside its record."""
        model_version = self._find(version)
        with (
            tempfile.TemporaryDirectory() as folder,
            self._mlflow.operation(f"store decision {decision}") as client,
        ):
            path = Path(folder) / f"{decision}.png"
            path.write_bytes(png)
            client.log_artifact(model_version.run_id, str(path), "decisions")

    def store_training(
        self, version: str, stage: str, curve: Sequence[Mapping[str, float]], png: bytes
    ) -> None:
        """Store the training curve of a stage: its points as metrics over `step`, and its plot (PNG)."""
        from mlflow.entities import Metric

        model_version, now = self._find(version), time.time_ns() // 1_000_000
        metrics = [
            Metric(f"{stage}/curve/{name}", value, now, int(point["step"]))
            for point in curve
            for name, value in point.items()
            if name != "step"
        ]
        with (
            tempfile.TemporaryDirectory() as folder,
            self._mlflow.operation(f"store how version {version} was trained") as client,
        ):
            for low in range(0, len(metrics), METRICS_PER_REQUEST):
                client.log_batch(model_version.run_id, metrics[low : low + METRICS_PER_REQUEST])
            path = Path(folder) / f"{stage}.png"
            path.write_bytes(png)
            client.log_artifact(model_version.run_id, str(path), "training")

    def decisions(self, version: str) -> list[dict[str, Any]]:
        """Every decision record that was stored with a version, oldest first."""
        model_version = self._find(version)
        with self._mlflow.operation(f"list the decisions of version {version}") as client:
            names = [
                Path(file.path).name for file in client.list_artifacts(model_version.run_id, "decisions")
            ]
        records = [self.decision(version, name[:-5]) for name in names if name.endswith(".json")]
        return sorted(records, key=lambda record: int(record["ts"]))

    def log_cycle(self, sentence: str, details: Mapping[str, Any]) -> None:
        """Store a run for a cycle that made no version, with the reason in a sentence."""
        with self._mlflow.operation("store the cycle") as client:
            run = self._mlflow.new_run(self.name, "cycle")
            client.set_tag(run, _CYCLE_SENTENCE, sentence[:_MAX_TAG_LENGTH])
            client.log_dict(run, dict(details), "cycle.json")
            client.set_terminated(run)

    def cycle_log(self) -> list[tuple[int, str]]:
        """(time in ms, sentence) of every stored cycle, oldest first."""
        with self._mlflow.operation("read the cycles") as client:
            experiment = client.get_experiment_by_name(self.name)
            if experiment is None:
                return []
            entries: list[tuple[int, str]] = []
            token = None
            while True:
                page = client.search_runs(
                    [experiment.experiment_id],
                    f"tags.`{_CYCLE_SENTENCE}` LIKE '%'",
                    max_results=1000,
                    page_token=token,
                )
                entries.extend((run.info.start_time, run.data.tags[_CYCLE_SENTENCE]) for run in page)
                token = page.token
                if not token:
                    return sorted(entries)

    def set_recommender_tag(self, key: str, value: str | None) -> None:
        """Set a tag of the recommender itself, or remove it (None)."""
        with self._mlflow.operation(f"set {key}") as client:
            if value is not None:
                client.set_registered_model_tag(self.name, key, value)
            elif self.recommender_tag(key) is not None:
                client.delete_registered_model_tag(self.name, key)

    def recommender_tag(self, key: str) -> str | None:
        """A tag of the recommender itself."""
        with self._mlflow.operation(f"read {key}"):
            model = self._mlflow.model(self.name)
        value: str | None = None if model is None else model.tags.get(key)
        return value

    def _codebook_file(self, id: str) -> Path:
        return self.cache / "codebooks" / f"{id}.safetensors"

    def _find(self, version_or_alias: str) -> Any:
        with self._mlflow.operation(f"find {version_or_alias}"):
            if version_or_alias.isdecimal():
                model_version = self._mlflow.version(self.name, version_or_alias)
            else:
                model_version = self._mlflow.by_alias(self.name, version_or_alias)
        if model_version is None:
            raise SidstreamError(
                f"the registry has no version or alias {version_or_alias!r} of {self.name}; "
                "see `sidstream models`"
            )
        return model_version


def _verified(folder: Path, bundle_id: str) -> Bundle:
    bundle = load_bundle(folder)
    if bundle.id != bundle_id:
        raise SidstreamError(f"{folder} holds bundle {bundle.id} in place of {bundle_id}; register it again")
    return bundle
