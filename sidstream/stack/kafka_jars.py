"""Apache Kafka's jars: a pinned list with SHA-256, fetched once from a Maven repository and cached."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from streams.errors import SidstreamError

KAFKA_VERSION = "4.4.0"
MAVEN_CENTRAL = "https://repo.maven.apache.org/maven2"
_LIST = Path(__file__).with_name("kafka-jars.txt")
# Many small files: the wait is latency, not bandwidth. More than 8 connections is unfriendly to a mirror.
_THREADS = 8
# A dropped connection is worth another try; a jar that is wrong three times is not.
_ATTEMPTS = 3
_TIMEOUT_S = 30
_PARTIAL = ".partial-"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Jar:
    """One pinned jar."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The file's name in the cache."""
        return f"{self.artifact}-{self.version}.jar"

    def __str__(self) -> str:
        return f"{self.group}:{self.artifact}:{self.version}"


def parse(text: str) -> tuple[Jar, ...]:
    """Jars of a list: lines `group:artifact:version sha256`, `#` starts a comment.

    Raises SidstreamError for a line of any other shape, or two jars of one name.
    """
    jars: list[Jar] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        coordinate, _, digest = line.partition(" ")
        parts, digest = coordinate.split(":"), digest.strip()
        if len(parts) != 3 or not all(parts) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise SidstreamError(
                f"line {number} of the jar list is {line!r}: write `group:artifact:version sha256`"
            )
        jars.append(Jar(parts[0], parts[1], parts[2], digest))
    if len({jar.file for jar in jars}) != len(jars):
        raise SidstreamError("the jar list names a jar twice: keep one version of each")
    return tuple(jars)


def pinned_jars() -> tuple[Jar, ...]:
    """The jars of this product's Kafka."""
    return parse(_LIST.read_text())


def cache_folder() -> Path:
    """Where the jars are kept for every project of this user."""
    return Path(platformdirs.user_cache_dir("sidstream")) / f"kafka-{KAFKA_VERSION}"


def has_pinned_bytes(path: Path, jar: Jar) -> bool:
    """True when the file is there and holds exactly the pinned bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == jar.sha256


def missing_jars(folder: Path, jars: tuple[Jar, ...]) -> list[Jar]:
    """Jars that the folder lacks, or holds with other bytes than pinned."""
    return [jar for jar in jars if not has_pinned_bytes(folder / jar.file, jar)]


def classpath(folder: Path, jars: tuple[Jar, ...]) -> str:
    """What `java -cp` takes."""
    return os.pathsep.join(str(folder / jar.file) for jar in jars)


def fetch(
    folder: Path | None = None,
    repository: str = MAVEN_CENTRAL,
    jars: tuple[Jar, ...] | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Make sure that every pinned jar lies in `folder` (default: the user's cache) with the pinned bytes.

    Jars that are there are only verified. A download that is killed leaves nothing under a jar's name: a jar
    is checked aside and renamed. Two processes at once take turns. `on_progress(done, total)` counts jars.
    Raises SidstreamError when a jar cannot be fetched, or holds other bytes than pinned.
    """
    folder = folder or cache_folder()
    jars = jars if jars is not None else pinned_jars()
    lacking_jars = missing_jars(folder, jars) if folder.is_dir() else list(jars)
    if lacking_jars:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive_lock(folder):
            lacking_jars = missing_jars(folder, jars)  # another process may have fetched them meanwhile
            for left in folder.glob(_PARTIAL + "*"):
                shutil.rmtree(left)
            if lacking_jars:
                _download(folder, repository.rstrip("/"), lacking_jars, len(jars), on_progress)
    if on_progress:
        on_progress(len(jars), len(jars))
    return folder


def reachable(repository: str, jar: Jar) -> bool:
    """True when the repository has the jar (a HEAD request; nothing is fetched)."""
    path = f"{jar.group.replace('.', '/')}/{jar.artifact}/{jar.version}/{jar.file}"
    request = urllib.request.Request(f"{repository.rstrip('/')}/{path}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(
    folder: Path, repository: str, lacking_jars: list[Jar], total: int, on_progress: Progress | None
) -> None:
    try:
        from jgo.maven import MavenContext
    except ImportError as error:
        raise SidstreamError(
            "the package jgo, which fetches Kafka, is not installed: pip install 'sidstream[local]'"
        ) from error
    aside = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    try:
        # A cache of its own: nothing is read from, or written to, ~/.m2.
        context = MavenContext(repo_cache=aside, remote_repos={"pinned": repository}, timeout=_TIMEOUT_S)
        done = total - len(lacking_jars)
        with ThreadPoolExecutor(_THREADS) as pool:
            tasks = [pool.submit(_fetch_jar, context, aside, folder, jar, repository) for jar in lacking_jars]
            try:
                for task in as_completed(tasks):
                    task.result()
                    done += 1
                    if on_progress:
                        on_progress(done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fetch_jar(context: Any, aside: Path, folder: Path, jar: Jar, repository: str) -> None:
    """Fetch one jar, check it, move it to its place."""
    import requests

    artifact = context.project(jar.group, jar.artifact).at_version(jar.version).artifact()
    problem: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            fetched = Path(artifact.resolve())
        except (requests.RequestException, RuntimeError, OSError) as error:
            problem = error
            artifact.cached_path.unlink(missing_ok=True)  # half a file: jgo would take it for whole
            continue
        if not has_pinned_bytes(fetched, jar):
            digest = hashlib.sha256(fetched.read_bytes()).hexdigest()
            raise SidstreamError(
                f"{jar} from {repository} has SHA-256 {digest}, expected {jar.sha256}: the jar was changed "
                "on its way; nothing was kept. Try another network or SIDSTREAM_STACK__MAVEN_REPOSITORY"
            )
        os.replace(fetched, folder / jar.file)
        return
    raise SidstreamError(
        f"cannot fetch {jar} from {repository} ({type(problem).__name__}): check the network, or name a "
        "mirror of Maven Central in SIDSTREAM_STACK__MAVEN_REPOSITORY"
    ) from problem
