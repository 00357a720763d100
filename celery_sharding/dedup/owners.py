"""Who holds a claim, and whether that process is provably gone.

An owner is one run of one task in one process. It names its process so well that another process of the same machine
can tell "it is gone" from "I cannot see it": host, kernel boot, PID namespace, PID and the start time of that PID.
Only what the kernel says counts; when in doubt the holder lives, and its lease decides.

Where the kernel tells nothing (no `/proc`), nobody is ever provably gone.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Owner:
    """One run of one task. `run_id` is new for each run and is the token that the stores compare.

    `boot_id` and `pid_started` are "" where the kernel does not tell them.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: str
    task_id: str
    run_id: str

    def to_text(self) -> str:
        """Return the owner as JSON."""
        return (
            f"{_process_text(self.host, self.boot_id, self.pid_namespace, self.pid, self.pid_started)},"
            f'"task_id":{json.dumps(self.task_id)},"run_id":{json.dumps(self.run_id)}}}'
        )

    @classmethod
    def from_text(cls, text: str) -> Owner:
        """Read what `to_text` wrote.

        Raises:
            ValueError: The text is no owner.
        """
        try:
            return cls(**json.loads(text))
        except TypeError as exc:
            raise ValueError(f"no owner of a claim: {text!r}") from exc


@lru_cache(maxsize=4)
def _process_text(host: str, boot_id: str, pid_namespace: str, pid: int, pid_started: str) -> str:
    """Return the JSON of a process, which is the same for all its runs, without the closing bracket."""
    values = {"host": host, "boot_id": boot_id, "pid_namespace": pid_namespace, "pid": pid, "pid_started": pid_started}
    return json.dumps(values, separators=(",", ":"))[:-1]


@dataclass(frozen=True, slots=True)
class _Process:
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: str


def new_owner(task_id: str, *, run_id: str | None = None) -> Owner:
    """Return the owner for a run of the task `task_id` in this process. Thread-safe, right after a fork too.

    Args:
        run_id: That of a try of the same run which has ended without an answer; None: it is a new run.
    """
    global _this_process
    process = _this_process
    if process is None or process.pid != os.getpid():
        process = _this_process = _read_this_process()
    return Owner(
        host=process.host,
        boot_id=process.boot_id,
        pid_namespace=process.pid_namespace,
        pid=process.pid,
        pid_started=process.pid_started,
        task_id=task_id,
        run_id=run_id or os.urandom(16).hex(),
    )


def is_provably_gone(owner: Owner) -> bool:
    """Say whether the process of `owner` has ended, as seen from this process; False whenever that is not certain."""
    here = _this_process if _this_process is not None and _this_process.pid == os.getpid() else _read_this_process()
    if not owner.boot_id or not owner.pid_started or not owner.pid_namespace:
        return False
    # Containers of one machine share host name (if configured so) and boot, but not PIDs: the namespace tells them
    # apart.
    if (owner.host, owner.boot_id, owner.pid_namespace) != (here.host, here.boot_id, here.pid_namespace):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # Alive but not ours to signal.
    state, started = _read_state(owner.pid)
    if not started:
        return False
    return started != owner.pid_started or (state in "ZX" and _only_its_leader_is_left(owner.pid))


_this_process: _Process | None = None


def _read_this_process() -> _Process:
    pid = os.getpid()
    try:
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        pid_namespace = str((_PROC / "self/ns/pid").readlink())
    except OSError:
        boot_id = pid_namespace = ""
    return _Process(socket.gethostname(), boot_id, pid_namespace, pid, _read_state(pid)[1])


def _read_state(pid: int) -> tuple[str, str]:
    """Return the state letter and the start time (clock ticks since boot) of `pid`, "" and "" if unknown."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return "", ""
    # The name in brackets may hold blanks and brackets itself; the fields after the last one are regular (proc(5)).
    values = stat.rpartition(")")[2].split()
    return (values[0], values[19]) if len(values) > 19 else ("", "")


def _only_its_leader_is_left(pid: int) -> bool:
    """A killed process that its parent has not waited for yet: nothing of it can run any more."""
    try:
        return len(list((_PROC / str(pid) / "task").iterdir())) == 1
    except OSError:
        return False
