"""A local HTTP server whose answers a test writes, also wrong ones, and what it was asked."""

import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOLDEN, CARD = "lorikeet.golden.safetensors", "README.md"


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: "FaultServer"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.owner.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        try:
            self.owner.routes.get(path, status(404))(self)
        except OSError:
            self.close_connection = True  # the client went away, as it should

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


Route = Callable[[Handler], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # the client went away, as it should
            super().handle_error(request, client_address)


class FaultServer:
    """Answers on 127.0.0.1 from `routes`, decoded path -> route; everything else is 404. A context manager.

    Args:
        tls: server-side context for https://; None: http://.

    `stopping` is set when the server is to end: a route that waits, waits for that.
    """

    def __init__(self, tls=None):
        self.routes: dict[str, Route] = {}
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        handler = type("OwnedHandler", (Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.authority = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http{'s' if tls else ''}://{self.authority}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def serve(self, folder, files):
        """Serve files, name -> content, under a folder."""
        self.routes |= {f"{folder}/{name}": content(data) for name, data in files.items()}

    def paths(self, method="GET"):
        return [request.path for request in self.requests if request.method == method]


def _head(handler, code, **headers):
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def content(data, **headers) -> Route:
    def route(handler):
        _head(handler, 200, **({"Content_Length": len(data)} | headers))
        if handler.command != "HEAD":
            handler.wfile.write(data)

    return route


def cut_off(data, announced) -> Route:
    """Announces another length than it sends, and hangs up."""

    def route(handler):
        _head(handler, 200, Content_Length=announced)
        handler.wfile.write(data)
        handler.close_connection = True

    return route


def chunked(data, *, complete=True) -> Route:
    def route(handler):
        _head(handler, 200, Transfer_Encoding="chunked")
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) + (b"0\r\n\r\n" if complete else b""))
        handler.close_connection = not complete

    return route


def without_length(data) -> Route:
    def route(handler):
        _head(handler, 200, Connection="close")
        handler.wfile.write(data)
        handler.close_connection = True

    return route


def endless() -> Route:
    def route(handler):
        _head(handler, 200, Transfer_Encoding="chunked")
        while not handler.owner.stopping.is_set():
            handler.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")

    return route


def trickle(announced=2**20) -> Route:
    """A byte now and then, and never the last."""

    def route(handler):
        _head(handler, 200, Content_Length=announced)
        while not handler.owner.stopping.wait(0.02):
            handler.wfile.write(b"x")

    return route


def trickle_headers() -> Route:
    def route(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not handler.owner.stopping.wait(0.02):
            handler.wfile.write(b"x")

    return route


def stall(before=b"") -> Route:
    """Sends what is given and then nothing, with the connection open."""

    def route(handler):
        handler.wfile.write(before)
        handler.wfile.flush()
        handler.owner.stopping.wait()
        handler.close_connection = True

    return route


def hang_up() -> Route:
    def route(handler):
        handler.close_connection = True

    return route


def raw(data) -> Route:
    def route(handler):
        handler.wfile.write(data)
        handler.close_connection = True

    return route


def status(code, **headers) -> Route:
    def route(handler):
        _head(handler, code, **({"Content_Length": 0} | headers))

    return route


def redirect(url, code=302, **headers) -> Route:
    return status(code, Location=url, **headers)


def in_turn(*routes) -> Route:
    """The first route for the first request, and so on; the last one for all further ones."""
    left = list(routes)

    def route(handler):
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return route
