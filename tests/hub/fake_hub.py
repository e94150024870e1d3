"""A small Hub on loopback: what huggingface_hub asks of the real one to create, upload, commit and download."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"  # tokens


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # id -> {path: bytes}
    branches: dict = field(default_factory=dict)  # name -> id
    messages: list = field(default_factory=list)

    def commit(self, files: dict, branch: str = "main", message: str = "") -> str:
        tree = {**self.commits.get(self.branches.get(branch), {}), **files}
        identity = hashlib.sha1(repr((sorted(tree.items()), len(self.commits))).encode()).hexdigest()
        self.commits[identity] = tree
        self.branches[branch] = identity
        self.messages.append(message)
        return identity

    def files(self, branch: str = "main") -> dict:
        return self.commits[self.branches[branch]]


class FakeHub:
    """The server and what it holds; `requests` lists what it was asked: (method, path, headers)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files, by their SHA-256
        self.requests: list = []
        self.refuse: dict[tuple[str, str], int] = {}  # (method, start of path) -> status
        self.cuts: list[int] = []  # after how many bytes the next downloads of large files break off
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict, **options) -> Repo:
        """A repository as if it had been uploaded."""
        repo = self.repos[name] = Repo(**options)
        repo.commit(files)
        for content in files.values():
            self.objects[hashlib.sha256(content).hexdigest()] = content
        return repo

    def seen(self, method: str, part: str) -> list:
        return [request for request in self.requests if request[0] == method and part in request[1]]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for (method, start), status in self.hub.refuse.items():
            if method == self.command and path.startswith(start):
                return self._send(status, {"error": "refused by the test"})
        for pattern, method, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, **match.groupdict())
        return self._send(404, {"error": f"no such address: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, answer=None, headers: dict | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, status: int, code: str, message: str = "", **headers) -> None:
        self._send(status, {"error": message or code}, {"X-Error-Code": code, "X-Error-Message": message, **headers})

    # --- who may do what

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _readable(self, name: str) -> Repo | None:
        """The repository, or None once the refusal is sent: the real Hub tells no missing from a private one."""
        token, repo = self._token(), self.hub.repos.get(name)
        if token not in (None, WRITER, READER):
            self._send(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and token is None):
            self._fail(404, "RepoNotFound") if token else self._send(
                401, {}, {"X-Error-Message": "Invalid username or password."}
            )
        elif repo.gated and token is None:
            self._fail(401, "GatedRepo", "Access to this model is restricted")
        else:
            return repo
        return None

    def _writable(self, name: str) -> Repo | None:
        if self._token() != WRITER:
            self._send(403 if self._token() else 401, {"error": "You don't have the rights to write here"})
            return None
        return self._readable(name)

    # --- reading

    def _info(self, name: str, revision: str | None = None) -> None:
        if repo := self._readable(name):
            commit = _find(repo, revision or "main")
            files = [{"rfilename": path} for path in repo.commits[commit]]
            self._send(200, {"id": name, "private": repo.private, "sha": commit, "siblings": files})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._readable(name)
        if repo is None:
            return None
        commit = _find(repo, revision)
        if commit is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repo.commits[commit].get(path)
        if content is None:
            return self._fail(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        if not _is_large(path):
            etag = hashlib.sha1(content).hexdigest()
            return self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
        oid = hashlib.sha256(content).hexdigest()
        # Large files come from another host, which must not be told the token.
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return self._send(302, b"", {**headers, "Location": f"http://localhost:{self.hub.port}/cdn/{oid}"})

    def _cdn(self, oid: str) -> None:
        content, start = self.hub.objects[oid], 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
        part = content[start:]
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if not self.hub.cuts:
            return self._send(206 if start else 200, part, headers)
        self.close_connection = True
        cut = self.hub.cuts.pop(0)
        self._send(206 if start else 200, part[:cut], {**headers, "Content-Length": str(len(part))})
        return None

    # --- writing

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if self._token() != WRITER:
            self._send(403 if self._token() else 401, {"error": "You don't have the rights to create a model here"})
        elif name in self.hub.repos:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"})
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"  # older clients, newer ones
            self.hub.add(name, {".gitattributes": b""}, private=private)
            self._send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _branch(self, name: str, branch: str) -> None:
        if repo := self._writable(name):
            if branch in repo.branches:
                return self._send(409, {"error": "Reference already exists"})
            repo.branches[branch] = repo.branches["main"]
            self._send(200, {})
        return None

    def _validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        good = re.match(r"---\n.*^license: \S+\n.*^---\n", content, re.DOTALL | re.MULTILINE)
        errors = [] if good else [{"message": "no license"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, name: str, revision: str) -> None:
        if self._writable(name):
            modes = [
                {"path": item["path"], "uploadMode": "lfs" if _is_large(item["path"]) else "regular"}
                for item in json.loads(self.body)["files"]
            ]
            self._send(200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def _lfs_batch(self, name: str) -> None:
        if self._writable(name):
            answers = []
            for item in json.loads(self.body)["objects"]:
                href = {"href": f"{self.hub.endpoint}/upload/{item['oid']}"}
                there = item["oid"] in self.hub.objects
                answers.append(item if there else {**item, "actions": {"upload": href}})
            self._send(200, {"transfer": "basic", "objects": answers})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "another SHA-256"})
        self.hub.objects[oid] = self.body
        return self._send(200, {})

    def _commit(self, name: str, revision: str) -> None:
        repo = self._writable(name)
        if repo is None:
            return None
        if revision not in repo.branches:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._send(400, {"error": "the large file was not uploaded"})
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repo.commit(files, revision, lines[0]["value"]["summary"])
        return self._send(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _find(repo: Repo, revision: str) -> str | None:
    return repo.branches.get(revision) or (revision if revision in repo.commits else None)


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    (rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", ("GET", "HEAD"), _Handler._resolve),
    (r"/cdn/(?P<oid>\w+)", ("GET", "HEAD"), _Handler._cdn),
    (rf"/api/models/{_NAME}", ("GET",), _Handler._info),
    (rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", ("GET",), _Handler._info),
    (r"/api/repos/create", ("POST",), _Handler._create),
    (r"/api/validate-yaml", ("POST",), _Handler._validate_yaml),
    (rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)", ("POST",), _Handler._branch),
    (rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", ("POST",), _Handler._preupload),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", ("POST",), _Handler._lfs_batch),
    (r"/upload/(?P<oid>\w+)", ("PUT",), _Handler._put),
    (rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", ("POST",), _Handler._commit),
]
