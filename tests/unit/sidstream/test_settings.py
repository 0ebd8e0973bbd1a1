"""All settings in one place: the file, then the environment; what does not fit is named, secrets are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidstream.settings import load, read
from streams.errors import SidstreamError


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without a stack, and no settings from outside."""
    import os

    for name in list(os.environ):
        if name.startswith("SIDSTREAM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_environment_overrides_the_file_and_the_file_the_defaults(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = read().kafka.partitions
    (alone / "sidstream.toml").write_text("[kafka]\npartitions = 3\n[serving]\nbeam = 7\n")
    assert (read().kafka.partitions, read().serving.beam) == (3, 7)
    assert default != 3
    monkeypatch.setenv("SIDSTREAM_KAFKA__PARTITIONS", "5")
    assert (read().kafka.partitions, read().serving.beam) == (5, 7)


def test_a_named_file_is_read_and_an_absent_one_is_an_error(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (alone / "other.toml").write_text("[serving]\nbeam = 9\n")
    monkeypatch.setenv("SIDSTREAM_CONFIG", "other.toml")
    assert read().serving.beam == 9
    monkeypatch.setenv("SIDSTREAM_CONFIG", "gone.toml")
    with pytest.raises(SidstreamError, match=r"gone\.toml"):
        read()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[serving]\nbeam = 0\n", "serving.beam is 0"),
        ("[serving]\nbeem = 5\n", "serving.beem is 5"),
        ("[sreving]\nbeam = 5\n", "sreving"),
        ("[kafka]\npartitions = 'many'\n", "kafka.partitions is 'many'"),
    ],
)
def test_what_does_not_fit_is_named_with_its_value(alone: Path, text: str, named: str) -> None:
    (alone / "sidstream.toml").write_text(text)
    with pytest.raises(SidstreamError, match=named):
        read()


def test_a_file_that_is_no_toml_is_one_sentence(alone: Path) -> None:
    (alone / "sidstream.toml").write_text("[kafka\n")
    with pytest.raises(SidstreamError, match=r"sidstream\.toml"):
        read()


def test_a_secret_that_does_not_fit_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDSTREAM_REDIS__URL", "http://user:hunter2@host")
    with pytest.raises(SidstreamError) as caught:
        read()
    assert "hunter2" not in str(caught.value)
    assert "redis.url" in str(caught.value)


def test_secrets_are_masked_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDSTREAM_REDIS__URL", "redis://:hunter2@127.0.0.1:1/0")
    monkeypatch.setenv("SIDSTREAM_KAFKA__SASL_PASSWORD", "hunter3")
    text_of_settings = repr(read())
    assert "hunter2" not in text_of_settings
    assert "hunter3" not in text_of_settings


def test_without_a_stack_the_settings_are_as_given(alone: Path) -> None:
    assert load() == read()
