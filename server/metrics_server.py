"""Serves /metrics from threads of its own, so that a scrape works while the event loop is busy.

NOTE: always Prometheus' text format 0.0.4, whatever the scraper accepts. Asked for OpenMetrics, as Prometheus 2 does,
prometheus-client 0.26 writes `vllm:...` as `vllm_...`, and no gateway would find these names.
"""

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, disable_created_metrics, generate_latest

from .addresses import cannot_listen


class MetricsServer:
    """Listens from the start; `close` it.

    Args:
        host, port: where to listen; port 0 is any free one.
        registry: what to serve.

    Attributes:
        port: where it listens.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        # A `_created` series beside each counter and histogram would nearly double what is scraped, for no use here.
        disable_created_metrics()  # type: ignore[no-untyped-call]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.partition("?")[0] in ("/", "/metrics")
                body = generate_latest(registry) if found else b"Metrics are at /metrics.\n"
                self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
                self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not worth a log line."""

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise cannot_listen("/metrics", host, port, "--metrics-") from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that hangs up early is no error of ours."""
