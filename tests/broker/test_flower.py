"""Flower with the page of shards: real Flowers, the newest and the oldest supported one, a real broker and workers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection
from tornado.web import create_signed_value

from celery_sharding.flower.mount import mount
from celery_sharding.monitoring.history import read_history
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.monitoring.snapshot_json import to_json
from celery_sharding.operations.dead_letters import discard
from celery_sharding.testing import FaultProxy
from celery_sharding.testing.processes import wait_until
from support.flower_server import FlowerServer, Show

# One process for all: they share a worker and two Flowers.
pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("flower")]

USER = "ann:secret"
# As Flower's own are.
OPEN = ("shards-static", "shards-metrics")
TWO_LINES = "from celery_sharding.flower import install\ninstall()\n"


@pytest.fixture(scope="module", params=["installed", "2.0"])
def flower(request: pytest.FixtureRequest, show: Show, flowers_broker: FaultProxy) -> Iterator[FlowerServer]:
    """Flower behind a login and under a prefix, which has seen the group."""
    env = show.env | {"SHOW_BROKER": flowers_broker.url} | (show.old_flower() if request.param == "2.0" else {})
    options = [f"--basic-auth={USER}", "--url-prefix=flower"]
    with FlowerServer("shards flower", options, env=env, folder=show.folder, user=USER, prefix="/flower") as flower:
        wait_for(
            flower,
            "/api/shards",
            lambda found: all(row["owner"] for row in found["groups"][0]["shards"] or [{"owner": 0}]),
        )
        yield flower


def wait_for(flower: FlowerServer, path: str, condition: Callable[[Any], bool]) -> Any:
    """Ask for JSON until `condition` holds, and return it."""
    seen: list[Any] = [None]

    def look() -> bool:
        answer = flower.ask(path)
        seen.append(json.loads(answer.text) if answer.status == 200 else answer)
        return answer.status == 200 and condition(seen[-1])

    assert wait_until(look, timeout_seconds=40), seen[-1]
    return seen[-1]


def last_entry(show: Show) -> tuple[str, str]:
    """Return who did what last, by the group's history."""
    with Connection(show.broker_url) as connection:
        (entry,) = read_history(connection, show.group, 1)
    return entry.by, entry.what


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_api_gives_the_snapshot_of_all_of_a_group_and_of_a_shard(flower, show):
    with Connection(show.broker_url) as connection:
        expected = to_json(read_snapshot(connection, [show.group]))

    found = json.loads(flower.ask("/api/shards").text)
    group = json.loads(flower.ask(f"/api/shards/{show.group}").text)
    shard = json.loads(flower.ask(f"/api/shards/{show.group}/3").text)

    assert expected.keys() <= found.keys()
    assert [each["name"] for each in found["groups"]] == [show.group, f"{show.group}-b"]
    assert (found["error"], found["age_seconds"] < 10) == ("", True)
    assert group["group"].keys() == expected["groups"][0].keys()
    assert shard["shard"].keys() == expected["groups"][0]["shards"][3].keys()
    assert (shard["shard"]["index"], shard["shard"]["owner"]) == (3, show.workers[0].name)
    assert (shard["events"][0]["change"], shard["events"][0]["owner"]) == ("taken", show.workers[0].name)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/shards/{group}x", 404),
        ("/api/shards/{group}/8", 404),
        ("/api/shards/{group}-b/0", 404),
        ("/shards/{group}x/0", 404),
        ("/shards/{group}/8", 404),
        ("/shards/{group}-b/0", 200),  # not declared: the page says what to do
        ("/shards/{group}-b/0/data", 200),
    ],
)
def test_what_is_not_there_is_said_to_be_not_there(flower, show, path, status):
    assert flower.ask(path.format(group=show.group)).status == status


def test_every_page_of_flower_leads_to_the_shards_and_metrics_are_beside_its_own(flower):
    assert re.search(r'<a class="nav-link[^>]*href="/flower/shards"[^>]*>Shards</a>', flower.ask("/workers").text)
    metrics = flower.ask("/metrics").text
    assert flower.ask("/shards").headers["Content-Security-Policy"] == "frame-ancestors 'self'"
    assert "celery_sharding_up 1.0" in metrics
    assert "flower_worker_online" in metrics


