"""Where Ray is, as the environment says (RAY_ADDRESS). Imports no Ray, which takes seconds."""

import os
import socket
from urllib.parse import urlsplit

from segue.pipeline.problems import Problem

CLIENT_PORT = 10001  # of an address without one, as in Ray
CONNECT_SECONDS = 10.0


def is_local() -> bool:
    """Whether Ray would use this machine alone."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def check_reachable() -> list[Problem]:
    """Whether something answers where RAY_ADDRESS says, if that is a host and port: Ray (2.60) tries for minutes, and
    may then end the process without a word."""
    address = os.environ.get("RAY_ADDRESS", "")
    if ":" not in address:  # none, auto, local
        return []
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        socket.create_connection((parts.hostname or "", parts.port or CLIENT_PORT), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        got = f"{address}, where nothing answers ({error})"
        return [Problem("RAY_ADDRESS", got, "HOST:PORT of a Ray head node", where="environment")]
    return []
