"""As much of a W&B server as its client asks for: it takes runs and artifacts, and remembers what it was told."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40


class Server:
    """``runs`` and ``artifacts``: the variables of each mutation; ``address``; it answers 503 while it is ``down``."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.figures: list[str] = []
        self.down, self.address = False, ""

    @property
    def environment(self) -> dict[str, str]:
        """What makes W&B ask this server."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL query or mutation."""
        if name == "Viewer":
            return {"viewer": {"id": "u", "flags": "{}", "entity": "me", "username": "me", "teams": {"edges": []}}}
        if name == "UpsertBucket":
            self.runs.append(variables)
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": "d", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if name == "CreateArtifact":
            self.artifacts.append(variables["input"])
            made = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": made}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.address}/storage"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"project": None}  # of an artifact that is not there yet; other questions may have no answer


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A `Server` on loopback."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path.endswith("graphql"):
                asked = json.loads(body)
                self.reply({"data": server.answer(asked["operationName"], asked.get("variables", {}))})
            else:
                server.figures.append(body.decode(errors="replace"))
                self.reply({})

        do_PUT = do_POST

        def reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(503 if server.down else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A client that hangs up."""

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        server.address = f"http://127.0.0.1:{listening.server_port}"
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
