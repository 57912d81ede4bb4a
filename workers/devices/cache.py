"""Where this machine keeps what it makes or fetches once: converted models, digests, compiled kernels, downloads.

Knows the name of the folder; not what is in it.
"""

import os
from pathlib import Path


def cache_root() -> Path:
    """SEGUE_CACHE, else `segue` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segue"
    return Path(os.environ.get("SEGUE_CACHE") or default)
