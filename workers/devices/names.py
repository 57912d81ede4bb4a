"""How devices are called in jobs and specs; names only, so that reading them costs nothing."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DeviceMap = str | dict[str, str] | None  # as transformers takes it: auto, or modules to devices; None is one device
