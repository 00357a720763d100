"""Celery workers as real processes that can be stopped, killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from celery_sharding.testing.processes import ServerNotReady, tail, wait_until


class WorkerNode:
    """One `celery worker` process and its pool.

    Args:
        app: The argument of `celery -A`.
        name: Node name; unique among the workers of a broker.
        arguments: Of `celery worker`.
        env: Added to the environment.
        folder: Of its log.
    """

    def __init__(
        self,
        app: str,
        name: str,
        arguments: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        folder: Path,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", "celery", "-A", app, "worker", "-n", name, "-l", "info", *arguments]
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the main process.

        Raises:
            ServerNotReady: It was not started.
        """
        if self._process is None:
            raise ServerNotReady(f"worker {self.name} was not started")
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has logged since its last start."""
        return self.log.read_text(errors="replace")[self._log_start :] if self.log.exists() else ""

    def start(self, *, wait_seconds: float = 40.0) -> Self:
        """Start it, and return when it is ready; at once if `wait_seconds` is 0."""
        self._log_start = len(self.log.read_text(errors="replace")) if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        if wait_seconds:
            self.wait_for(" ready.", timeout_seconds=wait_seconds)
        return self

    def wait_for(self, text: str, *, timeout_seconds: float = 40.0) -> None:
        """Wait until its log contains `text`.

        Raises:
            ServerNotReady: It does not, or the worker ended; the message has the end of the log.
        """
        if not wait_until(lambda: text in self.output or not self.is_running, timeout_seconds=timeout_seconds) or (
            text not in self.output
        ):
            raise ServerNotReady(f"worker {self.name}: no {text!r} in its log:\n{tail(self.log, lines=40)}")

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, *, timeout_seconds: float = 60.0) -> int:
        """Shut it down warmly and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_seconds=timeout_seconds)

    def wait(self, *, timeout_seconds: float = 60.0) -> int:
        """Wait for its end and return its exit status."""
        if self._process is None:
            return 0
        return self._process.wait(timeout_seconds)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the main process and its whole pool at once."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(10)

    def children(self) -> list[int]:
        """Return the process ids of its pool."""
        result = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.pid:
                result.append(int(stat.parent.name))
        return sorted(result)
