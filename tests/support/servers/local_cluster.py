"""A Ray cluster of several nodes on this machine, by the script that the repository offers for it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "infra" / "local" / "cluster.sh"


@dataclass(frozen=True)
class LocalCluster:
    """A head without work and nodes of one CPU each, with a token."""

    folder: Path
    environment: dict[str, str]  # of a client that knows address and token, and nothing else
    clients: "list[subprocess.Popen[str]]" = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.environment["RAY_API_SERVER_ADDRESS"]

    def kill_node(self, node: int) -> None:
        """Every process of it, at once."""
        _script("kill", self.folder, node)

    def segue(self, *arguments: str | Path, **variables: str) -> "subprocess.Popen[str]":
        """The command, in a process of a client, somewhere else."""
        client = subprocess.Popen(
            [sys.executable, "-m", "segue.jobs.cli", *map(str, arguments)],
            env=self.environment | variables,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.clients.append(client)
        return client

    def ended(self, *arguments: str | Path, timeout: float = 900, **variables: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        process = self.segue(*arguments, **variables)
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err


@contextmanager
def local_cluster(folder: Path, nodes: int = 2) -> Iterator[LocalCluster]:
    clients: list[subprocess.Popen[str]] = []
    try:
        _script("up", folder, nodes)
        told = dict(line.split(" ", 1)[1].split("=", 1) for line in (folder / "env").read_text().splitlines())
        told = {name: value.strip('"') for name, value in told.items()}
        plain = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ}
        del told["RAY_AUTH_MODE"]  # a token is enough
        yield LocalCluster(folder, plain | told, clients)
    finally:
        for client in clients:  # those that a test which failed has left
            client.kill()
            client.communicate()
        _script("down", folder)


def _script(*arguments: object) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ray and python of this environment
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=plain | {"PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
