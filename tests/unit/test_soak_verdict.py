"""The verdict of a soak: strict, but for what a fault explains at its time and of its worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from celery_sharding.testing import Trace
from soak.plan import HEARTBEAT_SECONDS, Kind
from soak.verdict import (
    ALL_WORKERS,
    UNTOLD_REASON,
    VIOLATIONS,
    Findings,
    Incident,
    Letter,
    Note,
    Pace,
    is_clean,
    judge,
    measure_pace,
)

Judge = Callable[..., Findings]


@pytest.fixture
def judged(tmp_path: Path) -> Judge:
    """Judge marks of the group "keys", (kind, number, worker/run, at), all of one key."""

    def act(
        marks: Iterable[tuple[str, int, str, float]],
        *incidents: Incident,
        confirmed: Iterable[int] = (),
        notes: Iterable[Note] = (),
        entries: Iterable[tuple[str, int]] = (),
        letters: Iterable[int] = (),
        buried: Iterable[Letter] = (),
        group: str = "keys",
    ) -> Findings:
        trace = Trace(tmp_path / f"{group}.trace")
        trace.path.write_text("".join(json.dumps([kind, "a", *rest]) + "\n" for kind, *rest in marks))
        told = [Note("confirmed", group, "a", number, 0.0) for number in confirmed]
        unexplained = [Letter(group, "a", number, "its reason") for number in letters]
        return judge({group: trace}, entries, [*told, *notes], incidents, [*unexplained, *buried])

    return act


def run(number: int, name: str, began: float, ended: float) -> list[tuple[str, int, str, float]]:
    return [("start", number, name, began), ("end", number, name, ended)]


def counted(findings: Findings) -> dict[str, int]:
    told = {"published", "ended", "unknown", "unknown that ran"}
    return {name: number for name, number in findings.counts.items() if number and name not in told}


def test_messages_that_ran_once_and_in_order_are_clean(judged: Judge) -> None:
    findings = judged(run(1, "w1/1", 1, 2) + run(2, "w2/1", 3, 4), confirmed=[1, 2])
    assert is_clean(findings)
    assert (findings.counts["published"], findings.counts["ended"]) == (2, 2)


def test_a_confirmed_message_that_never_ended_is_lost(judged: Judge) -> None:
    findings = judged([("start", 1, "w1/1", 1.0)], confirmed=[1])
    assert counted(findings) == {"lost": 1}
    assert not is_clean(findings)
    assert "number 1" in findings.examples["lost"]


def test_a_dead_letter_is_not_lost_but_fails_the_soak_with_its_reason(judged: Judge) -> None:
    findings = judged(run(1, "w1/1", 1, 2), confirmed=[1, 2, 3], letters=[2])
    assert counted(findings) == {"dead letters": 1, "lost": 1}
    assert findings.examples["dead letters"] == "its reason"
    assert "number 3" in findings.examples["lost"]


@pytest.mark.parametrize("kind", [Kind.CUT_BACKEND, Kind.BLACKHOLE_BACKEND, Kind.STOP_STORE])
def test_a_run_whose_end_cannot_be_stored_may_come_again_or_be_a_dead_letter(judged: Judge, kind: Kind) -> None:
    target = ALL_WORKERS if kind is Kind.STOP_STORE else "w1"
    away, killed = Incident(kind, target, 10.0, 15.0), Incident(Kind.KILL, "w1", 20.0, 21.0)
    twice = run(1, "w1/1", 11, 12) + run(1, "w2/1", 22, 23)
    # Held until the worker was killed
    assert counted(judged(twice, away, killed, confirmed=[1])) == {"repeated, in flight at a hard fault": 1}
    # Without the kill, or without the outage, nothing explains it
    assert counted(judged(twice, away, confirmed=[1])) == {"repeated": 1}
    assert counted(judged(twice, killed, confirmed=[1])) == {"repeated": 1}
    # And a dead letter that says so is explained while the backend is away
    for at, name in ((20.0, "dead letters, end not stored"), (60.0, "dead letters")):
        letter = Letter("keys", "a", 1, "its reason", UNTOLD_REASON, at)
        assert counted(judged(run(1, "w1/1", 11, 12), away, buried=[letter], confirmed=[1])) == {name: 1}
    other = Letter("keys", "a", 1, "its reason", "failed: ValueError", 20.0)
    assert counted(judged(run(1, "w1/1", 11, 12), away, buried=[other], confirmed=[1])) == {"dead letters": 1}


def test_a_claim_that_could_not_be_written_explains_that_its_run_came_again(judged: Judge) -> None:
    twice = run(1, "w1/1", 100.0, 100.1) + run(1, "w1/2", 110.0, 110.1)
    for kind, target in ((Kind.CUT_BACKEND, "w1"), (Kind.BLACKHOLE_BACKEND, "w1"), (Kind.STOP_STORE, ALL_WORKERS)):
        # Given a run that only its claim makes one, and that ended while the claim could not be written
        away = Incident(kind, target, 99.0, 104.0)
        explained = judged(twice, away, group="once")
        assert counted(explained) == {"repeated, claim not written": 1}
        assert is_clean(explained)
        # But not later, nor on another worker, nor a row of the ledger or a run without a claim
        assert counted(judged(twice, Incident(kind, target, 90.0, 95.0), group="once")) == {"repeated": 1}
        assert counted(judged(twice, away, group="keys")) == {"repeated": 1}
        assert counted(judged(twice, away, group="ledger")) == {"repeated": 1}
    elsewhere = Incident(Kind.CUT_BACKEND, "w2", 99.0, 104.0)
    assert counted(judged(twice, elsewhere, group="once")) == {"repeated": 1}


def test_a_message_of_which_nobody_knows_is_not_lost(judged: Judge) -> None:
    notes = [Note("unknown", "keys", "a", number, 0.0) for number in (1, 2)]
    findings = judged(run(1, "w1/1", 1, 2), notes=notes)
    assert is_clean(findings)
    assert (findings.counts["unknown"], findings.counts["unknown that ran"]) == (2, 1)


def test_a_start_behind_a_later_one_is_out_of_order_whatever_happened(judged: Judge) -> None:
    everything = [Incident(kind, "w1", 0.0, 10.0) for kind in Kind]
    findings = judged(run(2, "w1/1", 1, 2) + run(1, "w1/2", 3, 4), *everything, confirmed=[1, 2])
    assert counted(findings) == {"out of order": 1}
    assert not is_clean(findings)


def test_a_repetition_is_explained_by_a_hard_fault_of_its_worker_at_its_time(judged: Judge) -> None:
    twice = run(1, "w1/1", 100.0, 100.1) + run(1, "w2/1", 103.0, 103.1)
    # Given a kill of the worker that ran it first, just after it had ended
    explained = judged(twice, Incident(Kind.KILL, "w1", 100.2, 100.3))
    assert counted(explained) == {"repeated, in flight at a hard fault": 1}
    assert is_clean(explained)
    # Or a restart of the broker
    assert is_clean(judged(twice, Incident(Kind.RESTART_BROKER, "broker", 99.0, 105.0)))
    # But no kill of another worker, none long after, and no fault that loses nothing
    for incident in (
        Incident(Kind.KILL, "w2", 100.2, 100.3),
        Incident(Kind.KILL, "w1", 120.0, 120.1),
        Incident(Kind.STOP, "w1", 100.0, 101.0),
        Incident(Kind.PAUSE, "w1", 100.0, 103.0),
        Incident(Kind.DELETE_RING, "keys", 100.0, 101.0),
        Incident(Kind.RESHARD, "keys", 100.0, 101.0),
    ):
        assert counted(judged(twice, incident)) == {"repeated": 1}, incident


def test_a_worker_that_stood_still_when_it_was_killed_had_acknowledged_nothing_since(judged: Judge) -> None:
    twice = run(1, "w1/1", 100.0, 100.1) + run(1, "w2/1", 110.0, 110.1)
    kill = Incident(Kind.KILL_BROKER, "broker", 104.0, 106.0)
    assert not is_clean(judged(twice, kill))
    assert is_clean(judged(twice, kill, Incident(Kind.PAUSE, "w1", 100.0, 104.0)))


def test_each_further_end_of_a_message_is_judged_by_the_one_before(judged: Judge) -> None:
    thrice = run(1, "w1/1", 100, 100.1) + run(1, "w2/1", 103, 103.1) + run(1, "w3/1", 150, 150.1)
    findings = judged(thrice, Incident(Kind.KILL, "w1", 100.2, 100.3))
    assert counted(findings) == {"repeated, in flight at a hard fault": 1, "repeated": 1}


def test_a_half_open_link_explains_overlaps_for_some_heartbeats_only(judged: Judge) -> None:
    beside = [
        ("start", 1, "w1/1", 100.0),
        ("start", 1, "w2/1", 101.0),
        ("end", 1, "w1/1", 102.0),
        ("end", 1, "w2/1", 103.0),
    ]
    stall = Incident(Kind.STALL, "w1", 95.0, 101.0)
    assert counted(judged(beside, stall)) == {"overlapping, half-open link": 1, "repeated, half-open link": 1}
    long_ago = Incident(Kind.STALL, "w1", 10.0, 100.0 - 4 * HEARTBEAT_SECONDS)
    for incident in (long_ago, Incident(Kind.STALL, "w2", 95.0, 101.0), Incident(Kind.STOP, "w1", 95.0, 101.0)):
        assert counted(judged(beside, incident)) == {"overlapping": 1, "repeated": 1}, incident


def test_a_cut_explains_the_overlap_of_a_moment(judged: Judge) -> None:
    beside = [("start", 1, "w1/1", 100.0), ("start", 1, "w2/1", 100.02), ("end", 1, "w1/1", 100.03)]
    assert counted(judged(beside, Incident(Kind.CUT, "w1", 100.01, 100.01))) == {"overlapping, moment of a cut": 1}
    assert counted(judged(beside, Incident(Kind.CUT, "w1", 90.0, 90.0))) == {"overlapping": 1}


def test_a_node_that_is_lost_explains_what_ran_then_whoever_ran_it(judged: Judge) -> None:
    beside = [
        *run(1, "w1/1", 100.0, 100.2),
        ("start", 2, "w2/1", 110.0),
        ("start", 2, "w3/1", 110.1),
        ("end", 2, "w2/1", 110.2),
        *run(1, "w3/2", 110.3, 110.4),
    ]
    for kind in (Kind.KILL_NODE, Kind.RESTART_NODE):
        lost = Incident(kind, "broker", 100.1, 100.3), Incident(kind, "broker", 110.0, 110.1)
        assert counted(judged(beside, *lost)) == {
            "repeated, in flight at a hard fault": 1,
            "overlapping, moment of a cut": 1,
        }
    assert counted(judged(beside)) == {"repeated": 1, "overlapping": 1}


def test_the_ledger_is_entered_once_and_in_order_whatever_happened(judged: Judge) -> None:
    everything = [Incident(kind, name, 0.0, 1_000.0) for kind in Kind for name in ("w1", "broker")]
    findings = judged([], *everything, entries=[("a", 1), ("a", 3), ("b", 1), ("a", 2), ("b", 1)])
    assert counted(findings) == {"entered twice": 1, "entered out of order": 1}
    assert not is_clean(findings)


def test_what_is_in_the_ledger_is_not_lost_though_its_run_left_no_end(judged: Judge) -> None:
    marks = [("start", 1, "w1/1", 1.0)]
    assert is_clean(judged(marks, group="ledger", confirmed=[1], entries=[("a", 1)]))
    assert counted(judged(marks, group="ledger", confirmed=[1])) == {"lost": 1}


def test_a_message_that_was_published_twice_on_purpose_counts_once(judged: Judge) -> None:
    findings = judged(run(1, "w1/1", 1, 2), confirmed=[1, 1])
    assert (findings.counts["published"], findings.counts["published twice"]) == (1, 1)
    assert is_clean(findings)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_each_violation_fails_the_soak(name: str) -> None:
    findings = Findings()
    assert is_clean(findings)
    findings.note(name, "an example")
    assert not is_clean(findings)


def test_the_pace_is_measured_from_confirm_to_end(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace")
    marks = [["start", "a", 1, "r", 20.0], ["end", "a", 1, "r", 21.0], ["end", "a", 2, "r", 29.0]]
    trace.path.write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    notes = [Note("confirmed", "keys", "a", 1, 12.0), Note("confirmed", "keys", "a", 2, 28.0)]
    assert measure_pace({"keys": trace}, notes) == Pace(seconds=17.0, slowest_seconds=9.0)
