"""A server on loopback that speaks as much of the Hugging Face Hub's HTTP API as huggingface_hub and datasets call."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# As in the .gitattributes of new repositories.
# Of a card: what the Hub takes as dataset.type of a result, and as a repository elsewhere; and of branches.
DATASET_TYPE = re.compile(r"([\w-]+/)?[\w.-]+", re.ASCII)
REPO_ID = re.compile(r"[\w-]+/[\w.-]+", re.ASCII)
BRANCH = re.compile(r"(?!.*\.\.)[\w][\w./-]*", re.ASCII)
LFS = (".safetensors", ".npy", ".parquet", ".bin", ".faiss", ".png", ".model")


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def wrong_metadata(data):
    """What the Hub says against the metadata of a card."""
    for index in data.get("model-index") or []:
        for result in index["results"]:
            if not DATASET_TYPE.fullmatch(str(result["dataset"]["type"])):
                yield '"model-index[0].results[0].dataset.type" fails to match the required pattern'
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not REPO_ID.fullmatch(str(value)):
                yield f'"{key}" with value "{value}" is not valid'


@dataclass
class Repository:
    private: bool = False
    branches: dict = field(default_factory=dict)  # name to commit
    commits: dict = field(default_factory=dict)  # hash to files by path
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message):
        number = f"{len(self.commits)} {branch} {sorted(files)}"
        oid = hashlib.sha1(number.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def find(self, revision):
        """Commit and files of a branch or commit, `None` if there is none."""
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class Hub:
    """
    The state of the server; tokens are `token-USER`.

    Switches: after `fail_after` uploads of content the server refuses all others, and whatever is in `fail` (a part of
    a path) is refused, both with the status `fail_with`. A commit waits for the event `hold`, if there is one.
    """

    def __init__(self):
        self.repositories = {}
        self.stored = {}  # content by SHA-256
        self.uploads = []  # of each content, its SHA-256
        self.storing = threading.Lock()
        self.requests = Counter()
        self.fail_after, self.fail, self.fail_with = None, None, 507
        self.hold = None

    def start(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id, repo_type="model", revision="main"):
        return self.repositories[repo_type, repo_id].find(revision)[1]


class _Error(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _handle(self):
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), url.path
        self.body = self._read()
        self.hub.requests[self.command, re.sub("[0-9a-f]{40,64}", "*", path)] += 1
        try:
            if self.hub.fail and self.hub.fail in path:
                raise _Error(self.hub.fail_with, "the disk of the Hub is full")
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if method == self.command and found:
                    return answer(self, **{name: unquote(value or "") for name, value in found.groupdict().items()})
            raise _Error(404, f"{self.command} {path} is not spoken here")
        except _Error as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send({"error": str(error)}, error.status, headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _handle

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for what

    @property
    def user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and not token.startswith("token-"):
            raise _Error(401, "Invalid credentials in Authorization header")
        return token.removeprefix("token-") or None

    def _repository(self, kind, repo_id):
        repository = self.hub.repositories.get((kind, repo_id))
        if repository is None or repository.private and self.user != repo_id.split("/")[0]:
            raise _Error(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, kind, repo_id):
        if self.user is None:
            raise _Error(401, "Invalid username or password.")
        repository = self._repository(kind, repo_id)
        if self.user != repo_id.split("/")[0]:
            raise _Error(403, "You don't have the required permissions")
        return repository

    def _found(self, repository, revision):
        found = repository.find(revision)
        if found is None:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # Repositories

    def whoami(self):
        if self.user is None:
            raise _Error(401, "Invalid username or password.")
        self._send({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        given = json.loads(self.body)
        if self.user is None:
            raise _Error(401, "Invalid username or password.")
        owner = given.get("organization") or self.user
        if owner != self.user:
            raise _Error(403, "You don't have the rights to create a model under the namespace")
        kind, repo_id = given.get("type") or "model", f"{owner}/{given['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            return self._send({"error": "You already created this repo", "url": url}, 409)
        private = given.get("private", False) or given.get("visibility") == "private"
        repository = self.hub.repositories[kind, repo_id] = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._send({"url": url, "name": repo_id, "id": repo_id})

    def branch(self, kind, repo_id, name):
        repository = self._writable(kind, repo_id)
        if not BRANCH.fullmatch(name):
            raise _Error(400, f"Invalid reference name: {name}")
        if name in repository.branches:
            raise _Error(409, "Reference already exists")
        repository.branches[name] = repository.branches["main"]
        self._send({})

    def info(self, kind, repo_id, revision="main"):
        repository = self._repository(kind, repo_id)
        oid, files = self._found(repository, revision or "main")
        self._send(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": oid,
                "private": repository.private,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "disabled": False,
                "gated": False,
                "siblings": [{"rfilename": name} for name in sorted(files)],
            }
        )

    def tree(self, kind, repo_id, revision, folder=""):
        repository = self._repository(kind, repo_id)
        _, files = self._found(repository, revision)
        inside = {name for name in files if name.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Error(404, f"{folder} does not exist", "EntryNotFound")
        depth = len(folder.split("/")) if folder else 0
        rows = {}
        for name in sorted(inside):
            parts = name.split("/")
            if (
                "recursive" in self.query
                and self.query["recursive"][0].lower() in ("true", "1")
                or len(parts) == depth + 1
            ):
                rows[name] = self._entry(name, files[name])
            for end in range(depth + 1, len(parts)):
                if (
                    "recursive" in self.query
                    and self.query["recursive"][0].lower() in ("true", "1")
                    or end == depth + 1
                ):
                    path = "/".join(parts[:end])
                    rows[path] = {"type": "directory", "path": path, "oid": git_hash(path.encode()), "size": 0}
        self._send(list(rows.values()))

    def paths_info(self, kind, repo_id, revision):
        repository = self._repository(kind, repo_id)
        _, files = self._found(repository, revision)
        asked = parse_qs(self.body.decode()).get("paths") or []
        if not asked and self.body.startswith(b"{"):
            asked = json.loads(self.body)["paths"]
        rows = [self._entry(name, files[name]) for name in asked if name in files]
        folders = [name for name in asked if any(path.startswith(f"{name}/") for path in files)]
        rows += [{"type": "directory", "path": name, "oid": git_hash(name.encode()), "size": 0} for name in folders]
        self._send(rows)

    def _entry(self, name, content):
        row = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        if name.endswith(LFS):
            sha256 = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return row

    # Downloads

    def resolve(self, kind, repo_id, revision, name):
        repository = self._repository(kind, repo_id)
        oid, files = self._found(repository, revision)
        if name not in files:
            raise _Error(404, "Entry not found", "EntryNotFound")
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LFS) else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"}
        if name.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(content[first : last + 1], 206, headers)
        self._send(content, 200, headers)

    # Uploads

    def validate(self):
        content = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        errors = [] if found else [{"message": "there is no metadata"}]
        errors += [{"message": line} for line in wrong_metadata(yaml.safe_load(found[1]) or {})] if found else []
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind, repo_id, revision):
        repository = self._writable(kind, repo_id)
        _, files = self._found(repository, revision)
        rows = []
        for file in json.loads(self.body)["files"]:
            name, lfs = file["path"], file["path"].endswith(LFS) or file["size"] > 10 * 2**20
            row = {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": None}
            if name in files:
                row["oid"] = hashlib.sha256(files[name]).hexdigest() if lfs else git_hash(files[name])
            rows.append(row)
        self._send({"files": rows})

    def batch(self, kind, repo_id):
        self._writable(kind.removesuffix("s/") or "model", repo_id)
        objects = []
        for each in json.loads(self.body)["objects"]:
            row = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.stored:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{each['oid']}"}}
            objects.append(row)
        self._send({"transfer": "basic", "objects": objects})

    def store(self, oid):
        with self.hub.storing:  # files come at once, each in a thread, and are counted one by one
            if self.hub.fail_after is not None and len(self.hub.uploads) >= self.hub.fail_after:
                raise _Error(self.hub.fail_with, "the disk of the Hub is full")
            assert hashlib.sha256(self.body).hexdigest() == oid
            self.hub.stored[oid] = self.body
            self.hub.uploads.append(oid)
        self._send({})

    def commit(self, kind, repo_id, revision):
        repository = self._writable(kind, repo_id)
        if self.hub.hold:
            self.hub.hold.wait(60)
        parent, files = self._found(repository, revision)
        files, message = dict(files), ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise _Error(412, "A commit has happened since")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Error(400, f"{key} is not spoken here")
        oid = repository.commit(revision, files, message)
        self._send({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True})


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
API = r"/api/(?P<kind>model|dataset|space)s/" + REPO
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", API + "/branch/(?P<name>[^/]+)", _Handler.branch),
    ("GET", API, _Handler.info),
    ("GET", API + "/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", API + "/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", API + "/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("POST", API + "/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", API + "/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", API + "/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", "/(?P<kind>datasets/|spaces/|)" + REPO + r"\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", _Handler.store),
    *(
        (method, prefix + REPO + "/resolve/(?P<revision>[^/]+)/(?P<name>.+)", answer)
        for method in ("GET", "HEAD")
        for prefix, answer in (
            ("/datasets/", lambda self, **found: self.resolve("dataset", **found)),
            ("/spaces/", lambda self, **found: self.resolve("space", **found)),
            ("/", lambda self, **found: self.resolve("model", **found)),
        )
    ),
]
