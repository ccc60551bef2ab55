"""A stand-in for the Hugging Face hub: it answers the requests of a download from a folder, and of an upload."""

from __future__ import annotations

import base64
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
    """The address of a hub with the repository ``name``, whose files are those of ``folder`` and those uploaded."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def oid(path: str) -> str:
        return hashlib.sha1(files[path]).hexdigest()  # as git's

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, _ = self.path.partition("?")
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [{"type": "file", "path": p, "size": len(files[p]), "oid": oid(p)} for p in files]
                return self.answer(200, json.dumps(tree).encode())
            if path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": path} for path in files]
                return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            file = "/".join(path.split("/")[5:]) if path.startswith(f"/{name}/resolve/") else ""
            if file not in files:
                return self.answer(404, b"")
            return self.answer(200, files[file], {"ETag": f'"{oid(file)}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.path == "/api/repos/create":
                return self.answer_json({"url": f"http://{self.headers['Host']}/{name}"})
            if self.path.startswith(f"/api/models/{name}/preupload/"):
                asked = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
                return self.answer_json({"files": modes})
            if self.path.startswith(f"/api/models/{name}/commit/"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
                return self.answer_json({"commitUrl": commit, "commitOid": COMMIT})
            return self.answer_json({}, 200 if self.path == "/api/validate-yaml" else 404)

        def answer_json(self, value: object, status: int = 200) -> None:
            self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing in the output of a test."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
