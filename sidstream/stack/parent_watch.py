"""Runs one command that must not outlive its parent process: `parent_watch.py PARENT_PID FD COMMAND...`.

This small process stands between the two. It starts the command in a session of its own, writes the
command's pid to the file descriptor FD, passes SIGTERM on, and kills the whole session when its parent ends,
also when the parent was killed with SIGKILL. It ends with the command's exit code, and leaves nothing behind.

On Linux the kernel sends a signal at the parent's end (prctl PR_SET_PDEATHSIG). That signal also comes when
only the *thread* ends that started this process, so the parent's pid is checked before anything is killed.
Elsewhere the parent's pid is polled. Standard library only: it runs with `python -I -S`.
"""

import os
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
# Where the kernel sends no signal: how often to check that the parent still lives, in seconds.
_POLL_S = 0.5


def _signal_at_parents_end(signal_number: signal.Signals) -> None:
    """Ask the kernel for signal `sent` when the parent ends (Linux only; elsewhere nothing happens)."""
    if sys.platform == "linux":
        import ctypes

        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _kill_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # all of them ended already (macOS answers EPERM for a group of zombies)


def main(parent: int, report: int, command: list[str]) -> int:
    """Run `command` until it or process `parent` ends; return its exit code (128 + n after signal n)."""
    child = 0

    def check_parent(_signal: int, _frame: FrameType | None) -> None:
        if os.getppid() != parent:
            if child:
                _kill_session(child)
            os._exit(1)

    def forward(number: int, _frame: FrameType | None) -> None:
        if not child:
            os._exit(128 + number)
        try:
            os.kill(child, number)
        except ProcessLookupError:
            return  # it ended in this moment: waitpid below returns

    signal.signal(signal.SIGUSR1, check_parent)
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    _signal_at_parents_end(signal.SIGUSR1)
    if os.getppid() != parent:  # it ended before the kernel was asked
        return 1

    watcher = os.getpid()
    os.set_inheritable(report, False)
    child = os.fork()
    if child == 0:
        os.setsid()
        _signal_at_parents_end(signal.SIGKILL)
        if os.getppid() != watcher:
            os._exit(1)
        # Written only now that it leads its session: whoever reads the pid may kill the session.
        os.write(report, f"{os.getpid()}\n".encode())
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"cannot run {command[0]}: {error}", file=sys.stderr, flush=True)
            os._exit(127)
    os.close(report)
    if sys.platform != "linux":
        signal.signal(signal.SIGALRM, check_parent)
        signal.setitimer(signal.ITIMER_REAL, _POLL_S, _POLL_S)
    _, status = os.waitpid(child, 0)
    # What the command itself started stays in its session: it must not outlive the command.
    _kill_session(child)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
