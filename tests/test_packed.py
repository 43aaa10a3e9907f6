"""Packed sequences: every document by itself, however many, empty ones among them."""

import pytest
import torch
from checks import (
    assert_close,
    check_against_recurrence,
)
from problems import EXTREME, RESETS, Case, make_inputs, offsets, packed, variants
from torch import Tensor

import tfla

MIXES = [(0,), (0, 0, 0), (70,), (1, 1, 1), (0, 5, 0, 64, 1, 0, 65, 0), (130, 3), (63, 64, 65)]


@variants
@pytest.mark.parametrize("lengths", MIXES)
@pytest.mark.parametrize("state", [True, False])
def test_every_mix_of_lengths(
    lengths: tuple[int, ...], state: bool, input_gate: str, normalize: bool | None
) -> None:
    check_against_recurrence(
        packed(*lengths, state=state, input_gate=input_gate, normalize=normalize)
    )


@pytest.mark.parametrize("gates", [*EXTREME, *RESETS])
def test_packed_with_extreme_gates(gates: str) -> None:
    check_against_recurrence(packed(0, 40, 66, gates=gates))
    check_against_recurrence(packed(0, 40, 66, gates=gates, input_gate="sigmoid"))


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_below_fp64(dtype: torch.dtype, input_gate: str, normalize: bool | None) -> None:
    check_against_recurrence(
        packed(0, 40, 66, 1, dtype=dtype, input_gate=input_gate, normalize=normalize)
    )


def test_a_hundred_short_documents() -> None:
    g = torch.Generator().manual_seed(3)
    check_against_recurrence(
        packed(*torch.randint(0, 6, (100,), generator=g).tolist(), K=4, V=5, H=1)
    )


def test_long_documents_among_short_ones() -> None:
    check_against_recurrence(packed(3, 1100, 0, 2, 70, K=4, V=5, H=1))


@variants
def test_packed_equals_one_call_a_document(input_gate: str, normalize: bool | None) -> None:
    lengths = (5, 0, 64, 66)
    x = make_inputs(packed(*lengths, input_gate=input_gate, normalize=normalize))
    options = {"input_gate": input_gate, "normalize": normalize, "output_final_state": True}
    h, end = tfla.mlstm(
        x.q,
        x.k,
        x.v,
        x.i,
        x.f,
        initial_state=tfla.State(*x.memory),
        cu_seqlens=offsets(lengths),
        **options,
    )
    start = 0
    for row, length in enumerate(lengths):
        own = tfla.State(*(s if s is None else s[row : row + 1] for s in x.memory))
        part = [t[:, start : start + length] for t in (x.q, x.k, x.v, x.i, x.f)]
        h_own, end_own = tfla.mlstm(*part, initial_state=own, **options)
        assert_close(h[:, start : start + length], h_own, 1e-12, f"document {row}")
        assert_close(end.C[row], end_own.C[0], 1e-12, f"C of document {row}")
        start += length


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_either_integer_dtype_of_offsets_and_any_strides(dtype: torch.dtype) -> None:
    lengths = (5, 0, 64)
    x = make_inputs(packed(*lengths))
    args = (x.q, x.k, x.v, x.i, x.f)
    h, _ = tfla.mlstm(*args, cu_seqlens=offsets(lengths))
    every_second = torch.stack([offsets(lengths, dtype)] * 2, -1).flatten()[::2]
    assert every_second.stride() == (2,)
    assert torch.equal(tfla.mlstm(*args, cu_seqlens=every_second)[0], h)


def test_one_document_is_the_unpacked_call() -> None:
    x = make_inputs(Case(T=70, B=1))
    args = (x.q, x.k, x.v, x.i, x.f)
    packed_h, _ = tfla.mlstm(*args, cu_seqlens=offsets((70,)))
    assert_close(packed_h, tfla.mlstm(*args)[0], 1e-13)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_spoilt_document_spoils_no_other(poison: float) -> None:
    """Forward and backward: what one document overflows to stays in it."""
    lengths, bad = (30, 70, 0, 20), slice(30, 100)
    x = make_inputs(packed(*lengths))
    good = torch.cat([torch.arange(30), torch.arange(100, 120)])

    def run(spoil: bool) -> list[Tensor]:
        leaves = [t.clone() for t in (x.q, x.k, x.v, x.i, x.f)]
        if spoil:
            for t in leaves:
                t[:, bad] = poison
        for t in leaves:
            t.requires_grad_()
        h, end = tfla.mlstm(*leaves, cu_seqlens=offsets(lengths), output_final_state=True)
        grads = torch.autograd.grad([h, end.C], leaves, [x.dh, x.G_C])
        return [t[:, good] for t in (h, *grads)] + [
            end.C[[0, 2, 3]],
            end.n[[0, 2, 3]],
            end.m[[0, 2, 3]],
        ]

    for clean, beside in zip(run(False), run(True), strict=True):
        assert_close(beside, clean, 1e-13)


def test_the_order_of_documents_does_not_matter() -> None:
    lengths = (5, 64, 33)
    x = make_inputs(packed(*lengths))
    pieces = [torch.arange(5), torch.arange(5, 69), torch.arange(69, 102)]
    order = [2, 0, 1]
    moved = torch.cat([pieces[o] for o in order])
    args = (x.q, x.k, x.v, x.i, x.f)
    h, end = tfla.mlstm(
        *args,
        cu_seqlens=offsets(lengths),
        initial_state=tfla.State(*x.memory),
        output_final_state=True,
    )
    h1, end1 = tfla.mlstm(
        *(t[:, moved] for t in args),
        cu_seqlens=offsets(tuple(lengths[o] for o in order)),
        initial_state=tfla.State(*(s[order] for s in x.memory)),
        output_final_state=True,
    )
    assert_close(h1, h[:, moved], 1e-13)
    assert_close(end1.C, end.C[order], 1e-13)
