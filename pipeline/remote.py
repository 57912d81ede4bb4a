"""File systems that are not this machine's, opened alike by whoever reads or writes them.

A server that accepts a connection and never answers would be waited for without end: s3fs sets no limits of its own.
"""

from typing import Any

from fsspec.core import url_to_fs

CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0  # without a byte


def open_remote(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the name of the place in it."""
    return url_to_fs(url, **(s3_options() if url.startswith("s3://") else {}))


def s3_options(**config: Any) -> dict[str, Any]:
    """Arguments of S3FileSystem; `config` is botocore's."""
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "read_timeout": READ_TIMEOUT_SECONDS}
    return {"config_kwargs": timeouts | config}
