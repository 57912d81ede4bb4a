"""An S3 endpoint that is not encrypted is refused, unless it is this machine's."""

import pytest
from store_servers import S3_ENVIRONMENT


@pytest.mark.parametrize(
    ("endpoint", "is_refused"),
    [
        ("http://192.0.2.1:9000", True),
        ("http://[2001:db8::1]:9", True),
        ("https://192.0.2.1", False),
        ("http://127.0.0.1:1", False),
        ("http://localhost:1", False),
    ],
)
def test_endpoint_in_the_clear_is_refused_unless_it_is_this_machines(monkeypatch, endpoint, is_refused):
    from s3fs import S3FileSystem

    from segue.pipeline.storage.open import open_store
    from segue.pipeline.storage.remote import ALLOW_HTTP, InsecureEndpoint, open_remote
    from segue.pipeline.storage.store import OutputStorageError

    S3FileSystem.clear_instance_cache()
    for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    if is_refused:
        with pytest.raises(InsecureEndpoint, match=r"is not encrypted, wanted https://"):
            open_remote("s3://bucket/x")
        with pytest.raises(OutputStorageError, match=r"s3://bucket/out: the S3 endpoint .* is not encrypted"):
            open_store("s3://bucket/out").names()
        monkeypatch.setenv(ALLOW_HTTP, "1")
    assert open_remote("s3://bucket/x")[1] == "bucket/x"
    S3FileSystem.clear_instance_cache()
