"""A virtual host of one's own on the broker under test, where policies and users disturb nobody else."""

from __future__ import annotations

import base64
import json
import urllib.request
import uuid
from typing import Any
from urllib.parse import quote, urlsplit

from celery_sharding.operations.permissions import Permissions

PASSWORD = "correct-horse-battery"
_ALL = Permissions(".*", ".*", ".*")


class VirtualHost:
    """Made at once; `remove` deletes it with all that is in it, and its users."""

    def __init__(self, broker_url: str, management_url: str) -> None:
        self._broker = urlsplit(broker_url)
        self._users: list[str] = []
        self.management_url = management_url
        self.name = f"t{uuid.uuid4().hex[:12]}"
        self.call("PUT", f"/api/vhosts/{self.name}")
        self.permit(self._broker.username or "guest", _ALL)

    def url(self, user: str | None = None, password: str = PASSWORD) -> str:
        """Return the URL of this virtual host on the broker, for the tests' own user or one that was added."""
        at = self._broker.netloc.rpartition("@")[2]
        who = f"{user}:{password}" if user else f"{self._broker.username}:{self._broker.password}"
        return f"amqp://{who}@{at}/{self.name}"

    def add_user(self, role: str) -> str:
        """Add a user who may do nothing yet, and return its name."""
        name = f"{self.name}-{role}"
        self.call("PUT", f"/api/users/{name}", {"password": PASSWORD, "tags": "monitoring"})
        self._users.append(name)
        return name

    def permit(self, user: str, allowed: Permissions) -> None:
        facts = {"configure": allowed.configure, "write": allowed.write, "read": allowed.read}
        self.call("PUT", f"/api/permissions/{self.name}/{user}", facts)

    def set_policy(self, name: str, pattern: str, definition: dict[str, Any], *, priority: int = 0) -> None:
        facts = {"pattern": pattern, "definition": definition, "priority": priority, "apply-to": "all"}
        self.call("PUT", f"/api/policies/{self.name}/{name}", facts)

    def names(self, kind: str) -> list[str]:
        """Return the names of all "exchanges" or "queues"."""
        return [each["name"] for each in self.call("GET", f"/api/{kind}/{self.name}?disable_stats=true")]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Call the management API as the tests' own user."""
        login = f"{self._broker.username}:{self._broker.password}"
        request = urllib.request.Request(
            self.management_url + quote(path, safe="/?=&%"),
            method=method,
            data=None if body is None and method != "PUT" else json.dumps(body or {}).encode(),
            headers={
                "Authorization": "Basic " + base64.b64encode(login.encode()).decode(),
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def remove(self) -> None:
        self.call("DELETE", f"/api/vhosts/{self.name}")
        for user in self._users:
            self.call("DELETE", f"/api/users/{user}")
