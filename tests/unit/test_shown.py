"""How the command line writes durations and tables; no broker."""

from __future__ import annotations

from dataclasses import replace

import pytest

from celery_sharding.cli.exits import WrongUsage
from celery_sharding.cli.output import align, format_duration, parse_duration
from celery_sharding.cli.rows import DEFAULT_COLUMNS, describe_group, read_columns
from celery_sharding.monitoring.status import GroupStatus
from support.rows import NOW, ROW


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1h", 3_600), ("1h30m", 5_400), ("0.5", 0.5), ("0", 0)]
)
def test_durations_are_read_as_people_write_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "5x", "m5", "-5", "1m2h", "1.5m", "nan", "inf", "1e3", "s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(WrongUsage, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (3_600, "1h00m"),
        (86_399, "23h59m"),
        (86_400, "1d00h"),
        (-3, "0s"),
    ],
)
def test_durations_are_short(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("owner", "standby"), [("x" * 60, "y" * 60), ("a@b", "y" * 90), ("x" * 90, "b@c")])
def test_long_names_do_not_break_a_terminal_of_120_columns(owner, standby):
    rows = tuple(replace(ROW, index=index, owner=owner, standbys=(standby, "z")) for index in range(3))
    group = GroupStatus("orders", declared=True, generation=1, shards=rows)

    lines = describe_group(group, DEFAULT_COLUMNS, now=NOW, width=120)

    assert max(map(len, lines)) <= 120
    assert lines[2].endswith("1m00s")
    assert " +1 " not in lines[2][:60]
    assert (owner in lines[2]) == (len(owner) < 10)
    # And what is no terminal gets them whole
    assert owner in describe_group(group, DEFAULT_COLUMNS, now=NOW, width=None)[2]


def test_columns_are_those_of_the_json_and_the_nearest_is_named():
    assert read_columns("index, lag_seconds") == ("index", "lag_seconds")
    with pytest.raises(WrongUsage, match=r"'lag_second' \(did you mean 'lag_seconds'"):
        read_columns("index,lag_second")
    with pytest.raises(WrongUsage, match="is empty"):
        read_columns(",")


def test_a_name_that_somebody_wrote_cannot_break_a_table_nor_drive_the_terminal():
    assert align(("KEY", "N"), [("a\x1b[2J\nb\ud800", "1")], numeric={1}) == ["KEY       N", "a [2J b   1"]
