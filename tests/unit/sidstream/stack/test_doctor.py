"""`sidstream doctor`: every failure comes with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.servers import free_port
from sidstream.settings import Settings
from sidstream.stack import doctor, servers
from sidstream.stack.doctor import Check, run_checks


def test_a_line_shows_the_remedy_only_where_something_fails() -> None:
    assert Check("disk", True, "9 GiB", "free some").line.split() == ["ok", "disk", "9", "GiB"]
    assert Check("disk", False, "0 GiB", "free some").line.endswith("0 GiB; free some")
    assert Check("disk", False, "0 GiB", "free some").line.startswith("FAIL ")


def test_addresses_that_do_not_answer_fail_with_the_setting_to_correct(tmp_path: Path) -> None:
    nobody = free_port()
    settings = Settings.model_validate({
        "stack": {"home": str(tmp_path / "home"), "jars": str(tmp_path / "jars"),
                  "maven_repository": f"http://127.0.0.1:{nobody}"},
        "kafka": {"bootstrap": f"127.0.0.1:{nobody}"},
        "redis": {"url": f"redis://:secret@127.0.0.1:{nobody}/0"},
        "registry": {"tracking_uri": f"http://127.0.0.1:{nobody}"},
    })  # fmt: skip
    checks = {check.name: check for check in run_checks(settings)}
    for name, remedy in [
        ("jars", "SIDSTREAM_STACK__MAVEN_REPOSITORY"),
        ("kafka", "SIDSTREAM_KAFKA__BOOTSTRAP"),
        ("redis", "SIDSTREAM_REDIS__URL"),
        ("mlflow", "SIDSTREAM_REGISTRY__TRACKING_URI"),
    ]:
        assert not checks[name].ok, name
        assert remedy in checks[name].line
    assert "secret" not in "".join(check.line for check in checks.values())
    assert checks["java"].ok
    assert checks["data"].ok
    assert checks["folder"].ok


def test_a_disk_that_is_too_full_fails(tmp_path: Path) -> None:
    check = doctor.disk(tmp_path / "not" / "yet", free_bytes=lambda _: 2**20)
    assert not check.ok
    assert "SIDSTREAM_STACK__HOME" in check.line


def test_kafka_cannot_be_started_without_its_jars(tmp_path: Path) -> None:
    check = doctor.kafka(Settings().kafka.model_copy(update={"bootstrap": None}), None, startable=False)
    assert not check.ok
    assert check.remedy


def test_redis_comes_from_the_path_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert servers.redis_binary().endswith("valkey-server")
    own = tmp_path / "redis-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert servers.redis_binary() == str(own)
