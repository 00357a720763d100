"""Metrics from a worker to Prometheus: real tasks, the real exporter, every query of the dashboard, the alert rules."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celery_sharding.metrics import table
from celery_sharding.testing.processes import find_free_port, wait_until
from support.deployed import find_object
from support.paths import APPS, ROOT, python_path
from support.programs import find_program
from support.shops import Shop
from support.store_servers import Server

pytestmark = pytest.mark.timeout(180)

MONITORING = ROOT / "deploy" / "monitoring"
GAUGE, TOTAL = "celery_sharding_{}", "celery_sharding_{}_total"


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        return answer.read().decode()


class Exporter:
    """A running `shards exporter`."""

    def __init__(self, app: str, env: dict[str, str]) -> None:
        self.port = find_free_port()
        self.process = start_exporter(app, env, "--port", str(self.port))
        assert wait_until(self.answers, timeout_seconds=30)

    def answers(self) -> bool:
        try:
            return fetch(self.port, "/healthz") == "ok\n"
        except OSError:
            return False

    def samples(self, name: str) -> dict[str, float]:
        """Return the values of a metric by its labels' values, joined by "/"."""
        families = text_string_to_metric_families(fetch(self.port, "/metrics"))
        found = [sample for family in families for sample in family.samples if sample.name == name]
        return {"/".join(sample.labels.values()): sample.value for sample in found}

    def total(self, name: str) -> float:
        return sum(self.samples(TOTAL.format(name)).values())

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; return the exit status, and what was printed."""
        self.process.send_signal(number)
        return self.process.wait(30), self.process.communicate()[0]


def start_exporter(app: str, env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "celery", "-A", app, "shards", "exporter", *arguments]
    return subprocess.Popen(
        command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


@pytest.fixture
def run_exporter() -> Iterator[Callable[..., Exporter]]:
    started: list[Exporter] = []

    def run(app: str, env: dict[str, str]) -> Exporter:
        started.append(Exporter(app, env))
        return started[-1]

    yield run
    for exporter in started:
        if exporter.process.poll() is None:
            exporter.process.kill()
            exporter.process.communicate()


class Prometheus(Server):
    """A Prometheus that scrapes 127.0.0.1:`target` every second, with the shipped alert rules."""

    package = "prometheus"

    def __init__(self, target: int) -> None:
        self._program = find_program("prometheus", package=self.package)
        super().__init__()
        self._target = target

    def prepare(self) -> None:
        example = (MONITORING / "prometheus.yml").read_text()
        text = example.replace("15s", "1s").replace("127.0.0.1:9808", f"127.0.0.1:{self._target}")
        assert text.count("1s") == 2
        assert str(self._target) in text
        (self.folder / "prometheus.yml").write_text(text)
        shutil.copy(MONITORING / "alerts.yml", self.folder)

    def command(self) -> list[str]:
        return [
            self._program,
            f"--config.file={self.folder}/prometheus.yml",
            f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]

    def answers(self) -> bool:
        try:
            return "Ready" in fetch(self.port, "/-/ready")
        except OSError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of an instant query.

        Raises:
            AssertionError: Prometheus does not understand it.
        """
        try:
            answer = fetch(self.port, f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        except urllib.error.HTTPError as exc:
            raise AssertionError(f"{expression}: {exc.read().decode()}") from exc
        return json.loads(answer)["data"]["result"]


def dashboard_queries(group: str) -> list[str]:
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    texts = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [text.replace("$group", group).replace("$__rate_interval", "10s").replace("[1h]", "[60s]") for text in texts]


def scaling_query(group: str) -> str:
    [trigger] = find_object("ScaledObject", "shop-workers")["spec"]["triggers"]
    return trigger["metadata"]["query"].replace('"orders"', f'"{group}"')


def test_what_workers_count_reaches_prometheus_whoever_owns_the_shards(shop: Shop, run_exporter):
    exporter = run_exporter("shop", shop.env)
    # Given tasks of all kinds of endings
    worker = shop.worker("-c", "2")
    with Prometheus(exporter.port) as prometheus:
        for number in range(12):
            shop.send("step", f"k{number}", number, seconds=0.05)
        shop.send("fail", "f", 0)
        shop.send("again", "a", 0, times=2, countdown=0)
        shop.send("poison", "p", 0)

        # Then the exporter tells how they ended, and when each part of the time was spent
        ends = {"done": 14, "failed": 2, "retried": 2, "lost": 3, "dead": 1}
        assert wait_until(lambda: all(exporter.total(n) == end for n, end in ends.items()), timeout_seconds=60), {
            name: exporter.total(name) for name in ends
        }
        assert exporter.samples(GAUGE.format("dead_letters")) == {shop.group: 1}
        assert set(exporter.samples(GAUGE.format("owner_info"))) == {
            f"{shop.group}/{i}/{worker.name}" for i in range(4)
        }
        assert exporter.samples("celery_sharding_up") == {"": 1}
        lint = [find_program("promtool", package="prometheus"), "check", "metrics"]
        checked = subprocess.run(lint, input=fetch(exporter.port, "/metrics"), text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, "")

        # When the owner leaves just after its last task, another takes over, and is killed in the middle of one
        last = shop.send("step", "k0", 100, seconds=0.0)
        last.get(timeout=30)
        assert worker.stop() == 0
        assert wait_until(lambda: exporter.total("done") == 15, timeout_seconds=30), exporter.total("done")
        counts = exporter.samples("celery_sharding_run_seconds_count")
        assert sum(counts.values()) == 15 + 2  # every run that came to an end, retried ones too
        waits = sum(exporter.samples("celery_sharding_wait_seconds_count").values())
        assert waits == 16  # every message once, the one that was lost too
        assert sum(exporter.samples("celery_sharding_run_seconds_sum").values()) >= 12 * 0.05
        before = exporter.samples(TOTAL.format("done"))
        second = shop.worker("-c", "1")
        shop.send("step", "k1", 101, seconds=0.0).get(timeout=30)
        assert wait_until(lambda: exporter.total("done") == 16, timeout_seconds=30)
        assert all(exporter.samples(TOTAL.format("done"))[shard] >= count for shard, count in before.items())
        handovers = exporter.samples(TOTAL.format("handovers"))
        assert [handovers[f"{shop.group}/{index}"] for index in range(4)] == [2] * 4
        for number in range(200, 206):
            shop.send("step", "k2", number, seconds=120.0)
        second.kill()

        # Then nothing that was counted is taken back, the shard has no owner, and every query has an answer
        def is_unowned() -> bool:
            states = exporter.samples(GAUGE.format("state_info"))
            waiting = exporter.samples(GAUGE.format("waiting_messages"))
            return sum("/unowned" in state for state in states) == 4 and sum(waiting.values()) == 6

        assert wait_until(is_unowned, timeout_seconds=60), exporter.samples(GAUGE.format("state_info"))
        assert exporter.total("done") == 16
        assert max(exporter.samples(GAUGE.format("lag_seconds")).values()) > 0
        shop.worker("-c", "1", SHOP_PREFETCH="1")
        queries = [*dashboard_queries(shop.group), scaling_query(shop.group)]
        assert wait_until(lambda: all(map(prometheus.query, queries)), timeout_seconds=40), [
            query for query in queries if not prometheus.query(query)
        ]
        # And Prometheus can judge every alert
        (rules,) = json.loads(fetch(prometheus.port, "/api/v1/rules"))["data"]["groups"]
        assert {rule["health"] for rule in rules["rules"]} == {"ok"}
    status, printed = exporter.end(signal.SIGTERM)
    assert status == 0, printed


def test_the_alerts_tell_what_is_wrong_and_only_that():
    done = subprocess.run(
        [find_program("promtool", package="prometheus"), "test", "rules", "alerts_test.yml"],
        cwd=MONITORING,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_broker_it_answers_all_the_same(run_exporter):
    exporter = run_exporter("shop", nowhere())

    assert exporter.samples("celery_sharding_up") == {"": 0}
    assert exporter.samples(GAUGE.format("waiting_messages")) == {}
    status, printed = exporter.end(signal.SIGINT)
    assert (status, "hunter2" in printed) == (0, False), printed


def test_a_port_in_use_and_a_missing_extra_are_one_clear_line(run_exporter, tmp_path):
    taken = run_exporter("shop", nowhere()).port
    in_use = start_exporter("shop", nowhere(), "--port", str(taken))
    printed = in_use.communicate(timeout=30)[0]
    assert (in_use.returncode, printed) == (
        1,
        f"Error: cannot listen on 127.0.0.1, port {taken}: Address already in use\n",
    )

    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError(name='prometheus_client')\n")
    path = os.pathsep.join([str(tmp_path), nowhere()["PYTHONPATH"]])
    missing = start_exporter("shop", nowhere() | {"PYTHONPATH": path}, "--port", "0")
    printed = missing.communicate(timeout=30)[0]
    assert missing.returncode == 2, printed
    assert printed.splitlines()[-1] == (
        "Error: prometheus_client is missing; install it with: pip install 'celery-sharding[metrics]'"
    )


def test_the_dashboard_is_one_that_grafana_can_import():
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {"datasource", "group"} == {variable["name"] for variable in dashboard["templating"]["list"]}
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not own & cells, f"{panel['title']} lies over another"
        cells |= own
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
    shown = set(re.findall(r"celery_sharding_\w+", json.dumps(panels) + (MONITORING / "alerts.yml").read_text()))
    assert {re.sub("_bucket$", "", name) for name in shown} <= set(table.NAMES)


def nowhere() -> dict[str, str]:
    """Return the environment of a shop without a broker."""
    return {
        "SHOP_GROUP": "orders",
        "SHOP_BROKER": "amqp://guest:hunter2@127.0.0.1:1//",
        "SHOP_BACKEND": "cache+memory://",
        "SHOP_TRACE": os.devnull,
        "PYTHONPATH": python_path(APPS),
    }
