"""An HTTP server in this process that serves one folder and can drop connections."""

import contextlib
import http.server
import threading


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of one folder, with single ranges. Closes the connection inside the responses numbered in `server.drop`."""

    protocol_version = "HTTP/1.1"
    ranges, etags = True, True

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, body):
        file = self.server.folder / self.path.split("?")[0].strip("/")
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        size = len(content)
        wanted = self.headers.get("Range") if self.ranges else None
        self.send_response(206 if wanted else 200)
        if wanted:
            begin, end = wanted.removeprefix("bytes=").split("-")
            begin, end = int(begin), min(int(end or size), size - 1)
            content = content[begin : end + 1]
            self.send_header("Content-Range", f"bytes {begin}-{end}/{size}")
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if self.etags:
            self.send_header("ETag", f'"{file.name}-{size}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return None
        with self.server.lock:
            self.server.answers += 1
            dropped = self.server.answers in self.server.drop
        if dropped:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        with contextlib.suppress(ConnectionError):  # a client that needs less may close the connection early
            self.wfile.write(content)
        return None

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(folder, drop=(), **attributes):
    """Yield the URL of a server, and the server; responses numbered in `drop` (from 1) are truncated."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handling", (Handler,), attributes))
    server.folder, server.drop, server.answers, server.lock = folder, set(drop), 0, threading.Lock()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        server.server_close()