# --- who may do what -------------------------------------------------------------------------------------------------


def test_no_address_lets_in_whom_flower_keeps_out(flower, show):
    group, shard = f"/shards/{show.group}", f"/shards/{show.group}/1"
    reads = ["/shards", "/shards/data", shard, f"{shard}/data", "/api/shards", f"/api{group}", f"/api{shard}"]
    posts = [f"/api{group}/pause", f"/api{group}/resume", f"/api{shard}/pause", f"/api{group}/dead-letters/replay"]
    # Given every address that we add, but those of scripts, styles and metrics
    handlers: list[Any] = [None]
    mount(None, handlers, {"template_path": "."})
    for each in handlers[:-1]:
        assert any(each.regex.match(path) for path in [*reads, *posts]) or each.name in OPEN, each
    # When somebody asks who is not logged in, or not truly
    for user in (None, "ann:guess"):
        answers = {path: flower.ask(path, user=user) for path in reads}
        answers |= {path: flower.act(path, user=user) for path in posts}
        # Then nothing is told, and nothing done
        assert {path: answer.status for path, answer in answers.items()} == dict.fromkeys([*reads, *posts], 401)
        assert not [path for path, answer in answers.items() if "owner" in answer.text]
    assert not json.loads(flower.ask(f"/api{group}").text)["group"]["paused"]


def test_a_post_that_a_browser_sends_for_another_site_is_refused_though_it_has_the_password(flower, show):
    path = f"/api/shards/{show.group}/pause"

    form = flower.ask(path, method="POST", body="a=b", Content_Type="text/plain", Origin="http://evil.test")
    script = flower.act(path, Origin="http://evil.test", Sec_Fetch_Site="cross-site")
    old_browser = flower.ask(path, method="POST")

    assert [form.status, script.status, old_browser.status] == [403, 403, 403]
    assert "X-Requested-By" in old_browser.text
    preflight = flower.ask(path, method="OPTIONS", Origin="http://evil.test", Access_Control_Request_Method="POST")
    assert not [name for name in preflight.headers if name.lower().startswith("access-control-")]
    assert not json.loads(flower.ask(f"/api/shards/{show.group}").text)["group"]["paused"]


# --- acting ----------------------------------------------------------------------------------------------------------


def test_a_shard_and_a_group_are_paused_and_resumed_in_the_name_of_flowers_user(flower, show):
    group = f"/api/shards/{show.group}"

    assert json.loads(flower.act(f"{group}/3/pause").text) == {"changed": True, "message": f"{show.group}/3: paused"}
    assert last_entry(show)[0] == "ann (Flower)"
    found = wait_for(flower, group, lambda found: found["group"]["shards"][3]["state"] == "paused")
    assert not found["group"]["paused"]
    assert json.loads(flower.act(f"{group}/3/pause").text)["changed"] is False

    flower.act(f"{group}/pause")
    refused = flower.act(f"{group}/3/resume")
    assert (refused.status, "paused as a whole" in refused.text) == (409, True)
    assert json.loads(flower.act(f"{group}/resume").text)["changed"] is True
    wait_for(flower, group, lambda found: not any(row["state"] == "paused" for row in found["group"]["shards"]))


