"""A model hub on this machine that takes uploads and nothing else: as much of the Hugging Face API as `hf upload` asks for."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


@dataclass
class LoopbackHub:
    """What was uploaded.

    Attributes:
        url: of the hub.
        files: content by repository and path, such as `OWNER/NAME/model.gguf`.
        asked: method and path of every request.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A hub for the time of the block."""
    hub = LoopbackHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"name": "somebody", "auth": {}, "sha": COMMIT, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path.partition("?")[0]):
                for entry in map(json.loads, body.splitlines()):
                    if entry["key"] == "file":
                        value = entry["value"]
                        hub.files[f"{match[1]}/{value['path']}"] = base64.b64decode(value["content"])
                self._answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{match[1]}/commit/{COMMIT}"})
            elif "/preupload/" in self.path:
                wanted = json.loads(body)["files"]
                listed = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wanted]
                self._answer({"files": listed})
            else:  # /api/repos/create
                wanted = json.loads(body)
                self._answer({"url": f"{hub.url}/{wanted.get('organization') or 'somebody'}/{wanted.get('name')}"})

        def _answer(self, document: dict[str, Any]) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
