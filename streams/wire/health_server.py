"""An HTTP server beside a worker: /metrics, /health/live and, where readiness is known, /health/ready."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from streams.errors import SidstreamError


class HealthServer:
    """Answers from its creation until `close()`."""

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, port_setting: str,
        waiting_for: Callable[[], str | None] | None = None,
    ) -> None:  # fmt: skip
        """`port` 0: any free one. `port_setting`: the environment variable that changes the port.

        `waiting_for()` names what is not ready yet, None: nothing; without it there is no /health/ready.
        Raises SidstreamError where the address is taken.
        """
        paths = ["/health/live", "/health/ready", "/metrics"]
        if waiting_for is None:
            paths.remove("/health/ready")

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                # A scraper may append parameters, such as name[]; they select nothing here.
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    encode, kind = choose_encoder(self.headers.get("Accept", ""))
                    self._send(200, kind, encode(registry))
                elif path == "/health/live":
                    self._json(200, {"status": "live"})
                elif path == "/health/ready" and waiting_for is not None:
                    waiting = waiting_for()
                    ready = {"status": "ready"} if waiting is None else {"status": "waiting", "for": waiting}
                    self._json(200 if waiting is None else 503, ready)
                else:
                    self._json(404, {"error": f"try {', '.join(paths[:-1])} or {paths[-1]}"})

            def _json(self, status: int, body: dict[str, str]) -> None:
                self._send(status, "application/json", json.dumps(body).encode())

            def _send(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Log nothing: a line for each scrape would hide the others."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SidstreamError(
                f"cannot listen on {host}:{port} ({error.strerror}); set {port_setting} to a free port"
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
