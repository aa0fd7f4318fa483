"""A local server with the parts of the Hugging Face hub's interface that downloads use, and with plain files."""

import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HUB_PATH = re.compile(r"(?:/api/models|(?:/api)?/datasets)?/(\w+/\w+)(?:/(resolve|revision|tree)/([^/]+)(?:/(.+))?)?")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Server(ThreadingHTTPServer):
    """Serve files of hub repositories and at plain paths; keep the requests, and fail on demand."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}  # name: {revision: (commit, {file: content})}
        self.files = {}  # path: content
        self.etags = {}  # path: etag, where it is not that of the content
        self.faults = {}  # path: what goes wrong: words of "half, then silent, no ranges, slow", or a status
        self.requests = []  # (method, path, Range)

    def bodies(self, end):
        """Return the ranges requested of paths with this end; requests for the first byte alone do not count."""
        return [r for m, path, r in self.requests if m == "GET" and path.endswith(end) and r != "bytes=0-0"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers["Range"]))
        self.path = self.path.partition("?")[0]
        fault = self.server.faults.get(self.path)
        if (self.headers["User-Agent"] or "").startswith("Python-urllib"):  # as many servers do
            self.answer(403)
        elif isinstance(fault, int):
            self.answer(fault)
        elif self.path in self.server.files:
            self.send(self.server.files[self.path], {})
        elif match := HUB_PATH.fullmatch(self.path):
            self.hub(*match.groups())
        else:
            self.answer(404)

    def hub(self, name, kind, revision, file):
        if name == "arm/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if name not in self.server.repositories:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        revisions = self.server.repositories[name]
        revision = next((name for name, (commit, _) in revisions.items() if commit == revision), revision or "main")
        if revision not in revisions:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = revisions[revision]
        if kind == "tree":
            entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": commit} for file in files]
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())
        if file is None:
            siblings = [  # as of files in Git LFS, whose ETag is the hash of their content
                {"rfilename": f, "size": len(c), "lfs": {"sha256": sha256(c), "size": len(c), "pointerSize": 134}}
                for f, c in files.items()
            ]
            body = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
            return self.answer(200, {"Content-Type": "application/json"}, body)
        if file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = self.server.etags.get(self.path, sha256(files[file]))
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": len(files[file]), "X-Repo-Commit": commit}
        return self.send(files[file], linked)

    def send(self, content, headers):
        fault = self.server.faults.get(self.path, "")
        etag = self.server.etags.get(self.path, f'"{sha256(content)}"')
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **headers}
        size, start, status = len(content), 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if wanted and "no ranges" not in fault:
            start, stop, status = int(wanted[1]), int(wanted[2] or size - 1) + 1, 206
            if start >= size:
                return self.answer(416)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            content = content[start:stop]
        half = "half" in fault and len(content) > 1 and start == 0 and self.command == "GET"
        if "slow" in fault and len(content) > 1:
            time.sleep(0.5)
        return self.answer(status, headers, content, len(content) // 2 if half else None)

    def answer(self, status, headers=None, body=b"", sent=None):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        if sent is not None and "silent" in self.server.faults[self.path]:
            time.sleep(30)
        self.close_connection = self.close_connection or sent is not None
