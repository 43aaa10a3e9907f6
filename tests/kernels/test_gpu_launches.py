"""On a GPU: the self-test passes where the kernels are used, profilers see every launch, and the
user's scratch memory stays the user's."""

import contextvars
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tfla
from tfla import selftest, verdicts

pytestmark = pytest.mark.gpu

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TFLA_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_test_passes(dtype: str) -> None:
    assert selftest.run(torch.device("cuda", 0), dtype) == []


def test_the_process_of_the_self_test_reports(folder: Path) -> None:
    device = torch.device("cuda", 0)
    found = verdicts.test(verdicts.pair_of(device), device, "bfloat16", again=True)
    assert found.passed and found.lasting, found
    assert len(list(folder.glob("*.json"))) == 1


def problem() -> list[torch.Tensor]:
    x = [torch.randn(1, 300, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]
    x += [torch.randn(1, 300, 2, device="cuda") for _ in "if"]
    return [t.requires_grad_() for t in x]


def run(x: list[torch.Tensor]) -> list[torch.Tensor]:
    h, _ = tfla.mlstm(*x)  # type: ignore[arg-type]
    return [h, *torch.autograd.grad(h, x, torch.ones_like(h))]


@pytest.fixture
def seen() -> Iterator[list[str]]:
    from triton import knobs

    names: list[str] = []

    def enter(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(enter)
    try:
        yield names
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)


def test_a_hook_sees_the_launches_of_every_call(seen: list[str]) -> None:
    """Also of calls that would be played: those before the hook came are."""
    counts = []
    for _ in range(5):
        before = len(seen)
        run(problem())
        counts.append(len(seen) - before)
    assert counts == [counts[0]] * 5 and counts[0] >= 6
    assert any("scan" in name for name in seen)


def test_results_are_the_same_with_and_without_a_hook() -> None:
    from triton import knobs

    x = problem()
    played = [run(x) for _ in range(4)][-1]

    def hook(*_: Any) -> None: ...

    knobs.runtime.launch_exit_hook.add(hook)
    try:
        watched = run(x)
    finally:
        knobs.runtime.launch_exit_hook.remove(hook)
    again = run(x)
    for a, b, c in zip(played, watched, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_users_allocator_is_left_alone_in_every_thread() -> None:
    import triton
    from triton.runtime import _allocation

    def mine(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        raise AssertionError("not for tfla's kernels")

    def user() -> None:
        triton.set_allocator(mine)
        for _ in range(3):
            run(problem())
        kept.append(_allocation._allocator.get() is mine)

    def thread() -> None:
        before = _allocation._allocator.get()
        run(problem())
        kept.append(_allocation._allocator.get() is before)

    kept: list[bool] = []
    contextvars.copy_context().run(user)
    one = threading.Thread(target=thread)
    one.start()
    one.join()
    assert kept == [True, True]
