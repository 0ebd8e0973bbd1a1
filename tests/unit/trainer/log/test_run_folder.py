"""A run that is cut off goes on with the window that it began with, or says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.hold_out import HoldOut
from streams.errors import SidstreamError
from tests.tiny_explorations import T0, exploration
from tests.tiny_log import Logged
from trainer.log.interaction_log import InteractionLog
from trainer.log.run_folder import RunFolder
from trainer.log.window import TOPICS, Window

LIVES = dict.fromkeys(TOPICS, 1)


def filled(folder: Path) -> tuple[Logged, Window]:
    """A log of an old window and a new one, and the new one."""
    logged = Logged(folder)
    logged.clicks((None, "a", "i00", 0), (None, "b", "i01", 1))
    logged.window()
    logged.clicks((None, "a", "i02", 2))
    logged.purchases(("b", "i03", 3))
    logged.explorations(exploration(0, ts=T0))
    return logged, logged.window()


def content(window: Window) -> list[object]:
    tables = [window._read(topic) for topic in TOPICS]
    return [window.count_new(), *((table.to_pylist(), new.tolist()) for table, new in tables)]


def test_newer_events_wait_for_the_next_run(tmp_path: Path) -> None:
    logged, window = filled(tmp_path / "log")
    before, said = content(window), list[str]()
    run = RunFolder.open(tmp_path / "runs", {"parent": "p"}, said.append)
    assert run.window(logged.log, lambda: LIVES, said.append) is None
    run.freeze(window)
    logged.clicks((None, "a", "i05", 9), (None, "c", "i06", 9))
    logged.purchases(("c", "i06", 10))
    logged.explorations(exploration(1, ts=T0 + 1))
    assert content(Window(logged.log, logged.window().ranges, LIVES)) != before
    again = RunFolder.open(tmp_path / "runs", {"parent": "p"}, said.append)
    resumed = again.window(InteractionLog.open(tmp_path / "log"), lambda: LIVES, said.append)
    assert resumed is not None
    assert content(resumed) == before
    assert resumed.explorations(1000, HoldOut(share=0.0)) == window.explorations(1000, HoldOut(share=0.0))
    (sentence,) = said
    assert sentence.startswith(f"run {run.path.name} goes on with the window that it began with")


@pytest.mark.parametrize("other", [{"parent": "q"}, {"parent": "p", "settings": 1}])
def test_a_run_of_other_inputs_is_removed_with_a_sentence(tmp_path: Path, other: dict[str, object]) -> None:
    _, window = filled(tmp_path / "log")
    said: list[str] = []
    run = RunFolder.open(tmp_path / "runs", {"parent": "p"}, said.append)
    run.freeze(window)
    new = RunFolder.open(tmp_path / "runs", other, said.append)
    assert new.path != run.path
    assert not run.path.exists()
    (sentence,) = said
    assert f"unfinished run {run.path.name} is removed" in sentence


def test_a_run_whose_records_are_gone_begins_anew_with_a_sentence(tmp_path: Path) -> None:
    logged, window = filled(tmp_path / "log")
    for log, lives, reason in (
        (InteractionLog.open(tmp_path / "emptied"), LIVES, "lacks records of topic clicks"),
        (logged.log, LIVES | {"purchases": 2}, "topic purchases was deleted and made again"),
    ):
        said: list[str] = []
        run = RunFolder.open(tmp_path / "runs", {"parent": "p"}, said.append)
        run.freeze(window)
        assert run.window(log, lambda lives=lives: lives, said.append) is None
        assert not run.path.exists()
        assert reason in said[0]


def test_a_damaged_window_is_named(tmp_path: Path) -> None:
    logged, window = filled(tmp_path / "log")
    run = RunFolder.open(tmp_path / "runs", {"parent": "p"}, lambda sentence: None)
    run.freeze(window)
    (run.path / "window.json").write_text("{")
    with pytest.raises(SidstreamError, match="is damaged"):
        run.window(logged.log, lambda: LIVES, lambda sentence: None)
