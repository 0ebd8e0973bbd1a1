"""Kafka's jars: only pinned bytes are ever used, and a broken download leaves nothing behind."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.servers import free_port
from sidstream.stack import kafka_jars
from sidstream.stack.kafka_jars import Jar, fetch, parse
from streams.errors import SidstreamError

_WORD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,15}", fullmatch=True)
_DIGEST = st.binary(max_size=8).map(lambda seed: hashlib.sha256(seed).hexdigest())


def _jar(name: str, content: bytes) -> Jar:
    return Jar("org.example", name, "1.0", hashlib.sha256(content).hexdigest())


def _publish(repository: Path, jar: Jar, content: bytes) -> None:
    path = repository / jar.group.replace(".", "/") / jar.artifact / jar.version / jar.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Requests are no news."""


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A Maven repository on loopback: its folder and its address."""
    folder = tmp_path / "repository"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_list_pins_kafka_with_all_its_dependencies() -> None:
    jars = kafka_jars.pinned_jars()
    assert len(jars) == 45
    own = {jar.version for jar in jars if jar.group == "org.apache.kafka"}
    assert own == {kafka_jars.KAFKA_VERSION}
    assert "log4j-slf4j-impl" in {jar.artifact for jar in jars}


@given(st.lists(st.builds(Jar, _WORD, _WORD, _WORD, _DIGEST), unique_by=lambda jar: jar.file))
def test_a_list_reads_back_as_it_was_written(jars: list[Jar]) -> None:
    text = "# a comment\n\n" + "".join(f"{jar} {jar.sha256}  # why\n" for jar in jars)
    assert parse(text) == tuple(jars)


@pytest.mark.parametrize(
    "line", ["a:b:1", "a:b 0" * 2, "a:b:1 " + "g" * 64, "a:b:1 " + "0" * 63, "a::1 " + "0" * 64]
)
def test_a_line_without_a_whole_digest_is_refused(line: str) -> None:
    with pytest.raises(SidstreamError, match="line 1 of the jar list"):
        parse(line)


def test_two_versions_of_one_jar_name_are_refused() -> None:
    with pytest.raises(SidstreamError, match="twice"):
        parse("a:b:1 " + "0" * 64 + "\nc:b:1 " + "1" * 64)


def test_jars_are_fetched_once_and_counted(tmp_path: Path, repository: tuple[Path, str]) -> None:
    source, address = repository
    jars = tuple(_jar(f"lib{n}", bytes([n])) for n in range(5))
    for n, jar in enumerate(jars):
        _publish(source, jar, bytes([n]))
    counted: list[tuple[int, int]] = []

    folder = fetch(tmp_path / "cache", address, jars, lambda done, total: counted.append((done, total)))

    assert [(folder / jar.file).read_bytes() for jar in jars] == [bytes([n]) for n in range(5)]
    assert counted[-1] == (5, 5)
    assert [done for done, _ in counted] == sorted(done for done, _ in counted)
    # Nobody listens there: what is cached needs no repository.
    assert fetch(folder, f"http://127.0.0.1:{free_port()}", jars) == folder


def test_a_tampered_jar_is_refused_and_not_kept(tmp_path: Path, repository: tuple[Path, str]) -> None:
    source, address = repository
    jar = _jar("lib", b"as pinned")
    _publish(source, jar, b"as changed")

    with pytest.raises(SidstreamError, match=r"org\.example:lib:1\.0 .* expected " + jar.sha256):
        fetch(tmp_path / "cache", address, (jar,))

    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_jar_that_was_changed_in_the_cache_is_fetched_again(
    tmp_path: Path, repository: tuple[Path, str]
) -> None:
    source, address = repository
    jar = _jar("lib", b"as pinned")
    _publish(source, jar, b"as pinned")
    folder = fetch(tmp_path / "cache", address, (jar,))
    (folder / jar.file).write_bytes(b"half")

    fetch(folder, address, (jar,))

    assert (folder / jar.file).read_bytes() == b"as pinned"


def test_what_a_killed_download_left_is_removed(tmp_path: Path, repository: tuple[Path, str]) -> None:
    source, address = repository
    jar = _jar("lib", b"as pinned")
    _publish(source, jar, b"as pinned")
    left = tmp_path / "cache" / ".partial-killed"
    left.mkdir(parents=True)
    (left / jar.file).write_bytes(b"hal")

    folder = fetch(tmp_path / "cache", address, (jar,))

    assert sorted(path.name for path in folder.iterdir()) == [".lock", jar.file]


def test_an_unreachable_repository_is_named_with_the_remedy(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SidstreamError, match="SIDSTREAM_STACK__MAVEN_REPOSITORY") as error:
        fetch(tmp_path / "cache", address, (_jar("lib", b""),))
    assert address in str(error.value)


def test_the_repository_is_asked_without_fetching(repository: tuple[Path, str]) -> None:
    source, address = repository
    jar = _jar("lib", b"as pinned")
    assert not kafka_jars.reachable(address, jar)
    _publish(source, jar, b"as pinned")
    assert kafka_jars.reachable(address, jar)
