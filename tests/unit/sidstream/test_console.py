"""What a command shows where nobody watches it."""

from __future__ import annotations

import pytest

from sidstream.console import status


def test_in_a_file_progress_is_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 10.0, 61.0, 61.0, 90.0])
    with status("reading", lambda: next(seconds)) as show:
        show("epoch 1")
        show("epoch 2")
        show("epoch 3")
    assert capsys.readouterr().err == "epoch 2\n"
