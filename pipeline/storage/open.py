"""Which store a path names: a folder on this machine, or a prefix of a bucket. Knows the stores; no names in them."""

from segue.pipeline.storage.folder import LocalStore
from segue.pipeline.storage.store import Store


def open_store(path: str) -> Store:
    """The store at a local path or an `s3://` URL. Reads and writes nothing yet."""
    if not path.startswith("s3://"):
        return LocalStore(path)
    from segue.pipeline.storage.bucket import ObjectStore  # imports fsspec, which takes 0.2 s

    return ObjectStore(path)
