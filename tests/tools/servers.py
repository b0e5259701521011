"""Servers on loopback that give a folder's files: a faulty one of our own, nginx, and an S3 API."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem


class Faulty:
    """Serves ``folder``, ranges too. ``faults``: what goes wrong with the next requests for a file, by its name."""

    def __init__(self, folder: Path):
        self.folder, self.faults = folder, dict[str, list[str]]()
        self.asked: list[str] = []
        self.ending = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *given: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        file = self.folder / request.path.lstrip("/")
        self.asked.append(file.name)
        fault = self.faults.get(file.name, [])
        fault_now = fault.pop(0) if fault else ""
        if fault_now == "503" or not file.is_file():
            request.send_error(503 if fault_now else 404)
            return
        data = file.read_bytes()
        size, first, status = len(data), 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if wanted:
            first, status = int(wanted[1]), 206
            data = data[first : int(wanted[2]) + 1]
        if fault_now == "flip":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault_now == "short":
            data = data[: len(data) // 2]
        if fault_now == "slow":
            self.ending.wait(30)
        request.send_response(status)
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        with contextlib.suppress(ConnectionError):
            request.wfile.write(data[: len(data) // 2] if fault_now == "drop" else data)


@contextlib.contextmanager
def faulty(folder: Path) -> Iterator[Faulty]:
    """A `Faulty` that runs."""
    made = Faulty(folder)
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.ending.set()
        made.server.shutdown()
        made.server.server_close()
        thread.join()


@contextlib.contextmanager
def nginx(folder: Path, work: Path) -> Iterator[str]:
    """The address of an nginx that serves ``folder``."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        pytest.skip("needs nginx (apt-get install nginx-light)")
    port = free_port()
    (work / "nginx.conf").write_text(
        f"daemon off; pid {work}/pid; error_log {work}/error.log; user root;\n"
        "events {}\n"
        f"http {{ access_log off; client_body_temp_path {work}/b; proxy_temp_path {work}/p; fastcgi_temp_path {work}/f;"
        f" uwsgi_temp_path {work}/u; scgi_temp_path {work}/s;\n"
        f" server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    with _running([binary, "-c", str(work / "nginx.conf"), "-e", str(work / "error.log")], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def s3() -> Iterator[Any]:
    """fsspec's file system of an S3 API, which `s3://` means within the block."""
    port = free_port()
    with (
        _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"):
            patch.setenv(name, f"http://127.0.0.1:{port}")
        S3FileSystem.clear_instance_cache()
        yield S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}")
        S3FileSystem.clear_instance_cache()  # they would ask this server again in another test


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """A server process that listens when the block begins, and is gone after it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)
