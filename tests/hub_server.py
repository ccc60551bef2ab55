"""A stand-in for the Hugging Face hub: it answers the requests of a download from a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(name: str, folder: Path) -> Iterator[str]:
    """The address of a hub with the repository ``name``, whose files are those of ``folder``."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    oids = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}  # as git's

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, _ = self.path.partition("?")
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [{"type": "file", "path": p, "size": len(files[p]), "oid": oids[p]} for p in files]
                return self.answer(200, json.dumps(tree).encode())
            if path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": path} for path in files]
                return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            file = "/".join(path.split("/")[5:]) if path.startswith(f"/{name}/resolve/") else ""
            if file not in files:
                return self.answer(404, b"")
            return self.answer(200, files[file], {"ETag": f'"{oids[file]}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET  # noqa: N815

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing in the output of a test."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
