"""Which of the redelivered messages of one worker run side by side; what follows from it is said by `policy`."""

from __future__ import annotations

import threading
from collections import deque

from celery_sharding.worker.redelivery.policy import Begin, Company, Decision, History, decide
from celery_sharding.worker.run.delivery import IN_POOL, Delivery, State

_ON_ITS_WAY = (State.HELD, State.READY, State.RUNNING)


class Suspects:
    """The suspects of one worker. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[
            Delivery, bool
        ] = {}  # to whether it is its last chance; those let in are counted from then on
        self._let_in: set[Delivery] = set()
        self._waiting: deque[tuple[Delivery, bool]] = deque()

    def decide(self, delivery: Delivery, history: History) -> Decision:
        """Decide what becomes of a suspect that is in the pool; one that begins counts from now on."""
        with self._lock:
            self._forget_ended()
            is_let_in = delivery in self._let_in
            decision = decide(history, Company() if is_let_in else self._company())
            if isinstance(decision, Begin):
                self._let_in.discard(delivery)
                self._running[delivery] = history.is_last_chance
            return decision

    def wait(self, delivery: Delivery, history: History) -> None:
        """Keep a suspect, which is held now, until `take_ready` returns it."""
        with self._lock:
            self._waiting.append((delivery, history.is_last_chance))

    def take_ready(self) -> list[Delivery]:
        """Let those in that may begin now, in the order in which they came, and return them."""
        if not self._waiting:
            return []
        ready: list[Delivery] = []
        with self._lock:
            self._forget_ended()
            while self._waiting and not any(self._running.values()):
                delivery, is_last_chance = self._waiting[0]
                if is_last_chance and self._running:
                    break
                self._waiting.popleft()
                self._running[delivery] = is_last_chance
                self._let_in.add(delivery)
                ready.append(delivery)
        return ready

    def _company(self) -> Company:
        is_last_chance = any(self._running.values()) or any(is_last for _, is_last in self._waiting)
        return Company(is_any=bool(self._running), is_last_chance=is_last_chance)

    def _forget_ended(self) -> None:
        self._let_in = {delivery for delivery in self._let_in if delivery.state in _ON_ITS_WAY}
        self._running = {
            delivery: is_last
            for delivery, is_last in self._running.items()
            if delivery.state in IN_POOL or delivery in self._let_in
        }
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0].state is State.HELD)
