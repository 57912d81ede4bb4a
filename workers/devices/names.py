"""The names of devices in jobs. Imports nothing, so that reading a job file is quick."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DeviceMap = str | dict[str, str] | None  # transformers': auto, or devices by module; None is one device
