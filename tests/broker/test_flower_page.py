"""The page of shards in a real browser: what it shows, that it follows, and that it asks before it acts."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from kombu import Connection

from celery_sharding.monitoring.history import read_history
from celery_sharding.monitoring.snapshot_json import to_json
from celery_sharding.monitoring.status import GroupStatus, ShardStatus, Snapshot
from celery_sharding.testing import FaultProxy
from celery_sharding.testing.processes import wait_until
from support.browser import Browser
from support.flower_server import FlowerServer, Show

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("flower page")]

ROWS = ".shards-group tbody tr"


@pytest.fixture(scope="module")
def flower(show: Show, flowers_broker: FaultProxy) -> Iterator[FlowerServer]:
    with start(show, show.env | {"SHOW_BROKER": flowers_broker.url}) as flower:
        yield flower


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, flower: FlowerServer) -> Browser:
    """The browser with the page of all groups, which has data."""
    browser.open(f"{with_login(flower)}/shards")
    browser.wait_for(lambda page: len(page.texts(ROWS)) == 8)
    return browser


def start(show: Show, env: dict[str, str], *options: str) -> FlowerServer:
    options = ("--basic-auth=ann:secret", "--url-prefix=flower", *options)
    return FlowerServer("shards flower", options, env=env, folder=show.folder, user="ann:secret", prefix="/flower")


def with_login(flower: FlowerServer) -> str:
    """Return Flower's address as somebody types it who is to log in: no script may fetch what begins with it."""
    return flower.url.replace("//", "//ann:secret@", 1)


def owners(flower: FlowerServer) -> list[str | None]:
    return [row["owner"] for row in json.loads(flower.ask("/shards/data").text)["groups"][0]["shards"]]


def column(page: Browser, number: int) -> list[str]:
    return page.texts(f"{ROWS} td:nth-child({number})")


@pytest.mark.parametrize("version", ["installed", "2.0"])
def test_pages_load_without_a_complaint_of_the_browser_light_and_dark(browser, flower, show, version):
    with FlowerServer("shards flower", env=show.env | show.old_flower(), folder=show.folder) as old:
        where = with_login(flower) if version == "installed" else old.url
        browser.complaints()
        shades = []
        for theme in ("light", "dark"):
            browser.open(f"{where}/shards/{show.group}/0", theme=theme)
            browser.wait_for(lambda page: show.workers[0].name in page.text("#shard-consumers"))
            browser.wait_for(lambda page: page.run("return document.querySelectorAll('.shards-line').length") == 2)
            browser.take_picture(f"shard-{version}-{theme}")
            browser.open(f"{where}/shards", theme=theme)
            browser.wait_for(lambda page: len(page.texts(ROWS)) == 8)
            browser.take_picture(f"shards-{version}-{theme}")
            shades.append(
                browser.run("return getComputedStyle(document.querySelector('.shards-card')).backgroundColor")
            )
        assert browser.complaints() == []
        assert len(set(shades)) == (2 if version == "installed" else 1)  # the old one has no dark theme


