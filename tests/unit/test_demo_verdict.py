"""The demo's judgement and its input: without these its verdict would prove nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from demo.effects import judge
from demo.events import BadEvents, plan_sends, read_events

SENT = ["e0", "e1", "e2", "e3"]


def test_effects_in_the_order_of_the_publishes_are_clean():
    # Given two keys, each in order, side by side in another order than they were published
    verdict = judge([("b", "e1", 1), ("a", "e0", 0), ("a", "e2", 2), ("b", "e3", 3)], SENT)
    # Then there is nothing to say against them
    assert verdict.is_clean
    assert verdict.events == 4


def test_an_event_without_an_effect_is_lost():
    verdict = judge([("a", "e0", 0), ("a", "e2", 2), ("b", "e3", 3)], SENT)
    assert (verdict.lost, verdict.out_of_order, verdict.duplicated) == (1, 0, 0)


def test_an_effect_behind_a_later_one_of_its_key_is_out_of_order():
    verdict = judge([("a", "e2", 2), ("a", "e0", 0), ("b", "e1", 1), ("b", "e3", 3)], SENT)
    assert (verdict.lost, verdict.out_of_order, verdict.duplicated) == (0, 1, 0)
    assert verdict.example == "key a: event e0 (sent as no. 0) after e2 (2)"


def test_a_second_effect_is_duplicated_and_no_disorder():
    verdict = judge([("a", "e0", 0), ("b", "e1", 1), ("a", "e2", 2), ("a", "e0", 0), ("b", "e3", 3)], SENT)
    assert (verdict.lost, verdict.out_of_order, verdict.duplicated) == (0, 0, 1)


def test_each_event_is_sent_one_to_three_times_in_the_order_of_first_publishes(tmp_path: Path):
    # Given 200 events
    path = tmp_path / "events.csv"
    path.write_text("account,event\n" + "".join(f"k{number % 7},e{number}\n" for number in range(200)))
    events = read_events(path, key="account", name="event", limit=0)
    # When the sends are planned
    sends = plan_sends(events)
    # Then the first copies are in the order of the file, and all numbers of copies occur
    assert [event for event, copy in sends if copy == 0] == events
    assert set(Counter(event.name for event, _ in sends).values()) == {1, 2, 3}


def test_json_lines_are_read_by_their_own_columns_and_repeated_ids_once(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"who": 7, "uid": "x"}\n\n{"who": 8, "uid": "y"}\n{"who": 7, "uid": "x"}\n')
    events = read_events(path, key="who", name="uid", limit=10)
    assert [(event.account, event.name, event.position) for event in events] == [("7", "x", 0), ("8", "y", 1)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "account,id\nk,1\n", "there is no column 'event'; there are account, id"),
        ("a.csv", "account,event\n,1\n", "line 2: 'account' is ''"),
        ("a.csv", "account,event\n", "has no events"),
        ("a.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", '{"account": true, "event": "1"}\n', "'account' is True"),
        ("a.jsonl", "{\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_replayed_is_refused_with_its_line(tmp_path: Path, name: str, text: str, said: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadEvents, match=said):
        read_events(tmp_path / name, key="account", name="event", limit=0)
