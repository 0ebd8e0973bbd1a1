"""Child processes that die with their parent, whatever ends the parent, and write to a log of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streams.errors import SidstreamError

_PARENT_WATCH = Path(__file__).with_name("parent_watch.py")
# A log above this is set aside (one generation) when its process is started the next time.
_LOG_BYTES = 10 * 1024 * 1024
_POLL_S = 0.05


def process_identity(pid: int) -> str | None:
    """Boot and start time of a process, which tell it from a later one with its pid; None: no process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The command's name, in parentheses, may hold blanks: fields are counted after it (state is field 3).
        fields = stat.rpartition(")")[2].split()
        if fields[0] == "Z":
            return None
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{fields[19]}"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends between opening and reading
        if sys.platform == "linux":
            return None
    listing = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return listing.stdout.strip() or None


def end_session(pid: int, identity: str, timeout: float) -> None:
    """Kill the command that was `born` as `identity`, with all it started, and wait until it is gone.

    For a process that is not this one's child. SidstreamError when it is still there after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while process_identity(pid) == identity:
        _kill_group(pid)
        if time.monotonic() > deadline:
            raise SidstreamError(f"process {pid} cannot be ended: end it by hand, then try again")
        time.sleep(_POLL_S)


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # nothing of it is left


@dataclass
class Child:
    """A running command. `pid` is the command's own; it leads a session, so what it starts ends with it."""

    name: str
    pid: int
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def exit_code(self) -> int | None:
        """The command's exit code; None while it runs; 128 + n after signal n."""
        code = self.process.poll()
        if code is not None and code < 0:
            # Only the go-between was killed: the kernel took the command, its own children are left to us.
            _kill_group(self.pid)
        return code

    @property
    def alive(self) -> bool:
        """True while the command runs."""
        return self.exit_code is None

    def wait(self, timeout: float) -> int | None:
        """Wait until it ends, at most `timeout` seconds; return the exit code, or None when it still runs."""
        deadline = time.monotonic() + timeout
        while (code := self.exit_code) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return code

    def terminate(self) -> None:
        """Ask it to end (SIGTERM); returns at once."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the command and all it started, now (SIGKILL)."""
        if self.alive:
            _kill_group(self.pid)
            self.process.wait()

    def stop(self, grace: float) -> None:
        """SIGTERM, then SIGKILL after `grace` seconds."""
        self.terminate()
        if self.wait(grace) is None:
            self.kill()


def spawn(
    name: str,
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Child:
    """Start `command` so that it dies with this process; stdout and stderr are appended to `log`.

    The exit code 127 tells that the command could not be run (the log says why).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(log.with_name(log.name + ".1"))
    reader, writer = os.pipe()
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PARENT_WATCH), str(os.getpid()), str(writer), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                cwd=cwd,
                pass_fds=(writer,),
                start_new_session=True,
            )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as pid_pipe:
        line = pid_pipe.readline()
    return Child(name, int(line) if line else process.pid, log, process)
