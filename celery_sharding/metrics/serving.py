"""A small HTTP server for `/metrics` and `/healthz`; both answer without the broker, too."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from celery_sharding.metrics import ShardCollector


class MetricsServer:
    """Serves the metrics of `collector` on `host` and `port` (0: any free one) until `close`.

    Raises:
        OSError: It cannot listen there.
        UnicodeError: `host` is not a name.
    """

    def __init__(self, collector: ShardCollector, *, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server_class = type("Server", (_Server,), {"address_family": family})
        site = _Site(make_wsgi_app(registry))
        self._server: WSGIServer = make_server(host, port, site, server_class, _Handler)
        self.host: str = self._server.server_name
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="shards-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and wait for it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False  # a scraper that hangs must not delay the end

    def server_bind(self) -> None:
        # The server of the standard library asks for the host's full name here, which may take long and is not needed.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = 30.0  # for clients that connect and send nothing

    def log_message(self, *_: Any) -> None:
        """Log nothing: a line for each scrape is of no use."""


class _Site:
    def __init__(self, metrics: WSGIApplication) -> None:
        self._metrics = metrics

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        status, text = ("200 OK", b"ok\n") if path == "/healthz" else ("404 Not Found", b"see /metrics\n")
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))])
        return [text]
