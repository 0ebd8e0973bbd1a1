"""A bundle: the folder with everything that must agree to answer a request, named by its content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from registry.bundles.codebook import Codebook
from registry.bundles.prompt import Prompt
from registry.hold_out import HoldOut
from streams.errors import SidstreamError

FORMAT = 1
MANIFEST = "manifest.json"
CODEBOOK = "codebook.safetensors"
POPULAR = "popular.json"
MAX_POPULAR = 1000
BundleKind = Literal["base", "sft", "dpo"]
# Files with these suffixes may run code when they are read. A bundle never holds one.
EXECUTABLE_SUFFIXES = frozenset(
    {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"}
)
_CHUNK = 1 << 20


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights came from: ids of bundles."""

    parent: str | None = None
    reference: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is in a bundle. `bundle` is the hash of everything else except `created` and `metrics`."""

    format: int
    bundle: str
    kind: BundleKind
    codebook: str
    sizes: list[int]
    max_items: int
    created: int
    # The SID table that the weights have seen: {partition: next offset} of topic `sids`.
    sids: dict[int, int]
    lineage: Lineage
    # What they were trained on: {topic: {partition: [from, to)}}.
    window: dict[str, dict[int, tuple[int, int]]]
    seed: int
    metrics: dict[str, float | int | str | None]
    files: dict[str, str]
    # Whom neither these weights nor their parents' learned from. None: a bundle from before there was a rule;
    # left out of the content then, so that its id is what it was.
    validation: HoldOut | None = None

    def content_id(self) -> str:
        """16 hex digits over the sorted digests of the files and the fields that the weights depend on."""
        fields = msgspec.to_builtins(self, str_keys=True)
        for name in ("bundle", "created", "metrics"):
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


class _FormatOnly(msgspec.Struct):
    format: int


@dataclass(frozen=True)
class Bundle:
    """A verified folder."""

    path: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        """The content id."""
        return self.manifest.bundle

    @property
    def prompt(self) -> Prompt:
        """The vocabulary that the weights speak."""
        return Prompt(tuple(self.manifest.sizes), self.manifest.max_items)

    @property
    def model(self) -> Path:
        """The transformers folder, for the trainer."""
        return self.path / "model"

    def codebook(self) -> Codebook:
        """The quantiser that the SIDs come from."""
        return Codebook.load(self.path / CODEBOOK)

    def popular(self) -> list[str]:
        """Item ids, most bought first."""
        item_ids: list[str] = msgspec.json.decode((self.path / POPULAR).read_bytes(), type=list[str])
        return item_ids


def required_files(levels: int) -> tuple[str, ...]:
    """The files that every bundle has, beside the contents of model/."""
    return (CODEBOOK, POPULAR, "model/config.json", "encode.onnx", *(f"step_{n}.onnx" for n in range(levels)))


def write_bundle(
    folder: Path,
    *,
    kind: BundleKind,
    codebook: Codebook,
    popular: Sequence[str],
    max_items: int,
    sids: Mapping[int, int],
    window: Mapping[str, Mapping[int, tuple[int, int]]],
    seed: int,
    metrics: Mapping[str, Any] | None = None,
    parent: str | None = None,
    reference: str | None = None,
    validation: HoldOut | None = None,
    created: int | None = None,
) -> Bundle:
    """Complete `folder` (model/, encode.onnx and step_*.onnx are in it) to a bundle.

    Writes the codebook, the popular items and the manifest. `validation`: whom the weights never learned
    from; `created` is in milliseconds (default: now).
    Raises SidstreamError for a missing file, or one that would run code when read.
    """
    if kind not in get_args(BundleKind):
        raise SidstreamError(f"{kind!r} is no kind of bundle; use one of {', '.join(get_args(BundleKind))}")
    codebook.save(folder / CODEBOOK)
    (folder / POPULAR).write_text(json.dumps(list(popular)[:MAX_POPULAR]))
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {name: _digest(path) for name, path in _walk(folder).items()}
    _check_names(folder, set(files), len(codebook.sizes))
    manifest = Manifest(
        format=FORMAT, bundle="", kind=kind, codebook=codebook.id, sizes=list(codebook.sizes),
        max_items=max_items, created=time.time_ns() // 1_000_000 if created is None else created,
        sids=dict(sids), lineage=Lineage(parent=parent, reference=reference),
        window={topic: dict(parts) for topic, parts in window.items()}, seed=seed,
        metrics=dict(metrics or {}), files=files, validation=validation,
    )  # fmt: skip
    manifest = msgspec.structs.replace(manifest, bundle=manifest.content_id())
    text = json.dumps(msgspec.to_builtins(manifest, str_keys=True), indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n")
    return Bundle(folder, manifest)


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every digest.

    Raises SidstreamError that names the file which is missing, extra or changed.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        # The format is read first: a later format may have other fields, and such a file is not damaged.
        bundle_format = msgspec.json.decode(raw, type=_FormatOnly).format
        if bundle_format != FORMAT:
            raise SidstreamError(
                f"{path} has bundle format {bundle_format}; this version of sidstream reads {FORMAT}"
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except OSError as error:
        raise SidstreamError(f"{folder} has no readable {MANIFEST}; fetch the bundle again") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SidstreamError(f"{path} is damaged ({error}); fetch the bundle again") from error
    present = _walk(folder)
    del present[MANIFEST]
    _check_names(folder, set(manifest.files), len(manifest.sizes))
    for name in sorted(manifest.files.keys() - present.keys()):
        raise SidstreamError(f"{folder / name} is missing from bundle {manifest.bundle}; fetch it again")
    for name in sorted(present.keys() - manifest.files.keys()):
        raise SidstreamError(f"{folder / name} does not belong to bundle {manifest.bundle}; fetch it again")
    for name, digest in manifest.files.items():
        if _digest(present[name]) != digest:
            raise SidstreamError(
                f"{folder / name} was changed: it is not the file of bundle {manifest.bundle}; fetch it again"
            )
    if manifest.content_id() != manifest.bundle:
        raise SidstreamError(
            f"{path} was changed: its content is not bundle {manifest.bundle}; fetch it again"
        )
    bundle = Bundle(folder, manifest)
    codebook = bundle.codebook()
    if codebook.id != manifest.codebook or list(codebook.sizes) != manifest.sizes:
        raise SidstreamError(
            f"{folder / CODEBOOK} is codebook {codebook.id}, not {manifest.codebook}; fetch it again"
        )
    return bundle


def _check_names(folder: Path, names: set[str], levels: int) -> None:
    for name in required_files(levels):
        if name not in names:
            raise SidstreamError(f"{folder / name} is missing: every bundle has it; export the model again")
    for name in sorted(names):
        if Path(name).suffix in EXECUTABLE_SUFFIXES:
            raise SidstreamError(
                f"{folder / name} may run code when it is read; save it as safetensors instead"
            )


def _walk(folder: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise SidstreamError(f"{path} is a link; a bundle holds plain files only")
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path
    return files


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
