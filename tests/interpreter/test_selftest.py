"""The self-test finds kernels that a compiler got wrong; what passes it is in test_dispatch.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tfla import kernels, selftest
from tfla.kernels import runtime

# The launch, which of the arrays that it writes is wrong, and how; then the case that must see it,
# and what it says.
BROKEN: dict[str, tuple[str, str, Callable[[Tensor], object], str, str]] = {
    "exp: h": ("h", "out", lambda x: x.mul_(1.01), "exp", "h differs"),
    "sigmoid: one row": ("h", "out", lambda x: x[:, 7].zero_(), "sigmoid", "differs"),
    "exp: df": ("gate gradients", "df", lambda x: x.neg_(), "exp", "df differs"),
    "states": ("h", "final", lambda x: x.mul_(1.1), "exp, states", "final C"),
    "not finite": (
        "gate gradients",
        "di",
        lambda x: x[0, 0].fill_(torch.nan),
        "exp, packed",
        "not finite",
    ),
    "an error": ("h", "out", lambda x: 1 / 0, "exp", "ZeroDivisionError"),
}


def run(case: str, wanted: str) -> None:
    found = selftest.run(torch.device("cpu"), "float32", (case,))
    assert found and all(f"float32, {case}: " in line for line in found)
    assert any(wanted in line for line in found), found


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    label, array, harm, case, wanted = BROKEN[name]
    play = runtime._Player.play

    def broken(player: Any, tensors: list[Any], addresses: list[int]) -> None:
        play(player, tensors, addresses)
        for launch in player.program.launches:
            n = launch.parameters.writes.get(array)
            if launch.label == label and n in player.program.outputs:
                harm(player.parts[n].view(tensors))

    monkeypatch.setattr(runtime._Player, "play", broken)
    run(case, wanted)


def test_a_broken_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    update = kernels.update
    monkeypatch.setattr(kernels, "update", lambda *args: update(*args) + 0.1)
    run("step, exp", "h differs")
