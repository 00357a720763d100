"""Who holds a claim, and whether that process is provably gone.

An owner is one run of one task in one process. It identifies its process by host, kernel boot, PID namespace, PID and
the start time of that PID, so that another process of the same machine can tell "it is gone" from "I cannot see it".
Only the kernel's word counts; in doubt the holder is alive, and its lease decides. Without `/proc`, nobody is ever
provably gone.
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
    """One run of one task. `run_id` is new for each run and is the token that stores compare.

    `boot_id`, `pid_namespace` and `pid_started` are "" if they are not known.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: str
    task_id: str
    run_id: str

    def to_text(self) -> str:
        return (
            f"{_process_text(self.host, self.boot_id, self.pid_namespace, self.pid, self.pid_started)},"
            f'"task_id":{json.dumps(self.task_id)},"run_id":{json.dumps(self.run_id)}}}'
        )

    @classmethod
    def from_text(cls, text: str) -> Owner:
        """Read what `to_text` wrote.

        Raises:
            ValueError: The text is not one.
        """
        try:
            return cls(**json.loads(text))
        except TypeError as exc:
            raise ValueError(f"not an owner of a claim: {text!r}") from exc


@lru_cache(maxsize=4)
def _process_text(host: str, boot_id: str, pid_namespace: str, pid: int, pid_started: str) -> str:
    """Return the JSON of a process, the same for all its runs, without the closing bracket."""
    values = {"host": host, "boot_id": boot_id, "pid_namespace": pid_namespace, "pid": pid, "pid_started": pid_started}
    return json.dumps(values, separators=(",", ":"))[:-1]


# What an owner says of its process: host, boot id, PID namespace, PID and when that PID was started.
_Process = tuple[str, str, str, int, str]


def new_owner(task_id: str, *, run_id: str | None = None) -> Owner:
    """Return the owner for a run of the task `task_id` in this process. Thread-safe, right after a fork too.

    Args:
        run_id: That of an earlier try of the same run, which got no answer; None: it is a new run.
    """
    return Owner(*_get_this_process(), task_id, run_id or os.urandom(16).hex())


def is_provably_gone(owner: Owner) -> bool:
    """Say whether the process of `owner` has ended, as seen from this process; False if that is not certain."""
    host, boot_id, pid_namespace, _, _ = _get_this_process()
    if not owner.boot_id or not owner.pid_started or not owner.pid_namespace:
        return False
    # Containers of one machine may share host name and boot, but not PIDs: the namespace tells them apart.
    if (owner.host, owner.boot_id, owner.pid_namespace) != (host, boot_id, pid_namespace):
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


def _get_this_process() -> _Process:
    global _this_process
    pid = os.getpid()
    if _this_process is None or _this_process[3] != pid:
        try:
            boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
            pid_namespace = str((_PROC / "self/ns/pid").readlink())
        except OSError:
            boot_id = pid_namespace = ""
        _this_process = (socket.gethostname(), boot_id, pid_namespace, pid, _read_state(pid)[1])
    return _this_process


def _read_state(pid: int) -> tuple[str, str]:
    """Return the state letter and the start time (clock ticks since boot) of `pid`; "" and "" if unknown."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return "", ""
    # The name in brackets may contain blanks and brackets; the fields after the last bracket are regular (proc(5)).
    values = stat.rpartition(")")[2].split()
    return (values[0], values[19]) if len(values) > 19 else ("", "")


def _only_its_leader_is_left(pid: int) -> bool:
    """Say whether a zombie has no other thread left, so that nothing of it can run any more."""
    try:
        return len(list((_PROC / str(pid) / "task").iterdir())) == 1
    except OSError:
        return False
