"""A checkpoint is whole or not there; damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streams.errors import SidstreamError
from trainer.tuning.checkpoint import Checkpoint


def test_a_crash_while_writing_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.load() is None
    checkpoint.save({"weights": {"a": torch.ones(2)}}, {"step": 1})
    with monkeypatch.context() as patch:
        # The moment before the new one is named as the newest.
        patch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            checkpoint.save({"weights": {"a": torch.zeros(2)}}, {"step": 2})
    saved = Checkpoint(tmp_path).load()
    assert saved is not None
    assert (saved.state, saved.tensors["weights"]["a"].tolist()) == ({"step": 1}, [1.0, 1.0])
    checkpoint.save({"weights": {"a": torch.zeros(2)}, "kept": {}}, {"step": 2})
    saved = Checkpoint(tmp_path).load()
    assert saved is not None
    assert (saved.state, saved.tensors["kept"]) == ({"step": 2}, {})
    assert len([path for path in checkpoint.folder.iterdir() if path.is_dir()]) == 1


def test_a_checkpoint_of_other_bytes_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save({"weights": {"a": torch.ones(2)}}, {"step": 1})
    (file,) = checkpoint.folder.glob("*/weights.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SidstreamError, match=r"weights.safetensors is missing or was changed.*remove it"):
        checkpoint.load()
    (checkpoint.folder / "newest.json").write_text("{")
    with pytest.raises(SidstreamError, match="no JSON"):
        checkpoint.load()
