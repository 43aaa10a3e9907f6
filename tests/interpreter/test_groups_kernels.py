"""dq and dk of heads that share q and k, by their own kernels in Triton's interpreter."""

import contextlib
import dataclasses
from collections.abc import Iterator

import checks
import pytest
import torch
from planned import planned
from problems import Case, packed, variants

import tfla
from tfla.kernels import planning
from tfla.plan import Plan

# Five heads of a group are more than few; a checkpoint every two tiles: states are made between.
SMALL = {"H": 5, "groups": 1, "K": 12, "V": 20, "backend": "triton", "dtype": torch.float32}


@contextlib.contextmanager
def grouped(checkpoint_every: int = 64, **fields: int) -> Iterator[None]:
    """Pin fields of the plan of groups, and short chunks."""

    def change(p: Plan) -> Plan:
        assert p.group is not None
        group = dataclasses.replace(p.group, **fields)  # type: ignore[arg-type]
        return dataclasses.replace(p, L=16, checkpoint_every=checkpoint_every, group=group)

    with planned(), planning.changed(change):
        yield


@variants
def test_every_variant(input_gate: str, normalize: bool | None) -> None:
    with grouped():
        checks.check_against_recurrence(
            Case(T=150, B=1, **SMALL, input_gate=input_gate, normalize=normalize)
        )


STRUCTURES = {
    "a state a tile": {"checkpoint_every": 32},
    "three tiles": {"checkpoint_every": 96},
    "heads split": {"splits": 2},
    "more programs than heads": {"splits": 8},
    "narrow blocks": {"block_k": 16, "block_v": 16},
}


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure(structure: str, gate: str) -> None:
    """K is more than a narrow block, V more than two."""
    with grouped(**STRUCTURES[structure]):
        checks.check_against_recurrence(
            Case(T=110, B=1, **SMALL | {"K": 20, "V": 36}, input_gate=gate)
        )


@pytest.mark.parametrize("states", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_packed_with_empty_ones(gate: str, states: tuple[bool, bool]) -> None:
    fields = SMALL | {"H": 10, "groups": 2, "state": states[0], "final": states[1]}
    with grouped():
        checks.check_against_recurrence(packed(0, 5, 0, 70, 33, 0, **fields, input_gate=gate))


@pytest.mark.parametrize("T", [1, 16, 33, 64, 128])
def test_lengths_about_a_tile(T: int) -> None:
    with grouped():
        checks.check_against_recurrence(Case(T=T, B=1, **SMALL, final=False, reverse=True))


@pytest.mark.parametrize("gates", ["f=-1e5", "f=-12", "i=-30", "i=+95", "resets 50%", "swings"])
def test_extreme_gates(gates: str) -> None:
    with grouped():
        checks.check_against_recurrence(Case(T=70, B=1, **SMALL, gates=gates))


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_half_precision(gate: str) -> None:
    fields = SMALL | {"dtype": torch.float16}
    with grouped():
        checks.check_against_recurrence(Case(T=100, B=1, **fields, input_gate=gate))


def test_a_head_of_nan_spoils_its_group_alone() -> None:
    """And of its group only dq and dk, which are sums over it."""
    x = [torch.randn(1, 70, n, 16) for n in (2, 2, 10)]
    x += [torch.randn(1, 70, 10), torch.randn(1, 70, 10) + 3]
    x[2][:, 5, 1] = torch.nan
    leaves = [t.requires_grad_() for t in x]
    with grouped():
        h, _ = tfla.mlstm(*leaves, backend="triton")
        dq, dk, dv, di, df = torch.autograd.grad(h, leaves, torch.ones_like(h))
    assert dq[:, :, 0].isnan().any() and dk[:, :, 0].isnan().any()
    assert dq[:, :, 1].isfinite().all() and dk[:, :, 1].isfinite().all()
    for t in (h, dv, di, df):
        assert t[:, :, [0, *range(2, 10)]].isfinite().all()


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("lengths", [None, (0, 5, 0, 40, 33, 0)])
def test_few_heads_of_a_group(lengths: tuple[int, ...] | None, gate: str) -> None:
    """The scans of each, added."""
    fields = SMALL | {"H": 4, "groups": 2, "input_gate": gate}
    case = Case(T=70, B=1, **fields) if lengths is None else packed(*lengths, **fields)
    with planned():
        checks.check_against_recurrence(case)


def test_steps() -> None:
    """A token of heads that share q and k, in one launch."""
    q, k = torch.randn(2, 3, 2, 12).unbind()
    v, i, f = torch.randn(3, 6, 20), torch.randn(3, 6), torch.randn(3, 6)
    state = tfla.State(torch.randn(3, 6, 12, 20), torch.randn(3, 6, 12), torch.randn(3, 6))
    found = [tfla.mlstm_step(q, k, v, i, f, state, backend=b) for b in ("triton", "reference")]
    (h, after), (truth, end) = found
    torch.testing.assert_close(h, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.C, end.C, rtol=1e-5, atol=1e-5)
