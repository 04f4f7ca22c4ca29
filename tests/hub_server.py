"""A hub for tests: the few routes of the Hugging Face hub that are asked for here, over real HTTP on this machine.

`with Hub() as hub: hub.add("someone/tales", {"train": [...]})`, then point HF_ENDPOINT at `hub.url`; `hub.add_model`
offers a model folder, and what is pushed with `hub.token` lands in `hub.models`. `hub.fault` makes it misbehave: "500"
(any such number) answers every request with that error, "gated" asks for a login, "slow" lets files wait, "cut" ends
each large file in the middle, "short" gives half of it as if it were all.
"""
from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq

LARGE = (".parquet", ".safetensors")  # what takes the time
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos, self.fault, self.requests = {}, None, []
        self.models, self.private, self.stored, self.token = {}, {}, {}, "hf_loopback"
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.fault = "gone"
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address): pass  # a client that hung up is what some tests are about

    def add(self, repo: str, splits: dict[str, list[dict]], config: str = "default"):
        "Offer a dataset: rows of each split"
        files = self.repos.setdefault(repo, {})
        for split, rows in splits.items():
            out = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), out)
            files[f"{config}/{split}-00000-of-00001.parquet"] = out.getvalue()
        files.pop("README.md", None)
        configs = {}
        for path in files: configs.setdefault(path.split("/")[0], []).append(path)
        lines = ["---", "configs:"]
        for name, paths in configs.items():
            lines += [f"- config_name: {name}", "  data_files:"]
            for path in paths: lines += [f"  - split: {path.split('/')[1].split('-')[0]}", f"    path: {path}"]
        files["README.md"] = "\n".join([*lines, "---", "# A dataset"]).encode()

    def add_model(self, repo: str, folder):
        "Offer a model: the files of a folder"
        files = (p for p in folder.rglob("*") if p.is_file())
        self.models[repo] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def do_HEAD(self): self.answer(body=False)
    def do_GET(self): self.answer()
    def do_POST(self): self.answer()
    def do_PUT(self): self.answer()

    def send(self, code: int, body: bytes = b"", kind="application/json", headers: dict | None = None, head=False):
        self.send_response(code)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if not head: self.wfile.write(body)

    def answer(self, body: bool = True):
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, _ = self.path.partition("?")
        self.server.requests.append(f"{self.command} {path}")
        if (self.server.fault or "").isdigit():
            return self.send(int(self.server.fault), b'{"error": "Not now"}', head=not body)
        if self.server.fault == "gated" and "/resolve/" in path:
            return self.send(403, b'{"error": "Ask for access"}', headers={"X-Error-Code": "GatedRepo"}, head=not body)
        if self.command == "PUT" or path in ("/api/repos/create", "/api/validate-yaml") or "/preupload/" in path or (
                path.endswith("/info/lfs/objects/batch") or "/commit/" in path): return self.push(path, sent)
        for repo, files in self.server.models.items():
            if path.startswith(f"/api/models/{repo}"):
                return self.api(repo, files, path.removeprefix(f"/api/models/{repo}").strip("/"), sent)
            if path.startswith(f"/{repo}/resolve/"):
                return self.file(files, path.removeprefix(f"/{repo}/resolve/").partition("/")[2], body)
        for repo, files in self.server.repos.items():
            if path.startswith(f"/api/datasets/{repo}"):
                return self.api(repo, files, path.removeprefix(f"/api/datasets/{repo}").strip("/"), sent)
            if path.startswith(f"/datasets/{repo}/resolve/"):
                return self.file(files, path.removeprefix(f"/datasets/{repo}/resolve/").partition("/")[2], body)
        self.send(404, b'{"error": "Repository not found"}', headers={"X-Error-Code": "RepoNotFound"}, head=not body)

    def api(self, repo: str, files: dict, rest: str, sent: bytes):
        def entry(p):
            return {"type": "file", "path": p, "size": len(files[p]), "oid": hashlib.sha1(files[p]).hexdigest()}
        what, _, folder = rest.partition("/")
        if what == "revision" and folder not in ("main", REVISION):
            return self.send(404, b'{"error": "Invalid rev id"}', headers={"X-Error-Code": "RevisionNotFound"})
        folder = folder.partition("/")[2]
        if what == "tree":
            inside = [p for p in files if p.startswith(folder + "/" if folder else "")]
            names = {p[:p.index("/", len(folder) + 1)] for p in inside if "/" in p[len(folder) + 1:]}
            flat = [entry(p) for p in inside if "/" not in p[len(folder) + 1 if folder else 0:]]
            found = flat + [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(names)]
        elif what == "paths-info":
            try: paths = json.loads(sent)["paths"]
            except ValueError: paths = [part.partition("=")[2].replace("%2F", "/") for part in sent.decode().split("&")]
            found = [entry(p) for p in paths if p in files]
        else:
            siblings = [{"rfilename": p, "size": len(data)} for p, data in files.items()]
            found = {"id": repo, "sha": REVISION, "private": False, "gated": False, "disabled": False, "downloads": 0,
                     "likes": 0, "tags": [], "siblings": siblings}
        self.send(200, json.dumps(found).encode())

    def push(self, path: str, sent: bytes):
        "What makes a repository and puts files into it, for who has the token"
        hub, said = self.server, json.loads(sent) if self.command == "POST" and "/commit/" not in path else {}
        if self.command == "PUT":
            hub.stored[path.rpartition("/")[2]] = sent
            return self.send(200)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.send(401, b'{"error": "Invalid username or password."}')
        if path == "/api/validate-yaml": return self.send(200, b'{"errors": [], "warnings": []}')
        if path == "/api/repos/create":
            repo = f"{said['organization']}/{said['name']}"
            if repo in hub.models:
                return self.send(409, json.dumps({"error": "exists", "url": f"{hub.url}/{repo}"}).encode())
            hub.models[repo], hub.private[repo] = {}, said.get("visibility") == "private" or said.get("private")
            return self.send(200, json.dumps({"url": f"{hub.url}/{repo}", "id": repo, "name": repo}).encode())
        if "/preupload/" in path:
            def mode(name): return "lfs" if name.endswith((".safetensors", ".gguf")) else "regular"
            found = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in said["files"]]
            return self.send(200, json.dumps({"files": found}).encode())
        if path.endswith("/info/lfs/objects/batch"):
            found = [{**o, "actions": {"upload": {"href": f"{hub.url}/store/{o['oid']}"}}} for o in said["objects"]]
            return self.send(200, json.dumps({"transfer": "basic", "objects": found}).encode())
        repo = path.removeprefix("/api/models/").partition("/commit/")[0]
        files = hub.models[repo]
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file": files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile": files[value["path"]] = hub.stored[value["oid"]]
        self.send(200, json.dumps({"commitUrl": f"{hub.url}/{repo}/commit/{REVISION}", "commitOid": REVISION}).encode())

    def file(self, files: dict, path: str, body: bool):
        about = {"X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if path not in files:
            return self.send(404, b"Entry not found", headers=about | {"X-Error-Code": "EntryNotFound"}, head=not body)
        content, code = files[path], 200
        about["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and body:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first or 0), int(last or len(content) - 1)
            about["Content-Range"], code = f"bytes {first}-{last}/{len(content)}", 206
            content = content[first:last + 1]
        if body and self.server.fault == "slow" and path.endswith(LARGE): time.sleep(8)
        if self.server.fault == "short" and path.endswith(LARGE): content = content[:len(content) // 2]
        if body and self.server.fault == "cut" and path.endswith(LARGE):
            self.send(code, content, "application/octet-stream", about, head=True)
            self.wfile.write(content[:len(content) // 2])
            self.close_connection = True
            return
        self.send(code, content, "application/octet-stream", about, head=not body)
