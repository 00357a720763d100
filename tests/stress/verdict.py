"""What the logs of claimers say: never two holders of a key, never two commits of it within its time to live.

A claim is the store's to give only when the one before it, by fencing token, has ended: it was given up, or its lease
may have lapsed, or its process had died; or it was committed, and its result may have expired. Times are those before
and after each call, so what is reported cannot be explained by the time that a call took.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from stress.claimer import Terms

Line = dict[str, Any]


def read_logs(folder: Path) -> Iterator[Line]:
    for path in sorted(folder.glob("*.log")):
        for text in path.read_text().splitlines():
            yield json.loads(text)


def count(lines: Iterable[Line]) -> Counter[str]:
    """Return how often each thing happened; what the store refused has a name of its own."""
    return Counter(line["what"] if line.get("ok", True) else f"{line['what']} refused" for line in lines)


def find_violations(lines: Iterable[Line], terms: Terms) -> Iterator[str]:
    """Yield each violation in words."""
    keys: defaultdict[str, list[Line]] = defaultdict(list)
    for line in lines:
        keys[line["key"]].append(line)
    lease, ttl = terms.lease_seconds - terms.slack_seconds, terms.ttl_seconds - terms.slack_seconds
    for key, of_key in keys.items():
        for violation in _judge(of_key, lease, ttl):
            yield f"{key}: {violation}"


def _judge(lines: list[Line], lease: float, ttl: float) -> Iterator[str]:
    by_token: defaultdict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_token[line["token"]].append(line)
    claims = sorted((line for line in lines if line["what"] == "claim"), key=lambda line: line["fencing"])
    committed = {line["token"] for line in lines if line["what"] == "commit" and line["ok"]}
    for first, second in pairwise(claims):
        if first["fencing"] == second["fencing"]:
            yield f"two claims have the fencing token {first['fencing']}"
        if second["to"] < first["from"]:
            yield f"the fencing token goes back, from {first['fencing']} to {second['fencing']}"
        if not _had_ended(first, by_token[first["token"]], second, lease, ttl):
            yield f"{second['token']} got the claim while {first['token']} held it, or its result"
        for commit in by_token[first["token"]]:
            if commit["what"] == "commit" and commit["ok"] and commit["from"] > second["to"]:
                yield f"{first['token']} could commit after {second['token']} had the claim"
    for line in lines:
        # The commit of who died before it could write that down is not in any log; such a process says so before.
        if line["what"] == "done" and line["token"] not in committed:
            yield f"the result of {line['token']} was returned, who had not committed"
    commits = sorted((line for line in lines if line["what"] == "commit" and line["ok"]), key=lambda line: line["from"])
    for first, second in pairwise(commits):
        if second["to"] < first["from"] + ttl:
            yield f"{first['token']} and {second['token']} have both committed"


def _had_ended(claim: Line, lines: list[Line], next_claim: Line, lease: float, ttl: float) -> bool:
    """Say whether `claim`, with all `lines` of its token, may have been over before `next_claim` was given."""
    at = next_claim["to"]
    held_from = claim["from"]
    for line in lines:
        if line["what"] == "commit" and line["ok"] and line["from"] <= at:
            return bool(at >= line["from"] + ttl)
        if line["what"] == "die" and line["from"] <= at:
            return True
        if line["what"] == "release" and line["ok"] and line["from"] <= at:
            return True
        if line["what"] == "park" and line["ok"] and line["from"] <= at and next_claim["task"] == claim["task"]:
            return True
        if line["what"] in ("renew", "park") and line["ok"] and line["to"] < at:
            held_from = max(held_from, line["from"])
    return bool(at >= held_from + lease)
