"""An OpenAI-compatible server that judges, or fails, as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class JudgeServer:
    """Where it listens, what it was asked, and what it does; `answer` returns a status and a body."""

    url: str
    answer: Callable[[str], tuple[int, str]]
    asked: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


def completion(text: str) -> tuple[int, str]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
    return 200, json.dumps(body)


@contextmanager
def judge_server(answer: Callable[[str], tuple[int, str]]) -> Iterator[JudgeServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = request["messages"][-1]["content"]
            served.asked.append(question)
            served.keys.append(self.headers["Authorization"])
            status, body = served.answer(question)
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body.encode())
            except OSError:  # who asked has gone
                return

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        served = JudgeServer(f"http://127.0.0.1:{server.server_port}/v1", answer)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            served.released.set()
            server.shutdown()
            thread.join()
