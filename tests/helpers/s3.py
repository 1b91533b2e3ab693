"""A real S3 server (moto) on a free port, and a proxy before it that injects faults and counts requests.

moto ignores Content-MD5, and fails when an upload that has ended is completed: the proxy does both as S3 does.
"""

import base64
import contextlib
import hashlib
import http.client
import http.server
import logging
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret-but-must-not-be-logged",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "*",
}


class Store:
    """The server behind its proxy."""

    def __init__(self, server: str, proxy: "_Proxy"):
        self.server, self.proxy = server, proxy
        self.endpoint = f"http://127.0.0.1:{proxy.server_port}"
        self.env = {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}
        self._client: Any = None

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """The environment of this process is that of a client."""
        from mythos_dist.store.s3 import forget_clients

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env.items():
                patch.setenv(name, value)
            for name in ("S3_ENDPOINT_URL", "AWS_PROFILE"):
                patch.delenv(name, raising=False)
            forget_clients()
            yield
        forget_clients()

    def client(self) -> Any:
        """A boto3 client that does not go through the proxy; always the same one, as each takes 0.1 s to create."""
        if self._client is None:
            import boto3

            self._client = boto3.session.Session().client(
                "s3",
                endpoint_url=self.server,
                aws_access_key_id="test",
                aws_secret_access_key="test",
                region_name="us-east-1",
            )
        return self._client

    def create_bucket(self, bucket: str) -> str:
        """A new bucket; returns the URL of a folder in it."""
        self.client().create_bucket(Bucket=bucket)
        return f"s3://{bucket}/data"

    def content(self, url: str) -> dict[str, bytes]:
        """All objects below a folder, by their names below it."""
        bucket, _, folder = url.removeprefix("s3://").partition("/")
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{folder}/")
        keys = [one["Key"] for page in pages for one in page.get("Contents", ())]
        return {
            key.removeprefix(f"{folder}/"): client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys
        }

    def upload(self, folder: Path, bucket: str) -> str:
        """Copy a folder to a new bucket; returns its URL."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.upload_file(str(file), bucket, f"data/{file.relative_to(folder).as_posix()}")
        return f"s3://{bucket}/data"

    @property
    def downloads(self) -> Counter[str]:
        """Bodies sent without a fault, by the objects' names below the bucket's folder `data`."""
        with self.proxy.lock:
            return Counter(path.partition("/data/")[2] for path in self.proxy.complete)

    def reset(self) -> None:
        """No faults, and counts from zero."""
        with self.proxy.lock:
            self.proxy.complete.clear()
            self.proxy.requests.clear()
            self.proxy.log.clear()
            self.proxy.written.clear()
            self.proxy.fault = lambda path, number: None
            self.proxy.latency, self.proxy.bytes_per_second = 0.0, 0.0
            self.proxy.sent.clear()
            self.proxy.rewrite = lambda path, body: body


# What happens to a request: an HTTP status, or one with S3's code, "reset" (no response), ("truncate", share) or
# ("corrupt", share) of the body, or "stall" (nothing is sent after half the body, until the client closes). The body is
# the one that the client sends, if it sends one.
Fault = int | str | tuple[int, str] | tuple[str, float] | None


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()  # by path
        self.complete: list[str] = []  # paths of bodies sent without a fault
        self.log: list[tuple[str, str]] = []  # (method, path and query) of all requests
        self.written: list[tuple[str, str]] = []  # (PUT or DELETE, path) of those that the server has executed
        self.ended: set[str] = set()  # ids of multipart uploads that were completed or aborted
        self.fault: Callable[[str, int], Fault] = lambda path, number: None  # of the n-th request (from 1) of a path
        self.latency = 0.0  # seconds before each response
        self.bytes_per_second = 0.0  # of each connection; 0: unlimited
        self.sent: Counter[tuple[str, str]] = Counter()  # bytes of bodies, by AWS_EXECUTION_ENV of the client and path
        self.rewrite: Callable[[str, bytes], bytes] = lambda path, body: body  # of a response; path with its query

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not an error."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def do_GET(self) -> None:
        self._forward()

    def do_HEAD(self) -> None:
        self._forward()

    def do_PUT(self) -> None:
        self._forward()

    def do_POST(self) -> None:
        self._forward()

    def do_DELETE(self) -> None:
        self._forward()

    def _forward(self) -> None:
        proxy, path = self.server, self.path.partition("?")[0]
        with proxy.lock:
            proxy.requests[path] += 1
            proxy.log.append((self.command, self.path))
            fault = proxy.fault(path, proxy.requests[path])
        time.sleep(proxy.latency)
        if fault == "reset":
            return self._reset()
        if self.command in ("PUT", "POST"):
            sent = self._receive(fault)
            if sent is None:
                return self._reset()
            wanted = self.headers.get("Content-MD5")
            if wanted and wanted != base64.b64encode(hashlib.md5(sent).digest()).decode():
                fault = (400, "BadDigest")
            elif isinstance(fault, tuple) and isinstance(fault[0], str):
                fault = None
        else:
            sent = b""
        upload = dict(parse_qsl(self.path.partition("?")[2])).get("uploadId", "")
        if upload in proxy.ended and fault is None:
            fault = (404, "NoSuchUpload")
        status, code = fault if isinstance(fault, tuple) else (fault, "Injected")
        if isinstance(status, int):
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")
            return None
        upstream = http.client.HTTPConnection(proxy.upstream.removeprefix("http://"), timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        headers.pop("Expect", None)
        upstream.request(self.command, self.path, sent or None, {**headers, "Host": self.headers["Host"]})
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        if self.command == "GET":
            body = proxy.rewrite(self.path, body)
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if upload and self.command in ("POST", "DELETE") and response.status < 300:
            proxy.ended.add(upload)
        if self.command in ("PUT", "DELETE") and response.status < 300:
            with proxy.lock:
                proxy.written.append((self.command, path))
        if self.command != "HEAD":
            if self.command == "GET" and fault is None and response.status in (200, 206):
                with proxy.lock:  # before it is sent: then the client may ask for the counts
                    proxy.complete.append(path)
            self._send(body, fault)
        return None

    def _receive(self, fault: Fault) -> bytes | None:
        """The body that the client sends, at the rate of the proxy; None: the connection is cut in the middle of it."""
        proxy, length, body = self.server, int(self.headers.get("Content-Length") or 0), b""
        kind, share = fault if isinstance(fault, tuple) else (fault, 1.0)
        until = int(length * share) if kind in ("truncate", "stall") else length
        step = max(1, int(proxy.bytes_per_second / 50)) if proxy.bytes_per_second else 1 << 20
        while len(body) < until:
            body += self.rfile.read(min(step, until - len(body)))
            if proxy.bytes_per_second:
                time.sleep(step / proxy.bytes_per_second)
        if kind == "stall":
            self.connection.settimeout(60)
            with contextlib.suppress(OSError):
                while self.connection.recv(1 << 16):
                    time.sleep(0.01)
        if until < length:
            return None
        if kind == "corrupt" and body:
            at = int(len(body) * share)
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        return body

    def _send(self, body: bytes, fault: Fault) -> None:
        kind, share = fault if isinstance(fault, tuple) else (fault, 0.5)
        at = int(len(body) * share)
        if kind == "corrupt":
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if kind in ("truncate", "stall"):
            body = body[:at]
        client = self.headers.get("User-Agent", "").partition("exec-env/")[2].partition(" ")[0]
        with self.server.lock:
            self.server.sent[client, self.path.partition("?")[0]] += len(body)
        rate = self.server.bytes_per_second
        step = max(1, int(rate / 50)) if rate else max(1, len(body))
        for begin in range(0, len(body), step):
            self.wfile.write(body[begin : begin + step])
            time.sleep(step / rate if rate else 0)
        if kind == "stall":
            self.wfile.flush()
            self.connection.settimeout(60)
            with contextlib.suppress(OSError):
                self.connection.recv(1)
        if kind in ("truncate", "stall"):
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        # RST instead of FIN: the client sees "connection reset by peer".
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile.flush()
        self.connection.close()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def serving_s3() -> Iterator[Store]:
    """A server and its proxy in threads of this process."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    proxy = _Proxy(f"http://{host}:{port}")
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield Store(f"http://{host}:{port}", proxy)
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()
