"""The wheels of releases: each is what it is called, and its workers run what the present code declares and sends."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from celery import Celery

import celery_sharding
from celery_sharding import ShardGroup, Sharding
from celery_sharding.testing import Trace, WorkerNode, check_order

pytestmark = pytest.mark.timeout(120)

HERE = Path(__file__).resolve().parent
VERSIONS = ("0.1.0",)
POOLS = {"prefork": ("-c", "4"), "threads": ("-c", "4", "-P", "threads"), "solo": ("-P", "solo")}
_WHO_IS_THERE = """
import importlib.metadata, celery_sharding
print(importlib.metadata.version("celery-sharding"), celery_sharding.__version__, celery_sharding.__file__)
"""


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def release(version: str, tmp_path: Path) -> Path:
    """A folder that holds a release, unpacked."""
    wheel = HERE / f"celery_sharding-{version}-py3-none-any.whl"
    if not wheel.exists():
        pytest.fail(f"{wheel.relative_to(HERE.parents[1])} is missing; its README says how it is made", pytrace=False)
    folder = tmp_path / "release"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def env(group_name: str, broker_url: str, tmp_path: Path) -> dict[str, str]:
    return {"KEPT_GROUP": group_name, "KEPT_BROKER": broker_url, "KEPT_TRACE": str(tmp_path / "trace")}


def prefer(folder: Path) -> dict[str, str]:
    """Return what lets a process import from `folder` first, before what is installed and the folder it runs in."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]), "PYTHONSAFEPATH": "1"}


def test_a_kept_wheel_is_the_version_that_it_is_called(release: Path, version: str, tmp_path: Path) -> None:
    # When a process of its own imports it
    done = subprocess.run(
        [sys.executable, "-c", _WHO_IS_THERE],
        env=os.environ | prefer(release), cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    # Then package and metadata are of that version, and nothing of the present code is in the way
    assert done.stdout.split() == [version, version, str(release / "celery_sharding" / "__init__.py")]


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_of_a_release_runs_in_order_what_the_present_code_declares_and_sends(
    release: Path, version: str, pool: str, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a group that the present code declares
    command = [sys.executable, "-m", "celery", "-A", "kept_shop", "shards", "declare"]
    present = Path(celery_sharding.__file__).parents[1]
    subprocess.run(command, env=os.environ | env | prefer(present), check=True, capture_output=True)
    # And what it has published there
    app = Celery("publisher", broker=env["KEPT_BROKER"], set_as_current=False)
    app.conf.sharding_routes = {"kept_shop.*": {"group": env["KEPT_GROUP"], "key": "key"}}
    Sharding(app, groups=[ShardGroup(env["KEPT_GROUP"], shards=4)])
    published = [(f"k{number % 6}", number) for number in range(120)]
    for key, number in published[:60]:
        app.send_task("kept_shop.step", kwargs={"key": key, "number": number})
    # When a worker of the release runs, and more is published
    monkeypatch.chdir(tmp_path)  # Celery imports from where it runs
    trace = Trace(env["KEPT_TRACE"])
    with WorkerNode(
        "kept_shop", f"kept-{pool}@{env['KEPT_GROUP']}", POOLS[pool], env=env | prefer(release), folder=tmp_path
    ):
        for key, number in published[60:]:
            app.send_task("kept_shop.step", kwargs={"key": key, "number": number})
        assert trace.wait_for(len(published)), check_order(trace, published)
    # Then it is the release that has run all of it, in order and once
    assert trace.count(f"by {version}") == len(published)
    assert check_order(trace, published).is_clean, check_order(trace, published)
