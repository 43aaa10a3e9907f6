"""Tests of the kernels in Triton's interpreter, on the CPU. Triton reads TRITON_INTERPRET when a
kernel is decorated, so they are a step of their own: TRITON_INTERPRET=1 pytest tests/interpreter"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WARNINGS = [
    # What is not selected overflows on its way, as it may.
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:invalid value encountered:RuntimeWarning",
    # Triton 3.6's interpreter turns arrays of one into numbers in a way that NumPy warns of.
    "ignore:Conversion of an array with ndim:DeprecationWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    if own and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 in the environment")
    for item in own:
        for warning in WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def _short_scans() -> Iterator[None]:
    from planned import short_scans  # imports Triton

    with short_scans():
        yield
