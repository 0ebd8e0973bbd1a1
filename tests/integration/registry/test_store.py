"""Bundles and codebooks on a real MLflow server."""

import subprocess
import sys

import pytest
from mlflow.tracking import MlflowClient

from harness.registry_support import bundle, codebook
from harness.servers import free_port
from registry.arms import CHAMPION
from registry.bundles.bundle import load_bundle
from registry.bundles.run_record import flat_params
from registry.bundles.store import Registry
from registry.settings import RegistrySettings
from streams.errors import SidstreamError

pytestmark = pytest.mark.integration


def test_a_bundle_comes_back_verified_and_is_uploaded_once(registry, tmp_path):
    stored = bundle(tmp_path, 1)
    version = registry.register(stored, {"ndcg": 0.25}, {"steps": 7})
    assert registry.register(stored) == version
    fetched = registry.fetch(version)
    assert fetched.id == stored.id
    assert fetched.path != stored.path
    assert load_bundle(fetched.path).manifest == stored.manifest
    assert registry.tags(version)["kind"] == "sft"
    (row,) = registry.versions()
    assert (row.version, row.bundle, row.kind, row.aliases) == (version, stored.id, "sft", ())
    assert row.metrics == {"ndcg": 0.25}


def test_what_a_version_and_a_codebook_were_made_with_is_kept_however_much_it_is(registry, tmp_path):
    # More than MLflow takes in one request, and longer than it takes in one value.
    settings = {f"part{n}": {"rate": n / 7, "names": ["x"] * n} for n in range(120)} | {"long": "y" * 7000}
    version = registry.register(bundle(tmp_path, 31), {"a/b": 0.5}, flat_params(settings))
    client = MlflowClient(registry.tracking_uri, registry.tracking_uri)
    data = client.get_run(client.get_model_version(registry.name, version).run_id).data
    assert data.params == flat_params(settings)
    assert data.params["part3.names"] == '["x", "x", "x"]'
    assert data.metrics == {"a/b": 0.5}

    book = codebook(32)
    registry.publish_codebook(book, metrics={"greedy/error": 0.25}, params={"size": "16"})
    (row,) = [
        row for row in client.search_model_versions(f"name = '{registry.codebooks}'")
        if row.tags["codebook"] == book.id
    ]  # fmt: skip
    data = client.get_run(row.run_id).data
    assert (data.metrics, data.params) == ({"greedy/error": 0.25}, {"size": "16"})


def test_a_process_that_uses_the_store_prints_nothing(registry, tmp_path):
    stored = bundle(tmp_path, 8)
    script = f"""
from pathlib import Path
from registry.bundles.bundle import load_bundle
from registry.settings import RegistrySettings
from registry.bundles.run_record import flat_params
from registry.bundles.store import Registry
cache = {str(tmp_path / "c")!r}
settings = RegistrySettings(tracking_uri={registry.tracking_uri!r}, name={registry.name!r}, cache=cache)
store = Registry(settings)
version = store.register(load_bundle(Path({str(stored.path)!r})), {{"ndcg": 0.5}}, {{"steps": 1}})
store.set_alias("champion", version)
store.publish_codebook(store.fetch("champion").codebook())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert registry.fetch("champion").id == stored.id


def test_a_fetched_bundle_is_kept_and_a_damaged_copy_is_replaced(registry, tmp_path, mlflow_server):
    version = registry.register(bundle(tmp_path, 2))
    first = registry.fetch(version)
    stamp = (first.path / "encode.onnx").stat().st_mtime_ns
    assert registry.fetch(version).path == first.path
    assert (first.path / "encode.onnx").stat().st_mtime_ns == stamp
    (first.path / "encode.onnx").write_bytes(b"other")
    assert (registry.fetch(version).path / "encode.onnx").read_bytes() == b"encode"
    assert [path.name for path in first.path.parent.iterdir() if path.name.startswith(".")] == []


def test_a_bundle_that_was_changed_in_the_store_is_refused(registry, tmp_path, mlflow_server):
    # Numbers that no other test of the shared server takes.
    version = registry.register(bundle(tmp_path, 203))
    mine = bytes([203]) * 100
    stored = [
        path for path in mlflow_server.artifacts.rglob("model.safetensors") if path.read_bytes() == mine
    ]
    assert len(stored) == 1
    stored[0].write_bytes(bytes([4]) * 100)
    with pytest.raises(SidstreamError, match=r"model\.safetensors was changed"):
        registry.fetch(version)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_bundle_in_its_place_is_refused(registry, tmp_path, mlflow_server):
    version = registry.register(bundle(tmp_path, 205))
    other = bundle(tmp_path, 206)
    mine = bytes([205]) * 100
    files = [path for path in mlflow_server.artifacts.rglob("model.safetensors") if path.read_bytes() == mine]
    stored = files[0].parent.parent
    for name in (*other.manifest.files, "manifest.json"):
        (stored / name).write_bytes((other.path / name).read_bytes())
    with pytest.raises(SidstreamError, match="in place of"):
        registry.fetch(version)


def test_nothing_in_the_store_is_pickled(registry, three, mlflow_server):
    files = [path for path in mlflow_server.artifacts.rglob("*") if path.is_file()]
    assert len(files) >= 3 * 9
    for path in files:
        assert path.suffix in {".json", ".safetensors", ".onnx", ".png"}
        # Every pickle of protocol 2 or later begins with this byte.
        assert path.read_bytes()[:1] != b"\x80"


def test_codebooks_have_versions_and_one_is_current(registry, tmp_path):
    with pytest.raises(SidstreamError, match="sidstream codebook fit"):
        registry.codebook()
    assert registry.current_codebook() is None
    old, new = codebook(1), codebook(2)
    assert registry.publish_codebook(old) == old.id
    assert registry.codebook().id == old.id
    registry.publish_codebook(new)
    assert registry.current_codebook() == registry.codebook().id == new.id
    assert registry.codebook(old.id).id == old.id
    registry.publish_codebook(old)
    assert registry.codebook().id == old.id
    with pytest.raises(SidstreamError, match="no codebook 0000"):
        registry.codebook("0000000000000000")
    for path in (tmp_path / "cache" / "codebooks").iterdir():
        path.write_bytes(b"damaged")
    assert registry.codebook(new.id).id == new.id


def test_an_absent_version_alias_or_server_is_one_sentence(registry, three, tmp_path):
    assert registry.alias(CHAMPION) is None
    for wrong in ("99", "champion", "nonsense"):
        with pytest.raises(SidstreamError, match="no version or alias"):
            registry.fetch(wrong)
    gone = Registry(RegistrySettings(tracking_uri=f"http://127.0.0.1:{free_port()}", cache=tmp_path / "c"))
    with pytest.raises(SidstreamError, match="could not") as failure:
        gone.fetch("1")
    assert "\n" not in str(failure.value)
    with pytest.raises(SidstreamError, match="no MLflow address"):
        Registry(RegistrySettings())
