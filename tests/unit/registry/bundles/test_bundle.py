import json

import numpy as np
import pytest

from registry.bundles.bundle import load_bundle, write_bundle
from registry.bundles.codebook import Codebook
from streams.errors import SidstreamError

CODEBOOK = Codebook("test", tuple(np.eye(4, dtype=np.float32)[:size] for size in (4, 3, 2)))


def fields(**changed):
    return {
        "kind": "sft", "codebook": CODEBOOK, "popular": ["b", "a"], "max_items": 50, "sids": {0: 12, 1: 9},
        "window": {"clicks": {0: (0, 10)}}, "seed": 7, "metrics": {"ndcg": 0.1}, "parent": "p" * 16,
    } | changed  # fmt: skip


def files(folder, weights=b"weights"):
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(weights)
    for name in ("encode", "step_0", "step_1", "step_2"):
        (folder / f"{name}.onnx").write_bytes(name.encode())
    return folder


def test_a_bundle_comes_back_as_it_was_written(tmp_path):
    written = write_bundle(files(tmp_path / "b"), **fields())
    read = load_bundle(tmp_path / "b")
    assert read.manifest == written.manifest
    assert read.id == written.id
    assert read.codebook().id == CODEBOOK.id
    assert read.popular() == ["b", "a"]
    assert read.prompt.sizes == (4, 3, 2)
    assert read.manifest.sids == {0: 12, 1: 9}
    assert read.manifest.window == {"clicks": {0: (0, 10)}}
    assert read.manifest.lineage.parent == "p" * 16


def test_the_id_is_that_of_the_content(tmp_path):
    base = write_bundle(files(tmp_path / "a"), **fields()).id
    other_time = write_bundle(files(tmp_path / "b"), **fields(created=5, metrics={"ndcg": 0.2})).id
    assert other_time == base
    assert write_bundle(files(tmp_path / "c", b"other"), **fields()).id != base
    for number, changed in enumerate(
        (
            {"kind": "dpo"}, {"max_items": 49}, {"sids": {0: 13}}, {"parent": None}, {"reference": "r"},
            {"popular": ["a"]}, {"seed": 8}, {"window": {}},
        )
    ):  # fmt: skip
        assert write_bundle(files(tmp_path / str(number)), **fields(**changed)).id != base


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "encode.onnx", "codebook.safetensors", "popular.json"]
)
def test_one_flipped_bit_names_the_file(tmp_path, name):
    folder = files(tmp_path / "b")
    write_bundle(folder, **fields())
    raw = bytearray((folder / name).read_bytes())
    raw[-1] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(SidstreamError, match=name.replace(".", r"\.")):
        load_bundle(folder)


def test_a_missing_and_an_extra_file_are_named(tmp_path):
    folder = files(tmp_path / "b")
    write_bundle(folder, **fields())
    (folder / "model" / "note.txt").write_text("hello")
    with pytest.raises(SidstreamError, match=r"note\.txt does not belong"):
        load_bundle(folder)
    (folder / "model" / "note.txt").unlink()
    (folder / "step_1.onnx").unlink()
    with pytest.raises(SidstreamError, match=r"step_1\.onnx is missing"):
        load_bundle(folder)


def test_a_link_is_refused(tmp_path):
    folder = files(tmp_path / "b")
    write_bundle(folder, **fields())
    (tmp_path / "outside").write_bytes((folder / "encode.onnx").read_bytes())
    (folder / "encode.onnx").unlink()
    (folder / "encode.onnx").symlink_to(tmp_path / "outside")
    with pytest.raises(SidstreamError, match="is a link"):
        load_bundle(folder)


@pytest.mark.parametrize("field", ["kind", "seed", "max_items", "sids", "codebook", "bundle"])
def test_a_changed_manifest_is_refused(tmp_path, field):
    folder = files(tmp_path / "b")
    write_bundle(folder, **fields())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[field] = {"kind": "dpo", "seed": 8, "max_items": 51, "sids": {"0": 13}, "codebook": "0" * 16,
                       "bundle": "0" * 16}[field]  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SidstreamError, match="was changed"):
        load_bundle(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", "\udcff", '{"format": 1}'])
def test_a_damaged_manifest_is_one_sentence(tmp_path, text):
    folder = files(tmp_path / "b")
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SidstreamError, match="fetch the bundle again"):
        load_bundle(folder)


def test_files_that_run_code_are_never_in_a_bundle(tmp_path):
    folder = files(tmp_path / "b")
    (folder / "model" / "training_args.bin").write_bytes(b"x")
    with pytest.raises(SidstreamError, match=r"training_args\.bin may run code"):
        write_bundle(folder, **fields())


def test_an_incomplete_export_is_refused_before_it_is_a_bundle(tmp_path):
    folder = files(tmp_path / "b")
    (folder / "step_2.onnx").unlink()
    with pytest.raises(SidstreamError, match=r"step_2\.onnx is missing"):
        write_bundle(folder, **fields())
    assert not (folder / "manifest.json").exists()


def test_a_later_format_is_named(tmp_path):
    folder = files(tmp_path / "b")
    (folder / "manifest.json").write_text('{"format": 2, "new": true}')
    with pytest.raises(SidstreamError, match="bundle format 2; this version of sidstream reads 1"):
        load_bundle(folder)
