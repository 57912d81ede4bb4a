"""A store in an S3 bucket, through s3fs. A file is one conditional PUT, so exactly one of any number of writers wins.

If the reply to a PUT is lost, the PUT is sent again and may hear "exists already" because of itself. Then the object is
read and compared. A file is never a multipart upload, so a writer that dies leaves nothing behind. Each process takes
endpoint, region and credentials from the usual places (AWS_ENDPOINT_URL, profiles, instance roles); none is stored or
sent. Knows bytes and names.
"""

import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, BinaryIO, TypeVar

from segue.pipeline.storage import remote
from segue.pipeline.storage.store import OutputStorageError, Store

PROBE = "_job/.probe"
MAX_PUT_BYTES = 5 << 30  # S3's limit of one PUT
SLOWEST_BYTES_PER_SECOND = 1 << 20  # of an upload; a slower one times out
RETRY_SECONDS = (0.5, 1, 2, 4, 8, 16, 16, 16)  # between attempts; each is shortened by a random part, at most half
LOST_THE_RACE = 412  # HTTP status: the condition of the PUT does not hold
CONFLICT = 409  # HTTP status: another conditional PUT of the same name is under way
# Codes for a request that arrived damaged or incomplete.
DAMAGED_ON_THE_WAY = ("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")

T = TypeVar("T")


class ObjectStore(Store):
    """A prefix of a bucket: `s3://bucket/a/b`."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._root = self._url.partition("://")[2]

    def create(self, name: str, content: bytes) -> bool:
        if len(content) >= MAX_PUT_BYTES:
            raise OutputStorageError(f"{self.path(name)}: {len(content):,} bytes are more than one PUT takes")
        return self._retried(name, lambda: self._put(name, content))

    def read(self, name: str) -> bytes:
        return self._retried(name, lambda: self._fs.cat_file(self._key(name)))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        file = self._retried(name, lambda: self._fs.open(self._key(name), "rb", block_size=1 << 20))
        with self._storage_errors(name), file:
            yield file

    def exists(self, name: str) -> bool:
        try:
            return self._retried(name, lambda: self._fs.info(self._key(name), refresh=True))["type"] == "file"
        except FileNotFoundError:
            return False

    def path(self, name: str) -> str:
        return f"{self._url}/{name}"

    def names(self, folder: str = "") -> list[str]:
        inside = self._key(folder)
        try:
            found = self._retried(folder, lambda: self._fs.ls(inside, detail=True, refresh=True))
        except FileNotFoundError:
            return []
        start = len(inside) + 1
        names = (f"{entry['name'][start:]}{'/' if entry['type'] == 'directory' else ''}" for entry in found)
        return sorted(name for name in names if name)

    def is_exclusive(self) -> bool:
        """Some servers ignore the condition, which they do not know, and overwrite. Leaves one small object."""
        self.create(PROBE, b"first")
        return not self.create(PROBE, uuid.uuid4().bytes)

    def overwrite(self, name: str, content: bytes) -> None:
        self._retried(name, lambda: self._fs.pipe_file(self._key(name), content, chunksize=MAX_PUT_BYTES))

    def discard(self, name: str) -> None:
        with suppress(OutputStorageError, FileNotFoundError), self._storage_errors(name):
            self._fs.rm_file(self._key(name))

    def remove_leftovers(self) -> None:
        """There are none: an unfinished PUT leaves nothing."""

    @cached_property
    def _fs(self) -> Any:
        from s3fs import S3FileSystem

        # No cache of listings: every call must see what other writers have done. botocore tries once. s3fs tries twice,
        # for files that are read in parts. All other retries are made by `_retried`.
        fs = S3FileSystem(use_listings_cache=False, **remote.s3_options(retries={"total_max_attempts": 1}))
        fs.retries = 2
        try:
            remote.silence_loggers()
            remote.check_endpoint(fs)
        except remote.InsecureEndpoint as error:
            raise OutputStorageError(f"{self._url}: {error}") from None
        return fs

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _put(self, name: str, content: bytes) -> bool:
        # The time limits of the socket do not hold after a server has answered "100 continue".
        timeout = remote.READ_TIMEOUT_SECONDS + len(content) / SLOWEST_BYTES_PER_SECOND
        try:
            self._fs.pipe_file(self._key(name), content, mode="create", chunksize=MAX_PUT_BYTES, timeout=timeout)
        except OSError as error:
            if _status(error) != LOST_THE_RACE:
                raise
            return self._is_ours(name, content)
        return True

    def _is_ours(self, name: str, content: bytes) -> bool:
        """Whether the object holds our content, so that only the reply to our PUT was lost."""
        try:
            return self._fs.cat_file(self._key(name)) == content
        except FileNotFoundError:
            raise OutputStorageError(f"{self.path(name)}: files vanish while they are written") from None

    def _retried(self, name: str, call: Callable[[], T]) -> T:
        """Call until it succeeds, for about a minute. Errors that will not pass are raised at once.

        Raises FileNotFoundError for an object that is not there, OutputStorageError.
        """
        is_refreshed = False
        for seconds in (*RETRY_SECONDS, None):
            with self._storage_errors(name):
                try:
                    return call()
                except OutputStorageError:  # our own, which is final
                    raise
                except Exception as error:
                    if _code(error) in EXPIRED and not is_refreshed:
                        self._fs.connect(refresh=True)  # a file or a role may have new credentials
                        is_refreshed = True
                    elif seconds is None or not _may_pass(error):
                        raise
                    else:
                        time.sleep(seconds * random.uniform(0.5, 1))
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _storage_errors(self, name: str) -> Iterator[None]:
        """Turns botocore's errors into OutputStorageError, with the server's words, without the request: it may hold
        credentials."""
        try:
            yield
        except OutputStorageError:
            raise
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise OutputStorageError(f"{self.path(name)}: there is no such bucket") from error
            raise
        except Exception as error:
            if not _is_of_store(error):
                raise
            code = _code(error) or type(error).__name__
            raise OutputStorageError(f"{self.path(name)}: {code}: {error}") from error


def _is_of_store(error: BaseException) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return isinstance(error, (OSError, BotoCoreError, ClientError, ResponseParserError))


def _response(error: BaseException) -> dict[str, Any]:
    """botocore's response in an error of s3fs; empty if the server did not answer."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}


def _status(error: BaseException) -> int | None:
    return _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _code(error: BaseException) -> str:
    return _response(error).get("Error", {}).get("Code", "")


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: throttling, a server error, no answer or half an answer."""
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError, HTTPClientError
    from botocore.parsers import ResponseParserError

    status = _status(error)
    if _code(error) in DAMAGED_ON_THE_WAY:
        return True
    if status is not None:
        return status in (CONFLICT, 429) or status >= 500
    if isinstance(error, BotoCoreError):  # its other errors concern credentials and configuration
        return isinstance(error, (HTTPClientError, FlexibleChecksumError))
    return isinstance(error, (OSError, ResponseParserError)) and not isinstance(
        error, (FileNotFoundError, PermissionError)
    )
