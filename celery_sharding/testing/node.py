"""What the private servers have in common: in a `with` block they are started, and removed at its end.

new ─start─▶ running ─stop | kill─▶ stopped ─start─▶ running … ─remove─▶ gone
             running ─pause─▶ connected, and silent ─resume─▶ running
"""

from __future__ import annotations

import shutil
import signal
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from celery_sharding.testing.processes import ServerNotReady, end_process, kill_process, read_pid, send_signal, tail

_STOP_SECONDS = 30.0


class Node(ABC):
    """A server, or several, whose whole life is a `with` block."""

    @abstractmethod
    def start(self) -> None:
        """Start it and return when it answers."""

    @abstractmethod
    def remove(self) -> None:
        """Kill it if it runs, and delete its data."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class ServerNode(Node):
    """One server process, whose data, log and process id are in `folder`."""

    process_name: str
    folder: Path
    url: str

    @abstractmethod
    def answers(self) -> bool:
        """Say whether it serves clients."""

    def stop(self) -> None:
        """Stop it as an operator would."""
        pid = self._pid()
        if pid is not None:
            end_process(pid, grace_seconds=_STOP_SECONDS)

    def kill(self) -> None:
        """Kill it (SIGKILL), as a crash of its machine would; what it wrote to disk is kept."""
        pid = self._pid()
        if pid is not None:
            kill_process(pid)

    def pause(self) -> None:
        """Halt it (SIGSTOP): its connections stay open, and nothing answers, as on a machine that hangs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause` (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Stop it, start it on the same data and ports, and return when it answers."""
        self.stop()
        self.start()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def output(self) -> str:
        """What it has logged."""
        return "\n".join(path.read_text(errors="replace") for path in self._logs())

    def log_tail(self) -> str:
        return "\n".join(tail(path) for path in self._logs())

    def _logs(self) -> list[Path]:
        """Return its log files, the one that was written last at the end."""
        logs = [path for path in (self.folder / "log").glob("*") if path.suffix in ("", ".log")]
        return sorted(logs, key=lambda path: path.stat().st_mtime)

    def _pid(self) -> int | None:
        return read_pid(self.folder, self.process_name)

    def _signal(self, number: int) -> None:
        pid = self._pid()
        if pid is None:
            raise ServerNotReady(f"the server on {self.url} does not run")
        send_signal(pid, number)
