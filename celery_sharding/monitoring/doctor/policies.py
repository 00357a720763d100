"""What policies do to the queues and exchanges of a group; no broker.

The broker applies to each queue the policy with the highest priority whose pattern matches its name, and also the
operator policy found in the same way. Only its statistics say which, and they come late and may be off. So that is
worked out here from the policies themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery_sharding.config import ShardGroup
from celery_sharding.monitoring.doctor.finding import Finding, Severity
from celery_sharding.monitoring.health import name_some
from celery_sharding.topology import DELIVERY_LIMIT, Names

_FIX = (
    "exclude names that begin with 'shards.' from its pattern, or add a policy of higher priority that matches them "
    "(`celery shards export` writes one)"
)
_OPERATOR_FIX = "exclude names that begin with 'shards.' from its pattern"
# What `apply-to` may say, by the type of a queue, beside "all" and "queues".
_APPLY_TO = {"classic": "classic_queues", "quorum": "quorum_queues", "stream": "streams"}

Judgement = tuple[Severity, str, str]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy, or an operator policy, of the virtual host."""

    name: str
    pattern: str
    apply_to: str
    priority: int
    definition: Mapping[str, Any]
    operator: bool

    def fits(self, name: str, kinds: Sequence[str]) -> bool:
        """Tell whether it may apply to `name`, which is of one of `kinds`, as `apply-to` calls them."""
        try:
            return self.apply_to in ("all", *kinds) and re.search(self.pattern, name) is not None
        except re.error:  # the broker's expressions know a little more than Python's
            return False

    @property
    def label(self) -> str:
        return f"{'operator policy' if self.operator else 'policy'} {self.name!r}"


def read_policies(answer: Any, *, operator: bool) -> Iterator[Policy]:
    """Yield the policies in an answer of the management API."""
    for each in answer if isinstance(answer, list) else ():
        definition = each.get("definition")
        yield Policy(
            name=str(each.get("name")),
            pattern=str(each.get("pattern", "")),
            apply_to=str(each.get("apply-to", "all")),
            priority=int(each.get("priority") or 0),
            definition=definition if isinstance(definition, Mapping) else {},
            operator=operator,
        )


def check_policies(
    group: ShardGroup,
    queues: Iterable[Mapping[str, Any]],
    policies: Sequence[Policy],
    *,
    consumer_timeout_seconds: float,
) -> Iterator[Finding]:
    """Yield what is wrong with the policies that apply to the group; one finding for all queues with the same fault.

    Args:
        queues: Of the group, as the management API lists them.
        consumer_timeout_seconds: The broker's, as the app is configured.
    """
    found: dict[Judgement, list[str]] = {}
    for queue in queues:
        name, kind = str(queue.get("name")), _APPLY_TO.get(str(queue.get("type")), "queues")
        for policy in _applied(policies, name, ("queues", kind)):
            for judgement in _judge_queue(group, queue, policy, consumer_timeout_seconds):
                found.setdefault(judgement, []).append(name)
    names = Names(group.name)
    for exchange in (names.publish, names.next, names.unrouted):
        for policy in _applied(policies, exchange, ("exchanges",)):
            for judgement in _judge_exchange(names, exchange, policy):
                found.setdefault(judgement, []).append(exchange)
    for (severity, text, fix), where in found.items():
        yield Finding(severity, "policies", f"{name_some(where)}: {text}", fix)
    if not found:
        yield Finding("ok", "policies", "none expires, drops, limits or moves messages of the group")


def _applied(policies: Sequence[Policy], name: str, kinds: Sequence[str]) -> Iterator[Policy]:
    """Yield the policy and the operator policy that apply to `name`; of equal priorities all, since any may win."""
    for operator in (False, True):
        fitting = [each for each in policies if each.operator is operator and each.fits(name, kinds)]
        highest = max((each.priority for each in fitting), default=0)
        yield from (each for each in fitting if each.priority == highest)


def _judge_queue(
    group: ShardGroup, queue: Mapping[str, Any], policy: Policy, consumer_timeout_seconds: float
) -> Iterator[Judgement]:
    names, name, which, definition = Names(group.name), queue.get("name"), policy.label, policy.definition
    fix = _OPERATOR_FIX if policy.operator else _FIX
    if queue.get("type") == "stream":
        limits = [key for key in ("max-age", "max-length-bytes") if key in definition]
        if limits and name == names.manifest:
            text = f"{which} sets {' and '.join(limits)}: the manifest may forget records that a worker has not read"
            yield "error", text, fix
        elif limits:
            yield "warning", f"{which} sets {' and '.join(limits)}: attempts and history may be forgotten sooner", fix
        return
    for key in ("message-ttl", "expires"):
        if key in definition:
            yield "error", f"{which} sets {key}: messages are dropped, so keys have gaps", fix
    for key in ("max-length", "max-length-bytes"):
        if key in definition:
            yield _judge_limit(queue, f"{which} sets {key}", definition, fix)
    limit = definition.get("delivery-limit")
    if isinstance(limit, int) and 0 <= limit < DELIVERY_LIMIT:
        severity: Severity = "error" if limit <= group.max_attempts else "warning"
        yield (
            severity,
            f"{which} sets delivery-limit {limit}: a message that was requeued so often is dead-lettered",
            fix,
        )
    timeout = definition.get("consumer-timeout")
    if isinstance(timeout, int) and timeout < consumer_timeout_seconds * 1_000:
        text = f"{which} sets consumer-timeout {timeout / 1_000:g} s; the app expects {consumer_timeout_seconds:g} s"
        yield "error", text, f"set sharding_consumer_timeout_seconds = {timeout / 1_000:g}, or raise the policy's"
    if _federates(definition):
        yield "error", f"{which} federates it: messages come from elsewhere, out of order", fix


def _judge_limit(queue: Mapping[str, Any], sets: str, definition: Mapping[str, Any], fix: str) -> Judgement:
    arguments = queue.get("arguments") or {}
    if (arguments.get("x-overflow") or definition.get("overflow")) == "reject-publish":
        return "warning", f"{sets}: a publisher gets an error when the queue is that full", fix
    return "error", f"{sets}: the oldest messages are dropped when the queue is that full", fix


def _judge_exchange(names: Names, exchange: str, policy: Policy) -> Iterator[Judgement]:
    fix = _OPERATOR_FIX
    # The others have theirs as an argument, which comes before a policy's.
    if "alternate-exchange" in policy.definition and exchange == names.unrouted:
        yield "error", f"{policy.label} sets an alternate exchange: what no limbo takes is lost there", fix
    if _federates(policy.definition):
        yield "error", f"{policy.label} federates it: messages go elsewhere, or come from there", fix


def _federates(definition: Mapping[str, Any]) -> bool:
    return any(str(key).startswith("federation") for key in definition)
