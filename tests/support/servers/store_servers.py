"""S3 servers: moto in this process; in processes of their own SeaweedFS, which checks signatures and checksums, and
rclone, which overwrites."""

import json
import logging
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 300.0
ADMIN = ("AKIAADMIN0CANARY0000", "admin-secret-canary")
READER = ("AKIAREADER0CANARY000", "reader-secret-canary")

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE0CANARY00",
    "AWS_SECRET_ACCESS_KEY": "a-secret-canary",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def moto_server() -> Iterator[tuple[str, int]]:
    """Host and port of an S3 server that keeps everything in memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()
    finally:
        server.stop()


def empty_bucket(host: str, port: int) -> None:
    """The bucket `data` of a moto server, and nothing else."""
    for method, path in (("POST", "moto-api/reset"), ("PUT", "data")):
        request = urllib.request.Request(f"http://{host}:{port}/{path}", method=method)
        urllib.request.urlopen(request, timeout=30).close()


class StoreServer:
    """`command` serves S3 on `port` of loopback."""

    def __init__(self, command: list[str], port: int, folder: Path) -> None:
        self.address = ("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{port}"
        self._command = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """As a machine that loses its power."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        with suppress(urllib.error.HTTPError):
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
            except urllib.error.HTTPError:
                raise  # it refuses, so it is there
            except OSError:
                return False
        return True


@contextmanager
def seaweedfs(folder: Path) -> Iterator[StoreServer]:
    """With the identities ADMIN, who may do anything, and READER, who may read and list."""
    identities = [_identity("admin", ADMIN, ["Admin", "Read", "Write", "List", "Tagging"])]
    identities.append(_identity("reader", READER, ["Read", "List"]))
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = dict(zip((*names, "s3.port", "s3.port.grpc"), _free_ports(8), strict=True))
    command = ["weed", "-logtostderr", "server", "-s3", "-ip=127.0.0.1", f"-dir={folder / 'data'}", "-volume.max=20"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += [f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-master.volumeSizeLimitMB=64"]
    with _running(StoreServer(command, ports["s3.port"], folder)) as server:
        yield server


@contextmanager
def rclone(folder: Path) -> Iterator[StoreServer]:
    """Takes `If-None-Match: *`, and overwrites."""
    (folder / "data").mkdir()
    (port,) = _free_ports(1)
    command = ["rclone", "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--auth-key", ",".join(ADMIN)]
    with _running(StoreServer([*command, "--config", ""], port, folder)) as server:
        yield server


@contextmanager
def _running(server: StoreServer) -> Iterator[StoreServer]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _identity(name: str, keys: tuple[str, str], actions: list[str]) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}], "actions": actions}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
