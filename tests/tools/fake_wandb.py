"""A W&B backend small enough to read: GraphQL, file stream and uploads, in memory, on the loopback only.

    server = FakeWandb().start()
    WANDB_BASE_URL=server.url WANDB_API_KEY=<40 characters> ...

The real client accepts it. `server.state.fault` decides about each POST: None answers, (status, object)
answers with that, "drop" closes the connection, "hang" never answers.
"""

import base64
import gzip
import http.server
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Fault = Callable[[str, str | None, Json], tuple[int, Json] | str | None]
_ENTITY = "someteam"


@dataclass
class FakeRun:
    """What the server knows of one run."""

    node_id: str
    config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    console: dict[str, dict[int, str]] = field(default_factory=dict)
    about: Json = field(default_factory=dict)
    complete: bool | None = None
    exitcode: int | None = None
    preempting: bool = False


@dataclass
class State:
    """Everything the server received, for tests to look at."""

    runs: dict[str, FakeRun] = field(default_factory=dict)
    """By run id."""
    posts: list[Json] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    alerts: list[Json] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    """Operations that had no answer here."""
    fault: Fault | None = None
    stop: bool = False
    """Whether the stop button was pressed."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def create(self, entity: str, project: str, run_id: str) -> FakeRun:
        """The run, new where it is unknown."""
        node = base64.b64encode(f"Run:v1:{run_id}:{project}:{entity}".encode()).decode()
        return self.runs.setdefault(run_id, FakeRun(node))


class Backend(http.server.ThreadingHTTPServer):
    """The server with its state."""

    daemon_threads = True
    state: State

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up, that is part of the tests; anything else is a mistake in this file."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as much of W&B's protocol as the client needs."""

    protocol_version = "HTTP/1.1"
    server: Backend

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output quiet."""

    def do_PUT(self) -> None:
        """Uploads."""
        self.server.state.uploads[self.path] = self._body()
        self._answer(200, {})

    def do_GET(self) -> None:
        """Nothing is kept here."""
        self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        """GraphQL and file stream."""
        state = self.server.state
        try:
            body = json.loads(self._body())
        except ValueError:
            body = {}
        operation = body.get("operationName")
        if "query" in body and not operation:
            match = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            operation = match[1] if match else "anonymous"
        state.posts.append({"time": time.time(), "path": self.path, "operation": operation, "body": body})
        outcome = state.fault(self.path, operation, body) if state.fault else None
        if outcome == "hang":
            time.sleep(3600)
        if isinstance(outcome, str):
            self.close_connection = True
        elif outcome is not None:
            self._answer(*outcome)
        elif self.path.startswith("/graphql"):
            self._answer(200, {"data": self._graphql(operation, body.get("variables") or {})})
        elif "file_stream" in self.path:
            self._file_stream(body)
        else:
            self._answer(200, {})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while length := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, status: int, content: Json) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _file_stream(self, body: Json) -> None:
        _, _, entity, project, run_id, _ = self.path.split("/")
        state = self.server.state
        with state.lock:
            run = state.create(entity, project, run_id)
            for name, file in (body.get("files") or {}).items():
                if name == "wandb-summary.json":
                    run.summary = json.loads(file["content"][-1])
                elif name in ("wandb-history.jsonl", "wandb-events.jsonl"):
                    lines = run.history if "history" in name else run.events
                    offset = file.get("offset") or 0
                    # The client may send lines again: their offset says which ones.
                    lines[offset : offset + len(file["content"])] = [
                        json.loads(line) for line in file["content"]
                    ]
                else:
                    offset = file.get("offset") or 0
                    run.console.setdefault(name, {}).update(enumerate(file["content"], offset))
            if "complete" in body:
                run.complete, run.exitcode = body["complete"], body.get("exitcode")
            run.preempting = run.preempting or bool(body.get("preempting"))
        self._answer(200, {"stopped": True} if state.stop else {})

    def _graphql(self, operation: str | None, variables: Json) -> Json:
        state = self.server.state
        with state.lock:
            if operation == "Viewer":
                teams = {"edges": [{"node": {"name": _ENTITY}}]}
                return {
                    "viewer": {"id": "u1", "entity": _ENTITY, "username": "u", "flags": "{}", "teams": teams}
                }
            if operation == "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            if operation == "RunResumeStatus":
                return self._resume_status(variables)
            if operation == "UpsertBucket":
                return self._upsert(variables)
            if operation == "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": None}}
            if operation == "CreateRunFiles":
                url = f"http://{self.headers['Host']}/storage/{variables['run']}"
                files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            if operation == "RunStoppedStatus":
                return {"project": {"run": {"stopped": state.stop}}}
            if "Alert" in (operation or ""):
                state.alerts.append(variables)
                return {"notifyScriptableRunAlert": {"success": True}}
            state.unknown.add(str(operation))
            return {}

    def _resume_status(self, variables: Json) -> Json:
        run_id = variables.get("name", "")
        run = self.server.state.runs.get(run_id)
        bucket = run and {
            "id": run.node_id,
            "name": run_id,
            "displayName": run.about.get("displayName") or run_id,
            "summaryMetrics": json.dumps(run.summary),
            "config": json.dumps(run.config),
            "wandbConfig": json.dumps({"t": 1}),
            "tags": run.about.get("tags") or [],
            "notes": None,
            "logLineCount": sum(map(len, run.console.values())),
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.events),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": json.dumps([json.dumps(row) for row in run.events[-1:]]),
        }
        entity = {"id": "e1", "name": variables.get("entity")}
        return {"model": {"id": "p1", "name": variables.get("project"), "entity": entity, "bucket": bucket}}

    def _upsert(self, variables: Json) -> Json:
        state = self.server.state
        entity = variables.get("entity") or _ENTITY
        project, run_id = variables.get("project") or "uncategorized", variables.get("name") or ""
        is_new = run_id not in state.runs
        run = state.create(entity, project, run_id)
        if variables.get("config"):
            run.config.update(json.loads(variables["config"]))
        run.about.update(
            {key: value for key, value in variables.items() if value is not None and key != "config"}
        )
        bucket = {
            "id": run.node_id,
            "name": run_id,
            "displayName": variables.get("displayName") or run_id,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {"id": "p1", "name": project, "entity": {"id": "e1", "name": entity}},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}


class FakeWandb:
    """The backend in a thread."""

    def __init__(self, port: int = 0) -> None:
        self.state = State()
        self._server = Backend(("127.0.0.1", port), Handler)
        self._server.state = self.state
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> "FakeWandb":
        """Serve until `stop`."""
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
