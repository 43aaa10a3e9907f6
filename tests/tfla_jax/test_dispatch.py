"""Which backend serves a call of tfla.jax."""

import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tfla.jax import dispatch, mlstm
from tfla.plan import Device

H200 = SimpleNamespace(
    platform="gpu", compute_capability="9.0", core_count=132, device_kind="NVIDIA H200", id=0
)
Q = jnp.ones((1, 3, 1, 16))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that arrays lie on a GPU, and says which one."""
    found = SimpleNamespace(device=H200, triton="")
    monkeypatch.setattr(dispatch, "_device_of", lambda *arrays: found.device)
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda: found.triton)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_read", dispatch._read.__wrapped__)
    return found


def test_a_gpu_with_triton_is_served_by_its_kernels(gpu: Any) -> None:
    for backend in (None, "triton"):
        assert dispatch.pick_backend(backend, Q) == Device((9, 0), 132, 232448)
    assert dispatch.pick_backend("reference", Q) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"triton": "it needs Triton (ModuleNotFoundError)."}, "it needs Triton"),
        ({"device": {"compute_capability": "7.5", "device_kind": "T4"}}, "8.0 or later; got T4"),
        ({"device": {"platform": "rocm"}}, "NVIDIA GPU"),
    ],
)
def test_a_gpu_that_the_reference_serves_is_said_so_once(
    gpu: Any, change: dict[str, Any], words: str
) -> None:
    gpu.triton = change.get("triton", "")
    gpu.device = SimpleNamespace(**{**vars(H200), **change.get("device", {})})
    with pytest.warns(UserWarning, match=words):
        assert dispatch.pick_backend(None, Q) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.pick_backend(None, Q) is None
        assert dispatch.pick_backend("reference", Q) is None
    with pytest.raises(RuntimeError, match=words):
        dispatch.pick_backend("triton", Q)


def test_a_cpu_is_served_by_the_reference_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.pick_backend(None, Q) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="NVIDIA GPU .* got cpu"):
        mlstm(Q, Q, Q, Q[..., 0], Q[..., 0], backend="triton")
    with pytest.raises(ValueError, match="backend must be None"):
        mlstm(Q, Q, Q, Q[..., 0], Q[..., 0], backend="cuda")  # type: ignore[arg-type]


def test_traced_arrays_are_planned_for_the_default_device() -> None:
    seen = []

    def f(x: Any) -> Any:
        seen.append(dispatch._device_of(x))
        return x

    second = jax.devices()[1]
    with jax.default_device(second):
        jax.jit(f)(Q)
    assert seen == [second]
    moved = jax.device_put(Q, second)
    assert dispatch._device_of(moved) == second
