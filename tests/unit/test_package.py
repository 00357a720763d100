"""The package itself: what its import costs, its version, what is in the wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import celery_sharding
from support.paths import ROOT

_WATCHED_IMPORT = """
import json, sys
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event in ("socket.connect", "subprocess.Popen") else None)
import celery_sharding
print(json.dumps({"modules": sorted({name.partition(".")[0] for name in sys.modules}), "events": seen}))
"""


def _import_in_a_new_process() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", _WATCHED_IMPORT], check=True, stdout=subprocess.PIPE, cwd=ROOT)
    seen: dict[str, list[str]] = json.loads(done.stdout)
    return seen


def test_the_import_loads_no_broker_backend_or_web_library():
    # Given a new process, when it imports the package
    modules = _import_in_a_new_process()["modules"]
    # Then nothing heavy came with it
    heavy = {"amqp", "celery", "click", "django", "flower", "kombu", "prometheus_client", "redis", "sqlalchemy"}
    assert heavy.isdisjoint(modules)


def test_the_import_connects_nowhere_and_starts_nothing():
    assert _import_in_a_new_process()["events"] == []


def test_an_unknown_name_is_an_ordinary_attribute_error():
    assert not hasattr(celery_sharding, "Shardin")


def test_the_version_stands_in_one_place():
    # Given that the project file names no version of its own
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    # Then the installed distribution has that of the package
    assert metadata.version("celery-sharding") == celery_sharding.__version__


def test_celery_finds_the_commands():
    (entry,) = [entry for entry in metadata.entry_points(group="celery.commands") if entry.name == "shards"]
    assert entry.value == "celery_sharding.cli:shards"


def test_the_wheel_is_typed_and_holds_the_package_only(tmp_path: Path):
    # When a wheel is built
    names = zipfile.ZipFile(build_wheel(ROOT, tmp_path)).namelist()
    # Then type checkers will look into it, and tests and examples stay out
    assert "celery_sharding/py.typed" in names
    for asset in (ROOT / "celery_sharding" / "flower").glob("*/*.*"):
        assert asset.suffix == ".pyc" or str(asset.relative_to(ROOT)) in names
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"celery_sharding"}


def test_the_same_sources_make_the_same_wheel_wherever_and_whenever(tmp_path: Path):
    # Given a copy of the sources, whose files are new, elsewhere
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT / "celery_sharding", copy / "celery_sharding", ignore=shutil.ignore_patterns("__pycache__"),
        copy_function=shutil.copyfile,
    )  # fmt: skip
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    # When a wheel is built of both
    wheels = [build_wheel(sources, tmp_path / name) for sources, name in ((ROOT, "here"), (copy, "there"))]
    # Then they are the same, byte by byte
    assert wheels[0].name == wheels[1].name
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


def build_wheel(sources: Path, folder: Path) -> Path:
    """Build as `make dist` does, and return the wheel."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=sources, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (wheel,) = folder.glob("*.whl")
    return wheel
