"""An HTTP proxy before an S3 server that fails a share of the requests, in all the usual ways."""

from __future__ import annotations

import http.client
import random
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What is drawn from. "denied" and "stall" are only chosen: no repetition ends the one, and the
# other takes as long as a request may.
FAULTS = ("slow_down", "internal_error", "reset", "cut_short", "delay", "lost_answer")
_ANSWERS = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
}
_LONGEST_STALL_S = 120
_XML = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
    "<Message>injected</Message><RequestId>0</RequestId></Error>"
)
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class FaultProxy:
    """Passes requests on to a server of this machine.

    Args:
        port: of the server.
        rate: share of the requests that fail.
        seed: of the draws.
        choose: method and path of a request → the fault that it meets, or None for a draw.

    Attributes:
        is_down: while set, every connection is reset.
        faults: injected so far, by kind.
        requests: seen so far.
    """

    def __init__(
        self,
        port: int,
        *,
        rate: float = 0,
        seed: int = 0,
        choose: Callable[[str, str], str | None] = lambda method, path: None,
    ) -> None:
        self.port, self.rate, self.choose, self.is_down = port, rate, choose, False
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._rng, self._lock = random.Random(seed), threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, path: str) -> str | None:
        """Choose or draw what happens to a request."""
        with self._lock:
            self.requests += 1
            kind = None if self.is_down else self.choose(method, path)
            if self.is_down:
                kind = "reset"
            elif kind is None and self._rng.random() < self.rate:
                kind = self._rng.choice(FAULTS)
            if kind:
                self.faults["down" if self.is_down else kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _pass_on(self) -> None:
        body = self._body()
        kind = self.proxy.fault(self.command, urlsplit(self.path).path)
        if kind == "reset":
            self._reset()
        elif kind == "stall":
            self._wait_until_the_client_gives_up()
        elif kind in _ANSWERS:
            status, code = _ANSWERS[kind]
            self._answer(status, {}, _XML.format(code=code).encode())
        else:
            if kind == "delay":
                time.sleep(0.5)
            status, headers, content = self._ask(body)
            if kind == "lost_answer" or (kind == "cut_short" and len(content) < 2):
                self._reset()  # what was asked for has happened
            else:
                self._answer(status, headers, content, is_cut=kind == "cut_short")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=30)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP | {"expect"}:
                server.putheader(name, value)
        server.putheader("Content-Length", str(len(body)))
        server.endheaders(body)
        answer = server.getresponse()
        content = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length", "0")
        server.close()
        return answer.status, headers, content

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, *, is_cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self._reset()

    def _wait_until_the_client_gives_up(self) -> None:
        # Readable means closed: a client asks nothing more before it has an answer.
        select.select([self.connection], [], [], _LONGEST_STALL_S)
        self.close_connection = True

    def _reset(self) -> None:
        # Closing without lingering sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()
