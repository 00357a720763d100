"""The heartbeat file by itself; what workers make of it is tested with workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_sharding.errors import ConfigurationError
from celery_sharding.worker.liveness_file import HeartbeatFile


def test_workers_with_one_setting_have_files_of_their_own(tmp_path: Path) -> None:
    # Given a path with the parts of a node's name
    files = [HeartbeatFile(f"{tmp_path}/%n.on.%h", node=f"{name}@here") for name in ("first", "second")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.on.here", "second.on.here"]
    # When one worker ends, then the other's file stays
    files[0].end()
    assert [path.name for path in tmp_path.iterdir()] == ["second.on.here"]


@pytest.mark.parametrize("name", ["no-such-directory/file", "%x", ".", "\0"])
def test_a_path_that_is_none_is_an_error_that_names_the_setting(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="sharding_heartbeat_file"):
        HeartbeatFile(f"{tmp_path}/{name}", node="first@here")
