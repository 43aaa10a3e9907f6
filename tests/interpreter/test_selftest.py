"""The self-test finds kernels that a compiler got wrong; what passes it is in test_dispatch.py."""

from typing import Any

import pytest
import torch

from tfla import kernels, selftest

# Each is wrong in its own way; then the case that must see it, and what it says.
BROKEN = {
    "exp: h": ("scan", lambda out: out.out.mul_(1.01), "exp", "h differs"),
    "sigmoid: one row": ("scan", lambda out: out.out[:, 7].zero_(), "sigmoid", "differs"),
    "exp: df": ("gate_gradients", lambda out: out[1].neg_(), "exp", "df differs"),
    "states": (
        "scan",
        lambda out: out.final is None or out.final.mul_(1.1),
        "exp, states",
        "final C",
    ),
    "not finite": (
        "gate_gradients",
        lambda out: out[0][0, 0].fill_(torch.nan),
        "exp, packed",
        "not finite",
    ),
    "step": ("update", lambda out: out.add_(0.1), "step, exp", "h differs"),
    "an error": ("scan", lambda out: 1 / 0, "exp", "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, harm, case, wanted = BROKEN[name]
    real = getattr(kernels, function)

    def broken(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        harm(out)
        return out

    monkeypatch.setattr(kernels, function, broken)
    found = selftest.run(torch.device("cpu"), "float32", (case,))
    assert found and all(f"float32, {case}: " in line for line in found)
    assert any(wanted in line for line in found), found
