"""The reference pages name everything that exists, with its real default, and no page links to nowhere."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from celery_sharding import ShardGroup, deduplicate, errors
from celery_sharding.config import Settings
from celery_sharding.topology import Names
from support.paths import ROOT

REFERENCE = ROOT / "docs" / "reference"
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
# What no queue can promise, and this library does not.
UNTRUE = ("exactly once", "exactly-once")


def _rows(page: str) -> dict[str, str]:
    """Return the first cell of each table row of a reference page → the second, without backticks."""
    cells = re.findall(r"^\| [–\s]*`([^`]+)`[^|]*\| ([^|]*) \|", (REFERENCE / page).read_text(), re.MULTILINE)
    return {name: value.strip("` ") for name, value in cells}


def test_the_reference_names_every_error_and_no_other() -> None:
    exist = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.ShardingError)
    }
    assert set(_rows("errors.md")) == exist


def test_the_reference_names_every_option_of_a_group_with_its_default() -> None:
    rows = _rows("settings.md")
    for option in fields(ShardGroup):
        if option.name != "name":
            assert rows[option.name] == ("needed" if option.default is MISSING else _as_text(option.default))


def test_the_reference_names_every_setting_with_its_default() -> None:
    rows = _rows("settings.md")
    for setting in fields(Settings):
        default = "{}" if setting.name in ("groups", "routes") else repr(setting.default)
        assert rows[f"sharding_{setting.name}"] == default


def test_the_reference_names_every_option_of_deduplicate_with_its_default() -> None:
    rows = _rows("settings.md")
    for option in inspect.signature(deduplicate).parameters.values():
        if option.name != "function":  # of the decorator without parentheses
            assert rows[option.name] == repr(option.default)


def test_the_reference_names_everything_on_the_broker() -> None:
    rows = _rows("names-on-the-broker.md")
    names = Names("orders")
    properties = {getattr(names, name) for name, value in vars(Names).items() if isinstance(value, property)}
    assert {*properties, names.ring(1), names.shard(1, 0), names.limbo(1)} <= set(rows)


def test_the_readme_is_short_and_leads_to_every_page_of_the_documentation() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    pages = [str(page.relative_to(ROOT)) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if f"]({page})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" not in target:
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in _anchors(found), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_promises_what_cannot_be_kept(page: Path) -> None:
    assert not [words for words in UNTRUE if words in page.read_text().lower()]


def _anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _as_text(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
