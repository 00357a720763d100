"""Private servers for the claim stores: databases, Memcached, variants of Redis. Free ports of 127.0.0.1 only.

Each keeps its data in a temporary folder and leaves nothing behind. Missing packages are installed if that is allowed.
Some of them refuse to run as root; all then run as nobody, since the users whom the packages make are there only once
these are installed.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from celery_sharding.testing import ServerNotReady
from celery_sharding.testing.processes import exchange_bytes, find_free_port, tail, wait_until
from support.programs import find_program

_USER_OF_ROOT = "nobody"
_START_SECONDS = 60.0


class Server:
    """A private server; started on entry, killed and removed on exit."""

    package: str
    env: dict[str, str] = {}  # noqa: RUF012  # never changed

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"sharding-{self.package}-"))
        self.log = self.folder / "server.log"
        self.port = find_free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Make what the server needs before its start."""

    def command(self) -> list[str]:
        """Return the command that runs the server in the foreground."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Say whether the server serves."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the server and return when it answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | self.env, start_new_session=True, preexec_fn=_end_with_parent, **self._as_user(),
            )  # fmt: skip
        wait_until(lambda: self.answers() or self._has_ended(), timeout_seconds=_START_SECONDS)
        if not self.answers():
            raise ServerNotReady(f"{self.package} does not answer on port {self.port}\n{tail(self.log)}")

    def kill(self) -> None:
        """Kill the server (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def run(self, *command: str) -> None:
        """Run one of the package's programs as the user who runs the server."""
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, **self._as_user()
        )
        if done.returncode:
            raise ServerNotReady(f"{command[0]}: {done.stdout}\n{done.stderr}")

    def __enter__(self) -> Self:
        try:
            self.give_away(self.folder)
            self.prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def give_away(self, path: Path) -> None:
        """Let the server's user have what root has made."""
        if os.geteuid() == 0:
            shutil.chown(path, _USER_OF_ROOT, pwd.getpwnam(_USER_OF_ROOT).pw_gid)

    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _as_user(self) -> dict[str, object]:
        if os.geteuid() != 0:
            return {}
        return {"user": _USER_OF_ROOT, "group": pwd.getpwnam(_USER_OF_ROOT).pw_gid, "extra_groups": []}


class Postgres(Server):
    package = "postgresql"

    def prepare(self) -> None:
        self.url = f"postgresql+psycopg://sharding@127.0.0.1:{self.port}/postgres"
        initdb = find_program("initdb", package=self.package, folders=["/usr/lib/postgresql/*/bin"])
        self._bin = Path(initdb).parent
        data = str(self.folder / "data")
        self.run(initdb, "-D", data, "-U", "sharding", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")

    def command(self) -> list[str]:
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        return [str(self._bin / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), *options]

    def answers(self) -> bool:
        ready = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port), "-U", "sharding"]
        return subprocess.run(ready, stdin=subprocess.DEVNULL, check=False).returncode == 0


class MariaDB(Server):
    package = "mariadb-server"
    # A zone whose clocks are put back in autumn, when local times come twice.
    env = {"TZ": "CET-1CEST,M3.5.0,M10.5.0/3"}  # noqa: RUF012

    def prepare(self) -> None:
        self.url = f"mysql+pymysql://sharding@127.0.0.1:{self.port}/claims"
        self._program = find_program("mariadbd", package=self.package)
        (self.folder / "init.sql").write_text(
            "CREATE DATABASE claims;\nCREATE USER sharding@'127.0.0.1';\nGRANT ALL ON *.* TO sharding@'127.0.0.1';\n"
        )
        self.run(
            find_program("mariadb-install-db", package=self.package), "--no-defaults", f"--datadir={self.folder}/data",
            f"--tmpdir={self.folder}", "--skip-test-db", "--auth-root-authentication-method=normal",
        )  # fmt: skip

    def command(self) -> list[str]:
        return [
            self._program, "--no-defaults", f"--datadir={self.folder}/data", f"--socket={self.folder}/socket",
            f"--pid-file={self.folder}/pid", f"--init-file={self.folder}/init.sql", "--bind-address=127.0.0.1",
            f"--port={self.port}", "--skip-name-resolve", f"--tmpdir={self.folder}",  # not that of other servers
            "--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync",
        ]  # fmt: skip

    def answers(self) -> bool:
        # The server greets whoever connects: length, number, protocol 10, version.
        return exchange_bytes(self.port, b"")[4:5] == b"\x0a"


class Memcached(Server):
    package = "memcached"

    def __init__(self, *options: str) -> None:
        super().__init__()
        self._options = options

    def prepare(self) -> None:
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"cache+memcached://{self.address}/"
        self._program = find_program("memcached", package=self.package)

    def command(self) -> list[str]:
        return [self._program, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", *self._options]

    def answers(self) -> bool:
        return exchange_bytes(self.port, b"version\r\n").startswith(b"VERSION")


class Redis(Server):
    """A Redis with further options; with `--replicaof`, a replica."""

    package = "redis-server"

    def __init__(self, *options: str) -> None:
        super().__init__()
        self._options = options
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        listen = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        return [find_program("redis-server", package=self.package), *listen, *self._options]

    def answers(self) -> bool:
        return exchange_bytes(self.port, b"PING\r\n").startswith(b"+PONG")


class ClusterRedis(Redis):
    """A Redis with cluster mode on, one node that has all slots: it refuses what touches keys of different slots."""

    def __init__(self) -> None:
        super().__init__("--cluster-enabled", "yes", "--cluster-port", str(find_free_port()))

    def start(self) -> None:
        super().start()
        exchange_bytes(self.port, b"CLUSTER ADDSLOTSRANGE 0 16383\r\n")
        if not wait_until(lambda: b"cluster_state:ok" in self._info(), timeout_seconds=_START_SECONDS):
            raise ServerNotReady(f"the cluster on port {self.port} is not complete: {self._info()!r}")

    def _info(self) -> bytes:
        return exchange_bytes(self.port, b"CLUSTER INFO\r\n")


class Sentinel(Redis):
    """A sentinel that watches a primary and a replica of its own, under the name "claims"."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = ExitStack()

    def prepare(self) -> None:
        self.primary = self.nodes.enter_context(Redis())
        self.replica = self.nodes.enter_context(Redis("--replicaof", "127.0.0.1", str(self.primary.port)))
        self.backend = f"sentinel://127.0.0.1:{self.port}/0"
        lines = [
            f"bind 127.0.0.1\nport {self.port}\ndir {self.folder}",
            f"sentinel monitor claims 127.0.0.1 {self.primary.port} 1",
            "sentinel down-after-milliseconds claims 500\nsentinel failover-timeout claims 5000\n",
        ]
        (self.folder / "sentinel.conf").write_text("\n".join(lines))
        self.give_away(self.folder / "sentinel.conf")

    def command(self) -> list[str]:
        return [find_program("redis-server", package=self.package), str(self.folder / "sentinel.conf"), "--sentinel"]

    def answers(self) -> bool:
        """Say whether it answers, and knows a replica that has all of the primary's data."""
        state = b"flags\r\n$5\r\nslave\r\n"
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as link:
            link.sendall(b"SENTINEL REPLICAS claims\r\n")
            return state in link.recv(4_096)
        return False

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.nodes.close()


def _end_with_parent() -> None:
    """Let the kernel kill the new server when the tests are killed, as a time limit of pytest does (prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
