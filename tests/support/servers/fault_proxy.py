"""An HTTP proxy before a store, which does to chosen requests what networks and stores do."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal["status", "reset", "hang", "lost_reply", "cut", "flip", "flip_request"]
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


@dataclass
class Fault:
    """Happens to the next `times` requests of this method whose path has `path` in it."""

    kind: Kind
    method: str = "PUT"
    path: str = ""
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 60.0  # of a hang


@dataclass
class FaultProxy:
    """`url` is what a client is told; `requests` what it asked, as (method, path)."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    drops_conditions: bool = False  # as if the store had never heard of If-None-Match
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def fault_proxy(host: str, port: int) -> Iterator[FaultProxy]:
    """Before the server at host and port."""
    proxy = FaultProxy()

    class Handler(_Handler):
        shared = proxy
        target = (host, port)

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a client that dies in the middle of a request is what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: FaultProxy
    target: tuple[str, int]

    def _serve(self) -> None:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self._body()
        fault = self.shared.take(self.command, self.path)
        kind = fault.kind if fault else None
        if fault and kind == "status":
            text = f"<Error><Code>{fault.code}</Code><Message>a fault</Message></Error>".encode()
            self._answer(fault.status, [("Content-Type", "application/xml")], text)
            return
        if fault and kind == "hang":
            time.sleep(fault.seconds)
        if kind in ("hang", "reset"):
            self._reset()
            return
        if kind == "flip_request":
            body = _flipped(body)
        status, headers, content = self._forward(body)
        if kind == "lost_reply":
            self._reset()
            return
        if kind == "flip" and content:
            content = _flipped(content)
        self._answer(status, headers, content, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests look at `requests`."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = HTTPConnection(*self.target, timeout=120)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP | {"expect"}}
        headers["Content-Length"] = str(len(body))
        if self.shared.drops_conditions:
            headers.pop("If-None-Match", None)
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        content = response.read()
        kept = [(n, v) for n, v in response.getheaders() if n.lower() not in HOP_BY_HOP | {"content-length"}]
        if self.command == "HEAD":
            kept.append(("Content-Length", response.getheader("Content-Length", "0")))
        connection.close()
        return response.status, kept, content

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name == "Content-Length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """Ends the connection as a dead peer does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def _flipped(content: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
