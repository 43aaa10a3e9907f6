"""The packages that others write: tests that need them are marked `peers`, skipped without them.

They live in an environment of their own: pip install -c constraints.txt '.[dev,peers]'. With
TFLA_TEST_WITHOUT_XLSTM=1 the package xlstm cannot be found, so that transformers uses its own code.
"""

import os
import sys

import pytest

if os.environ.get("TFLA_TEST_WITHOUT_XLSTM"):
    sys.modules["xlstm"] = None  # type: ignore[assignment]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "peers: needs packages of the extra peers; else skipped")