def test_dead_letters_are_replayed_all_or_by_their_ids(flower, show):
    path = f"/api/shards/{show.group}"
    for key in "ab":
        show.publish("fail", key)
    wait_for(flower, path, lambda found: found["group"]["dead_letters"] == 2)

    done = json.loads(flower.act(f"{path}/dead-letters/replay").text)
    assert (done["changed"], len(done["ids"])) == (True, 2)
    assert last_entry(show)[0] == "ann (Flower)"

    # They fail again, since nobody mended the task
    wait_for(flower, path, lambda found: found["group"]["dead_letters"] == 2)
    gone = flower.act(f"{path}/dead-letters/replay", body=json.dumps({"ids": ["nothing"]}))
    assert (gone.status, "no such dead letter" in gone.text) == (409, True)
    odd = flower.act(f"{path}/dead-letters/replay", body=r'{"ids": ["\ud800"]}')
    assert (odd.status, "no such dead letter" in odd.text) == (409, True)
    damaged = flower.act(f"{path}/dead-letters/replay", body='{"ids": "all"}')
    assert damaged.status == 400
    discard(lambda: Connection(show.broker_url), show.group, None, by="test")
    wait_for(flower, path, lambda found: found["group"]["dead_letters"] == 0)


@pytest.mark.parametrize(
    ("place", "status"),
    [("{group}x/pause", 404), ("{group}/8/pause", 404), ("{group}-b/pause", 409), ("a/b/pause", 404)],
)
def test_what_cannot_be_done_is_told_in_a_line_with_the_status_that_fits(flower, show, place, status):
    answer = flower.act(f"/api/shards/{place.format(group=show.group)}")

    assert answer.status == status
    assert "Traceback" not in answer.text


def test_without_a_broker_the_last_data_is_shown_with_its_age_and_nothing_is_done(flower, show, flowers_broker):
    flowers_broker.refuse()
    lost = wait_for(flower, "/shards/data", lambda found: found["error"])
    try:
        later = wait_for(flower, "/api/shards", lambda found: found["age_seconds"] > lost["age_seconds"])
        assert later["groups"] == lost["groups"]
        assert len(lost["groups"][0]["shards"]) == 8
        assert flower.ask("/shards").status == flower.ask(f"/shards/{show.group}/0").status == 200
        refused = flower.act(f"/api/shards/{show.group}/pause")
        assert (refused.status, "Traceback" in refused.text) == (503, False)
        assert "celery_sharding_up 0.0" in flower.ask("/metrics").text
    finally:
        flowers_broker.heal()
    wait_for(flower, "/shards/data", lambda found: not found["error"])


# --- other ways in, and other settings -------------------------------------------------------------------------------


def test_two_lines_in_flowerconfig_do_the_same_and_tasks_are_listed_with_shard_and_without_key(show):
    config = show.folder / "flowerconfig.py"
    config.write_text(TWO_LINES + "from celery_sharding.flower import mask_task as format_task\n")
    options = [f"--basic-auth={USER}", "--read-only", f"--conf={config}"]
    with FlowerServer("flower", options, env=show.env, folder=show.folder, user=USER) as flower:
        # Nothing is done in read-only mode
        wait_for(flower, "/api/shards", lambda found: found["groups"][0]["declared"])
        refused = flower.act(f"/api/shards/{show.group}/pause")
        assert (refused.status, refused.text) == (403, "Flower runs in read-only mode\n")
        assert "Flower runs in read-only mode" in flower.ask("/shards").text
        # And the list of tasks shows where each ran
        query = "/tasks/datatable?draw=1&start=0&length=9&order[0][column]=0&columns[0][data]=name&order[0][dir]=asc"
        listed: list[dict[str, Any]] = []

        def is_listed() -> bool:
            task_id = show.publish("nap", "secret-key", seconds=0)
            listed[:] = json.loads(flower.ask(query).text)["data"]
            return any(task["uuid"] != task_id and task["state"] == "SUCCESS" for task in listed)

        assert wait_until(is_listed, timeout_seconds=40), listed
        assert {task["exchange"].partition("/")[0] for task in listed if task["state"] == "SUCCESS"} == {show.group}
        assert "secret-key" not in json.dumps(listed)


