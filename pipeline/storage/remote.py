"""Remote file systems, opened in one way by all who read or write them.

s3fs has no time limits of its own: without those set here it would wait for ever for a server that never answers.
Credentials and rows are not sent over a network unencrypted, unless the environment allows it. Knows URLs; no rows.
"""

import ipaddress
import logging
import os
from typing import Any
from urllib.parse import urlsplit

from fsspec.core import url_to_fs

from segue.pipeline.problems import redact

ALLOW_HTTP = "SEGUE_ALLOW_HTTP"  # environment variable of every process that reads or writes
CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0  # without a byte
# Loggers that write keys, tokens and rows at level DEBUG.
TALKATIVE = ("botocore", "aiobotocore", "s3fs", "fsspec", "urllib3")


def open_remote(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the name in it. Raises InsecureEndpoint."""
    if not url.startswith("s3://"):
        return url_to_fs(url)
    fs, name = url_to_fs(url, **s3_options())
    silence_loggers()
    check_endpoint(fs)
    return fs, name


def s3_options(**config: Any) -> dict[str, Any]:
    """Arguments of S3FileSystem. `config` are further settings of botocore."""
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "read_timeout": READ_TIMEOUT_SECONDS}
    return {"config_kwargs": timeouts | config}


def silence_loggers() -> None:
    """Keep talkative loggers at WARNING, whatever level the program or S3FS_LOGGING_LEVEL asks for."""
    for name in TALKATIVE:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))


class InsecureEndpoint(OSError):
    """The connection to an S3 endpoint would not be encrypted."""


def check_endpoint(s3: Any) -> None:
    """Check the endpoint of an S3FileSystem, wherever it was configured. Raises InsecureEndpoint."""
    endpoint = s3.s3.meta.endpoint_url
    parts = urlsplit(endpoint)
    if parts.scheme == "https" or _is_loopback(parts.hostname or "") or os.environ.get(ALLOW_HTTP) == "1":
        return
    wanted = f"https:// or {ALLOW_HTTP}=1 in the environment"
    raise InsecureEndpoint(f"the S3 endpoint {redact(endpoint)} is not encrypted, wanted {wanted}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
