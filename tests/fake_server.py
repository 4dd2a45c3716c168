"""`serve-teacher` on Python's own http.server, for what only a server that lies needs: a hand in every answer.

The scorer is the real one and speaks three protocols (`dialects.py`); HTTP is not, and nothing is bounded.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dialects import EveryDialect
from xtokmap.teachers import sums
from xtokmap.teachers.scorer import Limits, RefusedError, Scorer


class TeacherServer(ThreadingHTTPServer):
    """As `teachers.server.TeacherServer`; `answer` may be replaced, and `Handler.reply` by what `handler` returns."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, model, tokenizer, *, name="teacher", limits=None, key=""):
        super().__init__(("127.0.0.1", 0), self.handler())
        self.name, self.key, self.answered = name, key, 0
        self.scorer = Scorer(model, limits or Limits())
        self.answers = EveryDialect(self.scorer, tokenizer, name)
        self._lock, self._busy = threading.Lock(), 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handler(self):
        return Handler

    def handle_error(self, request, client_address):
        """A connection that breaks between requests is nobody's error; anything else is printed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def close(self, patience=10.0):
        self.shutdown()
        deadline = time.monotonic() + patience
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.01)
        self.server_close()
        self.scorer.close()

    def answer(self, method, path, body):
        route = self.answers.route(method, path)
        asked = route.understand(body)
        return asked.answer([row.result() for row in self.scorer.submit(asked.rows, asked.read)])


class Handler(BaseHTTPRequestHandler):
    """One connection; requests come one after the other."""

    protocol_version = "HTTP/1.1"
    # An answer goes out in one piece and at once, or every request would wait for an acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    timeout = 600

    def do_GET(self):
        self._serve("GET")

    def do_POST(self):
        self._serve("POST")

    def _serve(self, method):
        with self.server._lock:
            self.server._busy += 1
        try:
            path = self.path.partition("?")[0].rstrip("/")
            try:
                length = int(self.headers.get("Content-Length", "0"))
                body = self.rfile.read(length) if method == "POST" else None
                if body is not None and path != sums.PATH:
                    body = json.loads(body)
                if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
                    raise RefusedError(401, "the API key is missing or not the one of this server")
                status, found, headers = 200, self.server.answer(method, path, body), {}
            except RefusedError as error:
                status, found, headers = error.status, {"error": {"message": str(error)}}, dict(error.headers)
            except Exception as error:  # a defect costs one request
                status, found, headers = 500, {"error": {"message": f"internal error: {error}"}}, {}
            self.reply(status, found, headers)
            self.wfile.flush()
        except OSError:  # whoever asked is gone
            self.close_connection = True
        finally:
            with self.server._lock:
                self.server._busy -= 1

    def reply(self, status, found, headers):
        """Sends an answer."""
        content = found if isinstance(found, bytes) else json.dumps(found, allow_nan=False).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        with self.server._lock:  # before a client can know
            self.server.answered += status == 200
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing: a line a request helps nobody."""