def test_without_a_login_pages_are_open_and_nothing_is_done_also_while_the_broker_was_never_there(show):
    env = show.env | {"SHOW_BROKER": "amqp://guest:hunter2@127.0.0.1:1//"}
    with FlowerServer("shards flower", env=env, folder=show.folder) as flower:
        assert "actions need a login" in flower.ask("/shards").text
        found = wait_for(flower, "/shards/data", lambda found: "Connection refused" in found["error"])
        assert (found["groups"], found["age_seconds"]) == ([], None)
        assert flower.ask(f"/shards/{show.group}/0").status == 200
        assert flower.ask("/api/shards").status == 401
        assert flower.act(f"/api/shards/{show.group}/pause").status == 401
        assert flower.stop() == 0
        assert "hunter2" not in flower.log.read_text()
    with FlowerServer("shards flower", env=env | {"FLOWER_UNAUTHENTICATED_API": "true"}, folder=show.folder) as flower:
        assert flower.ask("/api/shards").status == 503
        assert flower.act(f"/api/shards/{show.group}/pause").status == 503
        assert "Access-Control-Allow-Origin" not in flower.ask("/api/shards").headers


def test_who_is_logged_in_elsewhere_acts_in_their_name_and_nobody_else_does(show):
    options = ["--auth=.*@shop.test", "--auth_provider=flower.views.auth.GoogleAuth2LoginHandler"]
    options += [
        "--oauth2_key=key",
        "--oauth2_secret=secret",
        "--oauth2_redirect_uri=http://x.test",
        "--cookie_secret=own",
    ]
    pause = f"/api/shards/{show.group}/1/pause"
    with FlowerServer("shards flower", options, env=show.env, folder=show.folder) as flower:
        # Given somebody who is logged in, and somebody whom the options keep out
        ann, eve = (create_signed_value("own", "user", name).decode() for name in ("ann@shop.test", "eve@evil.test"))
        for cookie in ("", f"user={eve}"):
            assert flower.ask("/shards", Cookie=cookie).status == 302
            assert flower.ask("/shards/data", Cookie=cookie).status == 302
            assert flower.ask("/api/shards", Cookie=cookie).status == 302
            for path in (pause, f"/api/shards/{show.group}/dead-letters/replay"):
                assert flower.act(path, Cookie=f"_xsrf=1; {cookie}", X_XSRFToken="1").status == 403
        # When the first pauses a shard, with the token that Flower asks for beside ours
        assert flower.act(pause, Cookie=f"user={ann}").status == 403
        done = flower.act(pause, Cookie=f"user={ann}; _xsrf=1", X_XSRFToken="1")
        # Then it is done, in their name
        assert json.loads(done.text)["changed"] is True
        assert last_entry(show)[0] == "ann@shop.test (Flower)"
        flower.act(f"/api/shards/{show.group}/1/resume", Cookie=f"user={ann}; _xsrf=1", X_XSRFToken="1")


def test_it_does_not_start_where_it_cannot_serve(show, tmp_path: Path):
    # Given no Flower at all, one without a read-only mode, and an app without groups
    (tmp_path / "flower.py").write_text("raise ModuleNotFoundError(\"No module named 'flower'\", name='flower')")
    (show.folder / "plain.py").write_text("from celery import Celery\napp = Celery('plain')\n")
    no_flower = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{show.env['PYTHONPATH']}"}
    # When it is started
    missing = show.celery("shards", "flower", **no_flower)
    too_old = show.celery("shards", "flower", "--read-only", **show.old_flower())
    config = show.folder / "two_lines.py"
    config.write_text(TWO_LINES)
    too_old_too = show.celery("flower", f"--conf={config}", "--read-only", **show.old_flower())
    embedded = show.celery("shards", "flower", SHOW_BROKER="memory://")
    plain = show.celery("-A", "plain", "shards", "flower")
    # Then it says what to do
    assert (missing.returncode, "pip install 'celery-sharding[flower]'" in missing.stderr) == (2, True)
    assert (too_old.returncode, "pip install 'flower>=2.2'" in too_old.stderr) == (2, True)
    assert (too_old_too.returncode, "pip install 'flower>=2.2'" in too_old_too.stderr) == (1, True)
    assert (embedded.returncode, "needs RabbitMQ" in embedded.stderr) == (2, True)
    assert (plain.returncode, "Sharding(app, groups=" in plain.stderr) == (2, True)
