"""Calls that come again: validated once, and never with what was found for another call."""

import dataclasses
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import tfla
from tfla import api, checks, parallel
from tfla.spec import CallSpec, Inputs, Options

B, T, H, K, V = 2, 9, 3, 8, 6


def inputs(B: int = B, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = [torch.randn(B, T, H, D, dtype=dtype) for D in (K, K, V)]
    return [*x, torch.randn(B, T, H), torch.randn(B, T, H) + 2]


def state(normalize: bool = True) -> tfla.State:
    C = torch.randn(B, H, K, V)
    return (
        tfla.State(C, torch.randn(B, H, K), torch.zeros(B, H))
        if normalize
        else tfla.State(C, None, None)
    )


def test_a_call_like_an_earlier_one_is_not_validated_again() -> None:
    x = inputs()
    first, _ = tfla.mlstm(*x)
    with mock.patch.object(checks, "operands", side_effect=AssertionError):
        again, _ = tfla.mlstm(*x)
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("values", [[0, 4, 8], [1, 4, 9], [0, 7, 3, 9][1:], [0, -1, 9], [0, 10, 9]])
def test_values_of_offsets_are_looked_at_every_time(values: list[int], dtype: torch.dtype) -> None:
    x = inputs(B=1)
    tfla.mlstm(*x, cu_seqlens=torch.tensor([0, 4, 9], dtype=dtype))
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to T = 9"):
        tfla.mlstm(*x, cu_seqlens=torch.tensor(values, dtype=dtype))


REFUSED: list[tuple[type[Exception], Callable[[list[Tensor]], object]]] = [
    (TypeError, lambda x: tfla.mlstm(*x, normalize=1)),  # type: ignore[arg-type]
    (TypeError, lambda x: tfla.mlstm(*x, normalize=True, output_final_state=0)),  # type: ignore[arg-type]
    (TypeError, lambda x: tfla.mlstm(*x, normalize=True, reverse=0)),  # type: ignore[arg-type]
    (TypeError, lambda x: tfla.mlstm(*x, scale=torch.tensor(0.5))),  # type: ignore[arg-type]
    (TypeError, lambda x: tfla.mlstm(*x, scale=[0.5])),  # type: ignore[arg-type]
    (ValueError, lambda x: tfla.mlstm(*x, scale=float("nan"))),
    (ValueError, lambda x: tfla.mlstm(*x, normalize=True, initial_state=state(False))),
    (TypeError, lambda x: tfla.mlstm(*x, normalize=True, initial_state=state()[:2])),  # type: ignore[arg-type]
    (ValueError, lambda x: tfla.mlstm(*x, backend="Reference")),  # type: ignore[arg-type]
    (ValueError, lambda x: tfla.mlstm(*x[:2], x[2][:, :5], *x[3:])),
    (TypeError, lambda x: tfla.mlstm(*x[:2], x[2].double(), *x[3:])),
    (TypeError, lambda x: tfla.mlstm(*x[:4], x[4].int())),
    (ValueError, lambda x: tfla.mlstm(*x[:4], x[4][0, 0])),
    (TypeError, lambda x: tfla.mlstm(x[0].numpy(), *x[1:])),  # type: ignore[arg-type]
    (TypeError, lambda x: tfla.mlstm(None, *x[1:])),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("error", "call"), REFUSED)
def test_what_looks_like_an_earlier_call_and_is_none_is_refused(
    error: type[Exception], call: Callable[[list[Tensor]], object]
) -> None:
    x = inputs()
    for normalize in (None, True):
        for scale in (None, 0.5, 1.0):
            tfla.mlstm(*x, normalize=normalize, scale=scale)
            tfla.mlstm(*x, normalize=normalize, scale=scale, initial_state=state())
    tfla.linear_attention(*x[:3], torch.zeros(H), torch.zeros(B, T, H))
    for _ in range(2):
        with pytest.raises(error):
            call(x)


def test_calls_that_differ_do_not_share_a_spec() -> None:
    """Each variant twice, in turns, against itself alone."""
    x = inputs()
    slope = torch.linspace(-1.0, -0.1, H)
    calls: list[Callable[[], Tensor]] = [
        lambda: tfla.mlstm(*x)[0],
        lambda: tfla.mlstm(*x, scale=-0.5)[0],
        lambda: tfla.mlstm(*x, scale=0.5)[0],
        lambda: tfla.mlstm(*x, normalize=False)[0],
        lambda: tfla.mlstm(*x, input_gate="sigmoid")[0],
        lambda: tfla.linear_attention(*x[:3])[0],
        lambda: tfla.linear_attention(*x[:3], slope)[0],
        lambda: tfla.linear_attention(*x[:3], None, slope)[0],
        lambda: tfla.linear_attention(*x[:3], slope[None, None].expand(B, T, H))[0],
    ]
    alone = []
    for call in calls:
        api._specs.clear()
        alone.append(call())
    for _ in range(3):
        for call, right in zip(calls, alone, strict=True):
            assert torch.equal(call(), right)
    assert torch.allclose(alone[1], -alone[2], atol=1e-5)


def test_gradients_are_wanted_by_some_calls_and_not_by_others() -> None:
    x = inputs()
    leaves = [t.clone().requires_grad_() for t in x]
    for _ in range(2):
        assert not tfla.mlstm(*x)[0].requires_grad
        assert tfla.mlstm(*leaves)[0].requires_grad
        with torch.no_grad():
            assert not tfla.mlstm(*leaves)[0].requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert tfla.mlstm(*x)[0].dtype == torch.bfloat16
        assert tfla.mlstm(*x)[0].dtype == torch.float32


def test_one_token_takes_the_step_every_time() -> None:
    x = [t[:, :1] for t in inputs()]
    start = state()
    h, end = tfla.mlstm(*x, scale=-0.3, initial_state=start, output_final_state=True)
    for _ in range(2):
        again, after = tfla.mlstm(*x, scale=-0.3, initial_state=start, output_final_state=True)
        assert end is not None and after is not None
        assert torch.equal(h, again) and torch.equal(end.C, after.C)
    step, _ = tfla.mlstm_step(*(t[:, 0] for t in x), start, scale=-0.3)
    assert torch.equal(h[:, 0], step)


def test_a_call_without_a_group_never_enters_the_file_of_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "run", mock.Mock(side_effect=AssertionError))
    leaves = [t.requires_grad_() for t in inputs()]
    h, _ = tfla.mlstm(*leaves)
    h.sum().backward()


