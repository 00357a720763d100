"""RabbitMQ's management API, for what plain AMQP does not tell: who is connected from where, and the queues' replicas.

Optional: no decision depends on it. It is asked only if the setting `sharding_management_url` names it, with the
credentials of the broker's URL unless the setting has its own. Passwords stay out of every text.

If statistics are off on the broker, as in the plain container image, totals and replicas are known, but neither memory
nor consumers. Counts are some seconds old.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from celery_sharding.config import Settings
from celery_sharding.errors import ManagementUnavailable
from celery_sharding.texts import printable
from celery_sharding.topology import Names

# For each wait, and for all of a request once it is connected.
_TIMEOUT_SECONDS, _REQUEST_SECONDS = 5.0, 15.0
_PAGE = 500
_CHEAP = {"disable_stats": "true", "enable_queue_totals": "true"}


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """What the broker says of a queue; None: it does not say.

    `leader` and `members` are the nodes of its replicas, `online` those that are up; a classic queue has one member.
    """

    unacknowledged: int | None = None
    leader: str | None = None
    members: tuple[str, ...] = ()
    online: tuple[str, ...] = ()
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ConsumerFacts:
    """A consumer of a queue: the worker's name, whether it is the active one, its channel, and its client's address."""

    worker: str
    active: bool
    channel: str
    client: str
    prefetch: int | None


class Management:
    """The management API at `url`, without credentials in it, for the queues of one virtual host.

    `virtual_host` is its name as it stands in the API's paths.
    """

    def __init__(self, url: str, *, user: str, password: str, virtual_host: str) -> None:
        self.url = url.rstrip("/")
        self._authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self.virtual_host = quote(virtual_host, safe="")

    def read_queues(self, names: Names) -> dict[str, QueueFacts]:
        """Return the facts of each queue of a group, by name, without memory.

        Raises:
            ManagementUnavailable: It could not be asked; the message says why.
        """
        return {str(_field(each, "name", str)): _read_queue(each) for each in self.list_queues(names)}

    def list_queues(self, names: Names) -> list[Mapping[str, Any]]:
        """Return the API's own record of each queue of a group, without statistics. Errors as for `read_queues`."""
        found: list[Mapping[str, Any]] = []
        pattern = "^" + names.publish.replace(".", r"\.") + r"\."
        page, pages = 1, 1
        while page <= pages:
            query = {**_CHEAP, "name": pattern, "use_regex": "true", "page": page, "page_size": _PAGE}
            listing = self._get(f"/api/queues/{self.virtual_host}?{urlencode(query)}")
            items = _field(listing, "items", list)
            found += [each for each in items if isinstance(each, Mapping)]
            page, pages = page + 1, _field(listing, "page_count", int) if items else page
        return found

    def read_queue(self, queue: str) -> tuple[QueueFacts, tuple[ConsumerFacts, ...] | None]:
        """Return the facts of one queue, and its consumers, the active one first; None if statistics are off.

        Raises:
            ManagementUnavailable: As for `read_queues`, or there is no such queue.
        """
        found = self._get(f"/api/queues/{self.virtual_host}/{quote(queue, safe='')}")
        consumers = found.get("consumer_details")
        if not isinstance(consumers, list):
            return _read_queue(found), None
        read = [_read_consumer(each) for each in consumers if isinstance(each, Mapping)]
        return _read_queue(found), tuple(sorted(read, key=lambda each: (not each.active, each.worker)))

    def get(self, path: str) -> Any:
        """Return what the API answers at `path`, as in `/api/nodes`.

        Raises:
            ManagementUnavailable: It could not be asked; the message says why.
        """
        try:
            # A redirect is not followed: the credentials would go with it.
            status, body = self._request(path)
            if status != http.client.OK:
                raise self._unavailable(_explain_status(status))
            return json.loads(body)
        except (OSError, http.client.HTTPException) as exc:
            raise self._unavailable(f"cannot be reached ({printable(exc).strip()})") from exc
        except (ValueError, RecursionError) as exc:
            raise self._unavailable("does not answer in JSON; is this the port of the management plugin?") from exc

    def _request(self, path: str) -> tuple[int, bytes]:
        """Return the status and the body of the answer, which may come slowly, but not for ever."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Authorization": self._authorization, "Accept": "application/json", "Connection": "close"}
        with closing(kind(parts.netloc, timeout=_TIMEOUT_SECONDS)) as connection:
            connection.connect()
            link, is_over = connection.sock, threading.Event()

            def cut() -> None:
                is_over.set()
                with suppress(OSError):  # it has just been closed
                    link.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(_REQUEST_SECONDS, cut)
            timer.start()
            try:
                connection.request("GET", parts.path + path, headers=headers)
                answer = connection.getresponse()
                found = answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                if not is_over.is_set():
                    raise
            finally:
                timer.cancel()
            if is_over.is_set():
                raise TimeoutError(f"its answer is not complete after {_REQUEST_SECONDS:.0f} s")
            return found

    def _get(self, path: str) -> Mapping[str, Any]:
        found = self.get(path)
        if not isinstance(found, Mapping):
            raise self._unavailable("gives an answer of an unknown shape")
        return found

    def _unavailable(self, why: str) -> ManagementUnavailable:
        return ManagementUnavailable(f"the management API at {self.url} {why}", url=self.url)


def open_management(settings: Settings, connection: Any) -> Management | None:
    """Return the management API that the settings name; None if they name none.

    Args:
        connection: Of kombu, to the broker; it says the virtual host, and the credentials unless the setting does.
    """
    if settings.management_url is None:
        return None
    parts = urlsplit(settings.management_url)
    host = parts.netloc.rpartition("@")[2]
    return Management(
        f"{parts.scheme}://{host}{parts.path}",
        user=unquote(parts.username) if parts.username else connection.userid or "guest",
        password=unquote(parts.password or "") if parts.username else connection.password or "guest",
        virtual_host=connection.virtual_host or "/",
    )


def _explain_status(code: int) -> str:
    if code in (401, 403):
        return "refuses the user or the password; its user needs the tag 'monitoring' or 'management'"
    if code == 404:
        return "has no such path; check its URL, the virtual host, and whether the management plugin is enabled"
    return f"answers with the status {code}"


def _read_queue(facts: Mapping[str, Any]) -> QueueFacts:
    def number(name: str) -> int | None:
        value = facts.get(name)
        return value if isinstance(value, int) else None

    leader = facts.get("leader") or facts.get("node")
    members = _texts(facts.get("members")) or _texts([leader])
    return QueueFacts(
        unacknowledged=number("messages_unacknowledged"),
        leader=None if leader is None else str(leader),
        members=members,
        online=_texts(facts.get("online")) if "online" in facts else members,
        memory_bytes=number("memory"),
    )


def _read_consumer(facts: Mapping[str, Any]) -> ConsumerFacts:
    channel, prefetch = facts.get("channel_details"), facts.get("prefetch_count")
    if not isinstance(channel, Mapping):
        channel = {}  # it has just gone
    return ConsumerFacts(
        worker=str(facts.get("consumer_tag", "")),
        active=facts.get("active") is True,
        channel=str(channel.get("name", "")),
        client=f"{channel['peer_host']}:{channel.get('peer_port')}" if "peer_host" in channel else "",
        prefetch=prefetch if isinstance(prefetch, int) else None,
    )


def _field(facts: Any, name: str, kind: type) -> Any:
    value = facts.get(name) if isinstance(facts, Mapping) else None
    return value if isinstance(value, kind) else kind()


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(sorted(str(each) for each in values if each)) if isinstance(values, list) else ()
