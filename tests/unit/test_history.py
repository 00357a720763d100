"""The manifest told as a history: one entry for what was done, in words."""

from __future__ import annotations

from typing import Any

from celery_sharding.layout.events import Drained, Operated, Reached
from celery_sharding.monitoring.history import describe_history, to_json
from celery_sharding.topology import Names

ORDERS = Names("orders")


class Manifest:
    """Events as they stand in a manifest, each built on the last that counts unless it says otherwise."""

    def __init__(self) -> None:
        self.events: list[tuple[int, dict[str, Any]]] = []
        self._last = -1

    def write(self, event: str, *, by: str = "w1@test", base: int | None = None, **facts: Any) -> None:
        offset = 2 * len(self.events)  # there are nonces between them
        self.events.append(
            (offset, {"event": event, "base": self._last if base is None else base, "by": by, "at": 1.0, **facts})
        )
        self._last = offset if base is None else self._last

    def note(self, fact: dict[str, Any]) -> None:
        self.events.append((2 * len(self.events), fact))

    def begin(self) -> None:
        """Write what a group's first worker writes."""
        self.write("created", limbo=1)
        self.write("switch", kind="recover", generation=1, shards=2, limbo=1, next_limbo=2)
        for step in range(1, 8):
            self.write("step", generation=1, step=step)
        self.write("switched", generation=1)
        self.write("ended", segment="limbo001")
        self.note(Drained("limbo001", ORDERS.limbo(1), by="w1@test").as_dict())

    def told(self) -> list[tuple[str, str, str]]:
        return [(entry.by, entry.what, entry.result) for entry in describe_history("orders", self.events)]


def test_steps_are_the_outcome_of_their_switch_and_a_segment_is_drained_once():
    manifest = Manifest()
    manifest.begin()

    assert manifest.told() == [
        ("w1@test", "exchanges and logs declared; what cannot be routed goes to limbo001", "done"),
        ("w1@test", "first generation, 2 shards", "done"),
        ("w1@test", "limbo001 ended: its queues got their end markers", "done"),
        ("w1@test", "limbo001 drained: nothing of it is left to run", "done"),
    ]


def test_a_switch_says_how_far_it_is_and_who_carried_it_on():
    # Given a reshard that was begun
    manifest = Manifest()
    manifest.begin()
    manifest.write("switch", by="ann@test", kind="reshard", generation=2, shards=3)
    assert manifest.told()[-1] == ("ann@test", "from 2 to 3 shards, generation 2", "under way, at step 0 of 5")
    # When somebody else goes on with it, then its entry says so, and stays one
    manifest.write("step", by="w2@test", generation=2, step=3)
    assert manifest.told()[-1][2] == "under way, at step 3 of 5, carried on by w2@test"
    manifest.write("switched", by="w2@test", generation=2)
    assert manifest.told()[-1][2] == "done, carried on by w2@test"
    # When the old ring is drained, queue by queue, then that is said when nothing is left of it
    manifest.write("ended", segment="g001")
    before = len(manifest.told())
    manifest.note(Drained("g001", ORDERS.shard(1, 0), by="w1@test").as_dict())
    manifest.note(Reached("g001", ORDERS.shard(1, 1), keys=("d",), by="w2@test").as_dict())
    assert len(manifest.told()) == before
    manifest.note(Drained("g001", ORDERS.shard(1, 1), by="w2@test").as_dict())
    manifest.write("removed", segment="g001")
    assert [what for _, what, _ in manifest.told()[before:]] == [
        "g001 drained: nothing of it is left to run",
        "g001 removed: its queues are deleted",
    ]


def test_a_reshard_that_goes_on_as_a_recovery_is_two_entries():
    manifest = Manifest()
    manifest.begin()
    manifest.write("switch", kind="reshard", generation=2, shards=3)
    manifest.write("switch", kind="recover", generation=2, shards=3, limbo=2, next_limbo=3, step=5)
    manifest.write("switched", generation=2)

    assert [result for _, _, result in manifest.told()[-2:]] == ["went on as a recovery", "done"]


def test_what_operators_did_is_told_and_what_came_too_late_is_void():
    # Given a pause, one that was decided at the same time, and a note
    manifest = Manifest()
    manifest.begin()
    was = manifest.events[-2][0]
    manifest.write("pause", by="ann@test", shard=1)
    manifest.write("pause", by="bob@test", shard=1, base=was)
    manifest.note(Operated("replay", by="ann@test", result="3 dead letters\x1b[2J replayed\nof 3").as_dict())
    manifest.write("resume", by="ann@test", shard=None)
    manifest.write("renamed", by="new@test", to="x")
    # Then each is told, in a line that a terminal can show
    assert manifest.told()[-5:] == [
        ("ann@test", "orders/1 paused", "done"),
        ("bob@test", "orders/1 paused", "void: the group had changed meanwhile"),
        ("ann@test", "replay", "3 dead letters [2J replayed of 3"),
        ("ann@test", "orders resumed", "done"),
        ("new@test", "renamed (this version does not know it)", "done"),
    ]


def test_an_operation_that_was_cut_short_is_told_as_begun():
    # Given two operators who begin the same, of whom one is killed
    manifest = Manifest()
    for operation in ("x", "y"):
        manifest.note(Operated("replay", by="ann@test", result="begun", operation=operation).as_dict())
    manifest.note(Operated("replay", by="ann@test", result="3 of 3 done", operation="y").as_dict())
    # Then each is an entry
    assert manifest.told() == [("ann@test", "replay", "begun"), ("ann@test", "replay", "3 of 3 done")]


def test_programs_are_given_moments_in_utc():
    manifest = Manifest()
    manifest.write("created", limbo=1)
    (entry,) = to_json("orders", describe_history("orders", manifest.events))["entries"]

    assert entry == {
        "offset": 0,
        "at": "1970-01-01T00:00:01.000Z",
        "by": "w1@test",
        "event": "created",
        "what": "exchanges and logs declared; what cannot be routed goes to limbo001",
        "result": "done",
    }
