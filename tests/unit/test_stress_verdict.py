"""What the verdict of a stress sees."""

from __future__ import annotations

import pytest

from stress.claimer import Terms
from stress.verdict import find_violations


def judge(*lines: dict[str, object]) -> list[str]:
    return list(find_violations([{"key": "k", **line} for line in lines], Terms()))


def line(what: str, token: str, at: float, **facts: object) -> dict[str, object]:
    return {"what": what, "token": token, "from": at, "to": at + 0.01, **facts}


def claim(token: str, at: float, fencing: int, task: str = "t") -> dict[str, object]:
    return line("claim", token, at, fencing=fencing, task=task)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([claim("a", 1, 1), claim("b", 1.5, 2)], "b got the claim while a held it"),
        ([claim("a", 1, 1), line("renew", "a", 1.9, ok=True), claim("b", 2.5, 2)], "b got the claim while a held it"),
        ([claim("a", 1, 1), line("commit", "a", 1.1, ok=True), claim("b", 2.5, 2)], "b got the claim while a held it"),
        ([claim("a", 1, 1), line("park", "a", 1.1, ok=True), claim("b", 1.5, 2, "u")], "b got the claim while a held"),
        ([claim("a", 1, 1), claim("b", 3, 2), line("commit", "a", 4, ok=True)], "a could commit after b had the claim"),
        ([claim("a", 3, 1), claim("b", 1, 2)], "the fencing token goes back"),
        ([claim("a", 1, 1), claim("b", 3, 1)], "two claims have the fencing token 1"),
        ([line("commit", "a", 1, ok=True), line("commit", "b", 2, ok=True)], "a and b have both committed"),
        ([line("done", "a", 1)], "the result of a was returned"),
    ],
)
def test_the_verdict_names_what_must_not_be(lines: list[dict[str, object]], complaint: str) -> None:
    assert any(complaint in violation for violation in judge(*lines)), judge(*lines)


@pytest.mark.parametrize(
    "lines",
    [
        [claim("a", 1, 1), claim("b", 2, 2), line("commit", "a", 3, ok=False), line("commit", "b", 3, ok=True)],
        [claim("a", 1, 1), line("die", "a", 1.1), claim("b", 1.2, 2)],
        [claim("a", 1, 1), line("release", "a", 1.1, ok=True), claim("b", 1.2, 2)],
        [claim("a", 1, 1), line("park", "a", 1.1, ok=True), claim("b", 1.2, 2)],
        [claim("a", 1, 1), line("commit", "a", 1.5, ok=True), line("done", "a", 2), claim("b", 3.5, 2)],
    ],
)
def test_the_verdict_accepts_what_may_be(lines: list[dict[str, object]]) -> None:
    assert judge(*lines) == []
