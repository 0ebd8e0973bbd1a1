"""A small HTTP server beside the agent: /health/live, /health/ready and /metrics."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from streams.errors import SidstreamError


class HealthServer:
    """Serves until `close()`. `waiting_for()` names what is not ready yet, None: nothing."""

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, waiting_for: Callable[[], str | None]
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._send(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif self.path == "/health/live":
                    self._json(200, {"status": "live"})
                elif self.path == "/health/ready":
                    waiting = waiting_for()
                    ready = {"status": "ready"} if waiting is None else {"status": "waiting", "for": waiting}
                    self._json(200 if waiting is None else 503, ready)
                else:
                    self._json(404, {"error": "try /health/live, /health/ready or /metrics"})

            def _json(self, status: int, body: dict[str, str]) -> None:
                self._send(status, "application/json", json.dumps(body).encode())

            def _send(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """A line a scrape is no news."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SidstreamError(
                f"cannot listen on {host}:{port} ({error.strerror}); set SIDSTREAM_SERVING__METRICS_PORT "
                "to a free port"
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