def test_the_page_follows_without_a_reload_and_keeps_the_order_and_the_focus(page, flower, show):
    # Given two workers, rows in the order of their owners, and somebody who works with the keyboard
    first, second = show.workers[0], show.worker()
    page.run("window.isTheSamePage = true")
    page.wait_for(lambda page: second.name in column(page, 10) and first.name in column(page, 10))
    page.click("th:nth-child(10) button")
    if column(page, 1) == list("01234567"):
        page.click("th:nth-child(10) button")
    before = column(page, 1), column(page, 10)
    page.run("document.querySelector('tbody tr:nth-child(3) a').focus()")
    # When one is killed while the page is out of sight
    page.run("Object.defineProperty(document, 'hidden', {configurable: true, get: () => true})")
    first.kill()
    assert wait_until(lambda: owners(flower) == [second.name] * 8, timeout_seconds=40)
    ask = "fetch(location.origin + '/flower/shards/data')"
    page.run(f"document.dispatchEvent(new Event('visibilitychange')); return {ask}.then(() => {ask}).then(() => 0)")
    assert (column(page, 1), column(page, 10)) == before
    # Then it shows so as soon as it is seen again
    page.run("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for(lambda page: column(page, 10) == [second.name] * 8)
    assert column(page, 1) == list("01234567") != before[0]
    page_is = (
        "window.isTheSamePage, document.activeElement.textContent, document.querySelector('th[aria-sort]').innerText"
    )
    assert page.run(f"return [{page_is}]") == [True, before[0][2], "Owner"]


def test_a_group_is_paused_after_a_question_and_signed_in_the_history(page, show):
    page.click("[data-action=pause]")
    page.wait_for(lambda page: page.is_shown("#shards-confirm-yes"))
    assert show.group in page.text("#shards-confirm-title")
    page.click("#shards-confirm-yes")

    page.wait_for(lambda page: column(page, 2) == ["paused"] * 8)
    assert page.text("#shards-note") == f"{show.group}: paused"
    assert page.texts(".shards-strip .shards-bar[data-alarm='‖']") == [""] * 8
    with Connection(show.broker_url) as connection:
        (entry,) = read_history(connection, show.group, 1)
    assert (entry.event, entry.by) == ("pause", "ann (Flower)")

    page.wait_for(lambda page: not page.is_shown("#shards-confirm"))
    page.click("[data-action=resume]")
    page.wait_for(lambda page: page.is_shown("#shards-confirm-yes"))
    page.click("#shards-confirm-yes")
    page.wait_for(lambda page: "paused" not in column(page, 2))


def test_a_shards_page_shows_what_failed_in_it(page, flower, show):
    show.publish("fail", "some key")
    page.wait_for(lambda page: page.text("[data-fact=dead]") == "1")

    def find_index() -> int | None:
        """Return the shard that has counted it; owners tell what they count once a second."""
        rows = json.loads(flower.ask("/api/shards").text)["groups"][0]["shards"]
        return next((row["index"] for row in rows if row["counters"].get("dead")), None)

    assert wait_until(lambda: find_index() is not None, timeout_seconds=20)
    page.open(f"{with_login(flower)}/shards/{show.group}/{find_index()}")

    page.wait_for(lambda page: "failed: ValueError" in page.text("#shard-events"))
    assert "dead letter" in page.text("#shard-events")
    assert page.texts("#shard-events a")[0] == "show.fail"


def test_in_read_only_mode_what_acts_is_off_and_says_why(browser, show):
    with start(show, show.env, "--read-only") as flower:
        browser.open(f"{with_login(flower)}/shards")
        browser.wait_for(lambda page: len(page.texts(ROWS)) == 8)

        assert "read-only mode" in browser.text("#shards-refused")
        state = "const b = document.querySelector('[data-action=pause]'); return [b.disabled, b.title]"
        assert browser.run(state) == [True, "Off: Flower runs in read-only mode"]


def test_a_lost_broker_is_told_with_the_age_of_what_is_still_shown(page, flowers_broker):
    assert not page.is_shown("#shards-banner")

    flowers_broker.refuse()
    try:
        page.wait_for(lambda page: page.is_shown("#shards-banner"))
        assert "The broker cannot be read" in page.text("#shards-banner")
        assert "old" in page.text("#shards-banner-age")
        assert len(column(page, 1)) == 8
        page.take_picture("shards-without-broker")
    finally:
        flowers_broker.heal()

    page.wait_for(lambda page: not page.is_shown("#shards-banner"))


def test_a_group_that_is_not_declared_says_what_to_do(page, show):
    assert f"shards declare {show.group}-b" in page.text(f"#group-{show.group}-b .shards-hint")
    assert not page.is_shown(f"#group-{show.group}-b .shards-facts")


def test_256_shards_can_be_told_apart_and_names_are_no_markup(page):
    # Given what Flower would answer for a large group, of which every lag and state is there
    lags = [0.0, 5.0, 30.0, 300.0, 3_600.0, None]
    rows = tuple(
        ShardStatus(
            kind="live",
            index=index,
            queue=f"shards.large.g001.{index:03d}",
            state="unowned" if index % 50 == 49 else "ok",
            ready=index,
            held=0,
            running=0,
            owner="<img src=x onerror='window.isBroken = true'>",
            standbys=(),
            lag_seconds=lags[index % 6],
            lag_estimated=False,
            since=None,
        )
        for index in range(256)
    )
    answer = to_json(Snapshot(1.0, (GroupStatus("large", declared=True, generation=1, shards=rows),)))
    answered = "const text = JSON.stringify(arguments[0]); window.fetch = async () => new Response(text)"
    page.run(answered, answer | {"error": "", "age_seconds": 1})
    # When it is shown
    page.wait_for(lambda page: len(page.texts("#group-large tbody tr")) == 256)
    page.run("document.querySelector('#group-large').scrollIntoView({behavior: 'instant'})")
    page.take_picture("shards-256")
    # Then each bar is wide enough to hit, in view, and says what it is; lags differ in colour and in height
    bars = page.run(
        """return [...document.querySelectorAll('#group-large .shards-strip .shards-bar')].map(function (bar) {
             const box = bar.getBoundingClientRect(), fill = getComputedStyle(bar, '::before');
             const colour = fill.backgroundColor, height = fill.height;
             return {width: box.width, right: box.right, title: bar.title, colour, height};
           })"""
    )
    assert len(bars) == 256
    assert min(bar["width"] for bar in bars) >= 9
    assert max(bar["right"] for bar in bars) <= page.run("return document.documentElement.clientWidth")
    assert bars[49]["title"].startswith("shard 49: unowned, lag 5.0s, 49 ready")
    assert len({bar["colour"] for bar in bars}) == 6
    assert len({bar["height"] for bar in bars}) == 5  # what is not known is as high as the largest
    # And what workers call themselves is text
    assert page.text("#group-large tbody td:nth-child(10)").startswith("<img")
    assert page.run("return window.isBroken") is None
