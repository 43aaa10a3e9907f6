"""A call as a value: all that it is besides its data."""

from __future__ import annotations

from typing import Literal

BackendName = Literal["reference", "triton"]
