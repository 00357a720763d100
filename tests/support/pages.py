"""Does what a page of the documentation says, block by block, as a reader would.

    ```python   with `# name.py` as its first line: written to that file; else run in a process of its own
    ```sh       each line is run; a `celery … worker`, `exporter` or `flower` goes on in the background to the end of
                its `##` section
    ```text     what the block before it printed; `…` stands for anything
    ```json     parsed
    ```         a picture: nothing to run

What a page calls `orders`, `events` and `evt-` gets names of its own, and its brokers and "redis://" are the
servers under test. What is not run is listed in `NOT_RUN`, with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from celery_sharding.testing.processes import wait_until
from support.paths import ROOT

LANGUAGES = frozenset({"python", "sh", "text", "json", ""})
NOT_RUN = {
    "docker": "needs a Docker engine, and has tests of its own; that the files exist is checked",
    "deploy/compose/make-env": "writes into the project, and has tests of its own",
    "make": "takes minutes and has tests of its own; that the target exists is checked",
    "pip": "installs packages; that the extras exist is checked",
    "rabbitmq-plugins": "changes the broker, on whose machine it must run",
    "sudo": "changes the system; that the files exist is checked",
    "kubectl": "changes a cluster; that the files exist is checked",
}
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_STEP = re.compile(rf"{_FENCE.pattern}|^## (?P<heading>[^\n]*)$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (?P<name>[\w/.-]+\.(?:py|json))\n")
_STEP_SECONDS = 150.0


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `line` is that of its first line in the page. A heading has the language "##"."""

    language: str
    text: str
    line: int


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks and section headings of a page, in their order."""
    source = page.read_text()
    blocks = []
    for found in _STEP.finditer(source):
        line = source.count("\n", 0, found.start()) + 1
        if found["heading"] is not None:
            blocks.append(Block("##", found["heading"], line))
        else:
            blocks.append(Block(found["language"], found["text"], line + 1))
    fences = len(re.findall(r"^\s*```", source, re.MULTILINE))
    assert fences == 2 * sum(block.language != "##" for block in blocks), f"{page}: a block is not read"
    return blocks


class Reader:
    """Follows one page in a folder of its own.

    Args:
        folder: Where its files go and its commands run.
        names: What stands in the page, as a regular expression → what the reader has in its place.
        commands: A folder of commands that come before those of the system.
    """

    def __init__(self, folder: Path, names: dict[str, str], commands: Path) -> None:
        self._folder = folder
        self._names = names
        path = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
        self._env = {**os.environ, "PATH": os.pathsep.join(path)}
        self._workers: list[subprocess.Popen[bytes]] = []
        self._started = 0
        self._printed = ""

    def take_folder(self, source: Path) -> None:
        """Copy the files beside a page."""
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.suffix in (".py", ".json") and "__pycache__" not in path.parts:
                self._write(str(path.relative_to(source)), self._own(path.read_text()))

    def follow(self, page: Path) -> None:
        """Do everything that `page` says."""
        for block in read_blocks(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            if block.language == "##":
                self.stop_workers()
            elif block.language == "python":
                self._follow_python(self._own(block.text), where)
            elif block.language == "sh":
                self._printed = ""
                for line in self._own(block.text).replace("\\\n", " ").splitlines():
                    self._follow_command(line, where)
            elif block.language == "text":
                self._compare(self._own(block.text), where)
            elif block.language == "json":
                json.loads(block.text)
            else:
                assert block.language in LANGUAGES, f"{where}: nobody runs {block.language!r}"

    def stop_workers(self) -> None:
        """Stop warm what still runs."""
        for worker in self._workers:
            if worker.poll() is None:
                os.kill(worker.pid, signal.SIGTERM)
        for worker in self._workers:
            worker.wait(_STEP_SECONDS)
        self._workers.clear()

    def kill_workers(self) -> None:
        """End what still runs, at once."""
        for worker in self._workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait(10)

    def _own(self, text: str) -> str:
        for name, own in self._names.items():
            text = re.sub(name, lambda _, own=own: own, text)
        return text

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def _follow_python(self, text: str, where: str) -> None:
        named = _FILE.match(text)
        if named:
            self._write(named["name"], text)
            compile(text, where, "exec")
            return
        self._printed = self._run([sys.executable, "-c", text], where)

    def _follow_command(self, line: str, where: str) -> None:
        words = shlex.split(line, comments=True)
        if not words:
            return
        if words[0] in NOT_RUN:
            check_command(words, where)
        elif words[0] == "celery" and "worker" in words:
            self._start_worker(words, where)
        elif words[0] == "celery" and "exporter" in words:
            self._start(words, where, until="/metrics")
        elif words[0] == "celery" and "flower" in words:
            self._start(words, where, until="Connected to")
        else:
            self._printed += self._run(["bash", "-euc", line], where)

    def _run(self, command: list[str], where: str) -> str:
        done = subprocess.run(
            command, cwd=self._folder, env=self._env, capture_output=True, text=True, timeout=_STEP_SECONDS
        )
        assert done.returncode == 0, f"{where}: {command[-1]}\n{done.stdout}\n{done.stderr}\n{self._logs()}"
        return done.stdout

    def _start_worker(self, words: list[str], where: str) -> None:
        if "-n" not in words:
            words = [*words, "-n", f"worker{self._started}@docs"]
        self._start([*words, "-l", "info"], where, until=" ready.")

    def _start(self, words: list[str], where: str, *, until: str) -> None:
        """Start what goes on in the background, and return when it has printed `until`."""
        self._started += 1
        log = self._folder / f"worker{self._started}.log"
        with log.open("wb") as output:
            worker = subprocess.Popen(
                words,
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._workers.append(worker)
        wait_until(lambda: until in log.read_text() or worker.poll() is not None, timeout_seconds=40)
        assert until in log.read_text(), f"{where}: {shlex.join(words)}\n{log.read_text()}"

    def _compare(self, expected: str, where: str) -> None:
        lines = [_squeeze(line) for line in expected.splitlines() if line.strip()]
        pattern = "".join(r"(?:.*\n)*" if line == "…" else _line_pattern(line) for line in lines)
        printed = "".join(_squeeze(line) + "\n" for line in self._printed.splitlines() if line.strip())
        assert re.fullmatch(pattern, printed), f"{where}: the page shows\n{expected}\nbut it is\n{self._printed}"

    def _logs(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(self._folder.glob("worker*.log")))


def check_command(words: list[str], where: str) -> None:
    """Check a command that is not run: that the targets, extras and files which it names exist."""
    for word in words[1:]:
        if word.startswith("deploy/"):
            assert list(ROOT.glob(word)), f"{where}: there is no {word}"
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words[1:]:
            assert word in targets or "=" in word, f"{where}: the Makefile has no target {word}"
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            for extra in name.split(","):
                assert extra in extras, f"{where}: there is no extra {extra}"
    elif words[0] == "docker":
        for option, file in pairwise(words):
            assert option != "-f" or (ROOT / file).is_file(), f"{where}: there is no file {file}"


def _squeeze(line: str) -> str:
    return " ".join(line.split())


def _line_pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.split("…")) + r"\n"