def test_a_spec_is_its_fields() -> None:
    q, k, v, i, f = inputs()
    options = Options(0.5, "exp", True, True, False, True, "reference", "ieee")
    spec = CallSpec.of(Inputs(q, k, v, i, f, None, None, None, None), options)
    assert (spec.B, spec.T, spec.H, spec.K, spec.V, spec.N) == (B, T, H, K, V, B)
    assert spec.options == options and not spec.packed and not spec.initial_state
    same = CallSpec.of(Inputs(q.clone(), k, v, i, f, None, None, None, None), options)
    assert spec == same and hash(spec) == hash(same)
    for field in dataclasses.fields(CallSpec):
        other = spec.but(**{field.name: "another"})
        assert other != spec and spec != "another"
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.T = 3  # type: ignore[misc]


def test_products_of_fp32_are_a_part_of_the_call() -> None:
    x = inputs()
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen = []
    real = api.ops.run
    with mock.patch.object(api.ops, "run", lambda x, spec: (seen.append(spec), real(x, spec))[1]):
        try:
            for precision in ("ieee", "tf32", "ieee"):
                matmul.fp32_precision = precision
                tfla.mlstm(*x)
        finally:
            matmul.fp32_precision = before
    assert [spec.precision for spec in seen] == ["ieee", "tf32", "ieee"]
    assert seen[0] == seen[2] != seen[1]
