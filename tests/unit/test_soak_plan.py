"""The plan of faults: a pure function of the seed that never asks for what cannot be."""

from __future__ import annotations

from itertools import pairwise

import pytest

from celery_sharding.layout.events import RESHARD
from celery_sharding.layout.switch import STEPS
from soak.plan import GROUPS, HEARTBEAT_SECONDS, NODE_KINDS, NODES, SHARDS_MAX, Kind, plan_faults

SEEDS = range(200)


def test_a_seed_has_one_plan_and_another_seed_another() -> None:
    assert plan_faults(7, 10) == plan_faults(7, 10)
    assert plan_faults(7, 10) != plan_faults(8, 10)


def test_every_kind_of_fault_happens_within_ten_minutes() -> None:
    assert {fault.kind for fault in plan_faults(9, 10)} == set(Kind)


def test_only_the_kinds_that_were_asked_for_happen() -> None:
    kinds = {Kind.KILL, Kind.CUT}
    assert {fault.kind for fault in plan_faults(7, 10, kinds=kinds)} == kinds


@pytest.mark.parametrize("minutes", [0.4, 3.0])
def test_faults_stand_in_their_order_and_are_over_at_the_end(minutes: float) -> None:
    for seed in SEEDS:
        plan = plan_faults(seed, minutes)
        assert plan
        assert [fault.at_seconds for fault in plan] == sorted(fault.at_seconds for fault in plan)
        assert all(fault.at_seconds > 0 and fault.at_seconds + fault.seconds <= minutes * 60 + 0.01 for fault in plan)


def test_nobody_is_hit_while_an_earlier_fault_is_upon_them() -> None:
    for seed in SEEDS:
        over: dict[str, float] = {}
        for fault in plan_faults(seed, 5, workers=2, publishers=1):
            assert fault.at_seconds >= over.get(fault.victim, 0.0) - 0.01, (seed, fault)
            over[fault.victim] = fault.at_seconds + fault.seconds


def test_targets_are_those_that_the_soak_has() -> None:
    for seed in SEEDS:
        for fault in plan_faults(seed, 3, workers=2, publishers=1):
            if fault.kind is Kind.JOIN:
                assert int(fault.target[1:]) > 2
            elif fault.kind is Kind.CUT_PUBLISHER:
                assert fault.target == "p1"
            elif fault.kind in (Kind.DELETE_RING, Kind.RESHARD):
                assert fault.target in GROUPS
            elif fault.kind in (Kind.RESTART_BROKER, Kind.KILL_BROKER):
                assert fault.target == "broker"
            elif fault.kind in NODE_KINDS:
                assert fault.target in NODES
            elif fault.kind is Kind.STOP_STORE:
                assert fault.target == "store"
            else:
                assert fault.target in ("w1", "w2")


def test_a_pause_is_shorter_than_what_makes_a_worker_count_as_gone() -> None:
    pauses = [fault for fault in plan_faults(7, 60) if fault.kind is Kind.PAUSE]
    assert pauses
    assert all(fault.seconds < HEARTBEAT_SECONDS for fault in pauses)


def test_only_one_node_of_a_cluster_is_missing_at_a_time() -> None:
    plan = plan_faults(7, 60, kinds=NODE_KINDS)
    assert {fault.target for fault in plan} == set(NODES)
    assert all(later.at_seconds >= fault.at_seconds + fault.seconds for fault, later in pairwise(plan))


def test_reshards_ask_for_every_number_of_shards_and_die_at_every_step_or_none() -> None:
    plan = plan_faults(7, 120, kinds=[Kind.RESHARD])
    assert {fault.shards for fault in plan} == set(range(1, SHARDS_MAX + 1))
    assert {fault.dies_after for fault in plan} == {None, *range(1, len(STEPS[RESHARD]) + 1)}
    alive = sum(fault.dies_after is None for fault in plan)
    assert 0.4 < alive / len(plan) < 0.6


def test_workers_are_killed_while_a_group_is_resharded() -> None:
    plan = plan_faults(7, 10, kinds=[Kind.RESHARD, Kind.KILL])
    pairs = [(fault, later) for fault, later in pairwise(plan) if later.at_seconds - fault.at_seconds < 1.0]
    assert any((fault.kind, later.kind) == (Kind.RESHARD, Kind.KILL) for fault, later in pairs)


def test_a_burst_has_one_to_four_faults() -> None:
    # Given faults that are never in each other's way
    plan = plan_faults(7, 10, workers=50, kinds=[Kind.CUT])
    # When they are counted by burst, which takes three seconds at most
    sizes = []
    begun = -10.0
    for fault in plan:
        if fault.at_seconds - begun > 3.1:
            begun = fault.at_seconds
            sizes.append(0)
        sizes[-1] += 1
    # Then there are all sizes, and no other
    assert set(sizes) == {1, 2, 3, 4}
