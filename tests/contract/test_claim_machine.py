"""The claim machine of every store against a simple model: crashes, pauses, lapses, duplicates and late messages.

One key; runs of three tasks claim it and act on it in any order, also long after they lost it. What a run sends may
arrive late, more than once, and after the run has died. The model is a few lines of Python that know no store.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from celery_sharding.dedup.claims import DONE, PARKED, RELEASED, RUNNING, Claimed, Done, Running
from celery_sharding.dedup.owners import Owner, new_owner
from support.store_places import LEASE, TTL, Place

EXAMPLES, STEPS = 60, 50
EXAMPLES_ON_DISK = 12
ACTIONS = st.sampled_from(["renew", "park", "commit", "release"])


@dataclass
class Model:
    """What the store is to know of the key. `now` moves by jumps only; what a test takes does not count."""

    now: float = 0.0
    state: str | None = None
    token: str | None = None
    task: str | None = None
    lapses_at: float = 0.0
    expires_at: float = 0.0

    @property
    def is_absent(self) -> bool:
        return self.state is None or self.expires_at <= self.now

    @property
    def is_held(self) -> bool:
        return self.state in (RUNNING, PARKED) and not self.is_absent and self.lapses_at > self.now

    def lets_in(self, owner: Owner, evict: str | None) -> bool:
        if self.is_absent or self.state == RELEASED:
            return True
        if self.state == DONE:
            return False
        is_own_retry = self.state == PARKED and self.task == owner.task_id
        return not self.is_held or self.token in (owner.run_id, evict) or is_own_retry

    def hold(self, state: str, owner: Owner) -> None:
        self.state, self.token, self.task = state, owner.run_id, owner.task_id
        self.lapses_at = self.now + LEASE
        self.expires_at = self.lapses_at + TTL

    def allows(self, action: str, owner: Owner) -> bool:
        states = {"commit": (RUNNING, DONE), "release": (RUNNING, PARKED)}.get(action, (RUNNING,))
        return not self.is_absent and self.token == owner.run_id and self.state in states

    def apply(self, action: str, owner: Owner) -> None:
        if action == "release":
            self.state, self.token = RELEASED, None
        elif action == "commit":
            self.state, self.expires_at = DONE, self.now + TTL
        else:
            self.hold(PARKED if action == "park" else RUNNING, owner)


class ClaimMachine(RuleBasedStateMachine):
    """Drives one key of the store of `place`, which each test sets."""

    place: Place

    def __init__(self) -> None:
        super().__init__()
        self.store = self.place.store
        self.key = f"machine:{uuid.uuid4().hex}"
        self.model = Model()
        self.runs: list[Owner] = []
        self.dead: list[str] = []
        self.sent: list[tuple[Owner, str]] = []
        self.fencing: dict[str, int] = {}
        self.committed: str | None = None

    # --- what runs do ------------------------------------------------------------------------------------------------

    @rule(task=st.sampled_from(["task-1", "task-2", "task-3"]))
    def a_run_claims(self, task: str) -> None:
        self.claim(new_owner(task), evict=None)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def a_run_evicts_a_dead_one(self, data: Any) -> None:
        """The dead one may have lost the claim already, to somebody who lives."""
        self.claim(new_owner("task-1"), evict=data.draw(st.sampled_from(self.dead)))

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def a_run_asks_again_because_the_answer_was_lost(self, data: Any) -> None:
        run = data.draw(st.sampled_from(self.runs))
        if self.model.allows("renew", run):
            fencing = self.fencing[run.run_id]
            self.claim(run, evict=None)
            assert self.fencing[run.run_id] == fencing
            self.act(run, "renew")
        elif self.model.token != run.run_id:
            self.claim(run, evict=None)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), action=ACTIONS)
    def a_run_acts(self, data: Any, action: str) -> None:
        """Any run, also one that was paused until it had lost its claim."""
        alive = [run for run in self.runs if run.run_id not in self.dead]
        if alive:
            self.act(data.draw(st.sampled_from(alive)), action)

    @precondition(lambda self: self.model.token is not None)
    @rule()
    def the_holder_dies(self) -> None:
        self.dead.append(str(self.model.token))

    @precondition(lambda self: self.model.token is not None)
    @rule(action=ACTIONS)
    def the_holder_acts(self, action: str) -> None:
        self.act(next(run for run in self.runs if run.run_id == self.model.token), action)

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), action=ACTIONS)
    def a_message_is_delayed(self, data: Any, action: str) -> None:
        self.sent.append((data.draw(st.sampled_from(self.runs)), action))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), again=st.booleans())
    def a_delayed_message_arrives(self, data: Any, again: bool) -> None:
        """In any order, and maybe twice."""
        message = data.draw(st.sampled_from(self.sent))
        if not again:
            self.sent.remove(message)
        self.act(*message)

    @precondition(lambda self: self.model.state is not None)
    @rule(seconds=st.sampled_from([LEASE * 0.4] * 3 + [LEASE + 1] * 4 + [10 * TTL]))
    def time_passes(self, seconds: float) -> None:
        self.place.pass_time(self.key, seconds)
        self.model.now += seconds

    @precondition(lambda self: not self.model.is_absent)
    @rule()
    def the_clock_is_set_back(self) -> None:
        self.place.pass_time(self.key, -LEASE * 0.4)
        self.model.now -= LEASE * 0.4

    @rule(force=st.booleans())
    def an_operator_forgets_it(self, force: bool) -> None:
        is_held = self.model.is_held
        assert self.store.forget(self.key, force=force) is (force or not is_held)
        if force or not is_held:
            self.committed = None
            if not self.model.is_absent:
                self.model.state, self.model.token = RELEASED, None
            else:
                self.model.state = None

    # --- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def the_store_shows_what_the_model_says(self) -> None:
        shown = self.store.show(self.key)
        if self.model.is_absent:
            assert shown is None
            return
        assert shown is not None
        assert shown.state == self.model.state
        if self.model.state in (RUNNING, PARKED):
            assert shown.owner is not None
            assert shown.owner.run_id == self.model.token
            assert shown.lease_left_seconds is not None
            assert (shown.lease_left_seconds > 0) is self.model.is_held

    def claim(self, owner: Owner, *, evict: str | None) -> None:
        model, may = self.model, self.model.lets_in(owner, evict)
        if owner not in self.runs:
            self.runs.append(owner)
        outcome = self.store.claim(self.key, owner=owner, lease_seconds=LEASE, ttl_seconds=TTL, evict=evict)
        if may:
            assert isinstance(outcome, Claimed), outcome
            if model.is_absent:
                self.committed = None
            is_again = model.allows("renew", owner)
            assert is_again or outcome.fencing > max(self.fencing.values(), default=0)
            self.fencing[owner.run_id] = outcome.fencing
            model.hold(RUNNING, owner)
        elif model.state == DONE:
            assert isinstance(outcome, Done), outcome
            assert model.token is not None
            assert outcome.result == model.token.encode()
        else:
            assert isinstance(outcome, Running), outcome
            assert (outcome.token, outcome.parked) == (model.token, model.state == PARKED)

    def act(self, run: Owner, action: str) -> None:
        options: dict[str, Any] = {"lease_seconds": LEASE}
        if action == "release":
            options = {}
        elif action == "commit":
            options = {"result": run.run_id.encode(), "ttl_seconds": TTL}
        if self.model.is_absent:
            # A store may still know what has expired, or not; nobody else has claimed it since.
            if self.model.token != run.run_id or self.model.state is None:
                assert not getattr(self.store, action)(self.key, run.run_id, **options)
            return
        is_done = getattr(self.store, action)(self.key, run.run_id, **options)
        assert is_done is self.model.allows(action, run), (action, self.model)
        if not is_done:
            return
        if action == "commit":
            assert self.committed in (None, run.run_id), "two runs have committed"
            self.committed = run.run_id
        self.model.apply(action, run)


def test_a_store_does_what_the_model_says(place: Place) -> None:
    machine = type("Machine", (ClaimMachine,), {"place": place})
    # Databases and files write to the disk at each step.
    is_fast = place.url.startswith(("redis", "cache"))
    examples = EXAMPLES if is_fast else EXAMPLES_ON_DISK
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples, stateful_step_count=STEPS, deadline=None, suppress_health_check=slow),
    )
