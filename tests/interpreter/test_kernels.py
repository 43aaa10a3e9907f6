"""The kernels themselves, run by Triton's interpreter on the CPU: every structure that a plan can
choose, on small problems."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import checks
import pytest
import torch
import triton
import triton.language as tl
from planned import planned
from problems import Case, packed, variants

import tfla
from tfla import kernels
from tfla.bench import cases
from tfla.bench import check as bench
from tfla.kernels import decode, gates, pointwise, program, runtime, step
from tfla.spec import CallSpec, Inputs, Options, StepInputs, StepOptions

SMALL = {"T": 53, "B": 1, "H": 1, "K": 12, "V": 20, "backend": "triton", "dtype": torch.float32}


@variants
def test_every_variant(input_gate: str, normalize: bool | None) -> None:
    with planned():
        checks.check_against_recurrence(
            Case(**SMALL | {"T": 37, "B": 2}, input_gate=input_gate, normalize=normalize)
        )


@pytest.mark.parametrize("gates", ["ordinary", "resets 50%", "swings", "f=-1e5", "i=-30"])
def test_a_denominator_summed_in_fp64(gates: str) -> None:
    """As it is where fp64 is fast, with states and in parts of a chunk."""
    with planned(denominator="fp64"):
        case = Case(**SMALL | {"T": 37, "B": 2, "K": 40}, input_gate="exp", gates=gates)
        checks.check_against_recurrence(case)


@pytest.mark.parametrize("lengths", [(53,), (100, 0, 7, 40)])
def test_vectors_without_den_are_those_with_it_but_for_den(lengths: tuple[int, ...]) -> None:
    """Where the scan of h makes nu, its launch with the gauge makes the vectors. With q = 0
    den is its floor."""
    T, H, K = sum(lengths), 2, 16
    g = torch.Generator().manual_seed(0)
    i, f = (torch.randn(1, T, H, generator=g) * 3 for _ in range(2))
    i[:, 5:9], f[:, 20:23] = -float("inf"), -float("inf")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens, starts = offsets if len(lengths) > 1 else None, offsets[:-1].tolist()
    m = torch.randn(len(lengths), H, generator=g)

    def vectors(fuse: bool) -> torch.Tensor:
        zeros = torch.zeros(1, T, H, K)
        with planned(fuse_denominator=fuse):
            x = Inputs(
                zeros,
                zeros,
                zeros,
                i,
                f,
                torch.zeros(len(lengths), H, K, K),
                torch.zeros(len(lengths), H, K),
                m,
                cu_seqlens,
            )
            options = Options(0.5, "exp", True, True, True, True, "triton", "ieee")
            seen: list[kernels.GateWeights] = []

            def weights(spec: CallSpec, *x: program.Symbol) -> tuple[program.Symbol]:
                seen.append(kernels.gate_weights(Inputs(*x), spec))
                return (seen[0].vectors_without_den or seen[0].vectors,)

            (found,) = runtime.execute(weights, CallSpec.of(x, options), x)
        assert (seen[0].vectors_without_den is None) != fuse and found is not None
        found = found.view(H, seen[0].sizes.chunks, gates.VECTORS.value, 16)
        used = [
            start // 16 + n + j
            for n, (start, length) in enumerate(zip(starts, lengths, strict=True))
            for j in range(-(-length // 16))
        ]
        return found[:, used].double()

    with_den, without = vectors(False), vectors(True)
    floor = without[:, :, gates.FLOOR.value]
    assert floor.min() < 0.1 and floor.max() > 10.0
    target = without[:, :, 0] + without[:, :, 1] - floor.log2()
    inside = without[:, :, 0] > gates.NOTHING.value
    assert inside.sum() == T * H
    divided = with_den[:, :, 0] + with_den[:, :, 1]
    # The floor is good to two units of its last place, 3e-7 in log2, its quotient and the two
    # rests to half of one, 2e-7 together; a weight to five roundings.
    torch.testing.assert_close(target[inside], divided[inside], rtol=0.0, atol=6e-7)
    torch.testing.assert_close(without[:, :, 2] / floor, with_den[:, :, 2], rtol=6e-7, atol=0.0)
    assert torch.equal(without[:, :, 3:7], with_den[:, :, 3:7])


STRUCTURES = {
    "splits": ({}, {"split_len": 32}),
    "transposed": ({"transposed": True}, {}),
    "transposed, splits": ({"transposed": True}, {"split_len": 64}),
    "split contraction": ({"block_a": 16}, {}),
    "narrow tiles": ({"block_x": 16}, {}),
    "descriptors": ({"descriptor": True}, {"split_len": 32}),
}


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure(structure: str, gate: str) -> None:
    tile, fields = STRUCTURES[structure]
    sizes = {"K": 20} if structure == "split contraction" else {}
    with planned(tile, **fields):
        checks.check_against_recurrence(Case(**SMALL | sizes, input_gate=gate))


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("lengths", [(300,), (7, 0, 290)])
def test_a_cut_sequence_that_forgets(lengths: tuple[int, ...], gate: str) -> None:
    """What fades within a split of 16 chunks is not walked over for the state behind it."""
    fields = {k: v for k, v in SMALL.items() if k not in ("T", "B")}
    case = packed(*lengths, **fields, input_gate=gate, gates="f=-1")
    with planned(split_len=256):  # the recurrence knows df as exp(f) of something, we as a sum
        checks.check_against_recurrence(case, floor_eps=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("states", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("split_len", [0, 32])
def test_packed_with_empty_ones(gate: str, split_len: int, states: tuple[bool, bool]) -> None:
    """With states before, behind, or none at all, which makes one sequence of them."""
    fields = {k: v for k, v in SMALL.items() if k not in ("T", "B")}
    fields |= {"state": states[0], "final": states[1]}
    with planned(split_len=split_len):
        checks.check_against_recurrence(packed(0, 5, 0, 40, 33, 0, **fields, input_gate=gate))


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_short_documents_as_one_sequence(gate: str) -> None:
    """What wants no states at the ends equals what does, where some documents begin with
    tokens that weigh nothing."""
    lengths = [1, 2, 1, 5, 3, 1, 1, 1, 30, 9, 1, 4, 2, 1]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    g = torch.Generator().manual_seed(5)
    shapes = [(12,), (12,), (20,), (), (), (20,)]
    *x, dh = (torch.randn(1, sum(lengths), 1, *d, generator=g) for d in shapes)
    for n, at in enumerate(ends[3:10]):
        x[3][:, at] = (-1e6, -float("inf"), -2e5)[n % 3]
    found = []
    with planned():
        for final in (False, True):
            leaves = [y.clone().requires_grad_() for y in x]
            h, _ = tfla.mlstm(
                *leaves,
                input_gate=gate,
                cu_seqlens=ends,
                backend="triton",
                output_final_state=final,
            )
            found.append([h, *torch.autograd.grad(h, leaves, dh)])
    assert found[0][5][:, ends[:-1]].abs().max() < 1e-30  # df where a document begins
    # fp32 in other chunks: 1e-6 of values of up to 20; a leak would be of their size.
    for one, each in zip(*found, strict=True):
        torch.testing.assert_close(one, each, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("T", [32, 53, 64, 70])
def test_without_a_final_state(T: int) -> None:
    """No state is stored where a sequence ends, and none is missed there."""
    with planned(split_len=32 if T == 70 else 0):
        checks.check_against_recurrence(Case(**SMALL | {"T": T, "H": 2}, final=False))


@pytest.mark.parametrize(
    "gates", ["f=-1e5", "f=-12", "i=-30", "i=+30", "i=+95", "resets 50%", "swings"]
)
def test_extreme_gates(gates: str) -> None:
    with planned():
        checks.check_against_recurrence(Case(**SMALL | {"T": 40}, gates=gates))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_query_of_zeros_beside_a_floor_that_underflows(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 70, 1, 16).to(dtype) for _ in "qkv")
    q[:, ::5] = 0
    x = q, k, v, torch.randn(1, 70, 1) + 95, torch.randn(1, 70, 1) + 2
    h, truth = (tfla.mlstm(*x, scale=3.0, backend=b)[0] for b in ("triton", "reference"))
    assert (h - truth).norm() <= (1e-3 if dtype == torch.float16 else 1e-5) * truth.norm()


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_no_tokens_leave_the_state_as_it_is(gate: str) -> None:
    q, v, i = torch.randn(2, 0, 3, 12), torch.randn(2, 0, 3, 20), torch.randn(2, 0, 3)
    state = tfla.State(torch.randn(2, 3, 12, 20), torch.randn(2, 3, 12), torch.randn(2, 3))
    state = state if gate == "exp" else tfla.State(state.C, None, None)
    h, end = tfla.mlstm(
        q,
        q,
        v,
        i,
        i,
        input_gate=gate,
        initial_state=state,
        output_final_state=True,
        backend="triton",
    )
    assert h.shape == v.shape and end is not None
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(end, state, strict=True))


@pytest.mark.parametrize("T", [1, 16, 17])
def test_short_sequences(T: int) -> None:
    with planned():
        checks.check_against_recurrence(Case(**SMALL | {"T": T}))


def test_half_precision() -> None:
    with planned():
        checks.check_against_recurrence(Case(**SMALL | {"dtype": torch.float16}))


def test_the_forget_gate_far_from_a_checkpoint() -> None:
    """The errors of q . dq and k . dk are the same ones and leave the sum up to a checkpoint; with
    q . dq = 0, which is exact where the normaliser is active, df was off by 1.4e-3 here."""
    x = next(x for x in cases.IMPLEMENTATIONS if x.name == "tfla exp")
    call = functools.partial(tfla.mlstm, input_gate="exp", backend="triton")
    x = dataclasses.replace(x, call=lambda leaves: call(**leaves)[0])
    torch.manual_seed(3)
    with (
        planned(L=32, checkpoint_every=256, split_len=1024),
        mock.patch.object(bench, "CPU_TOKENS", 2048),
    ):
        errors = bench.judge(
            x, cases.Shape(1, 2048, 1, 32, 32), torch.float16, torch.device("cpu"), 3
        ).errors
    assert errors["df"] < 2 * max(errors["dq"], errors["dk"])


@triton.jit
def _share_kernel(dh, h, dot, T, H, V, rest, chunks_per_head, L: tl.constexpr, BLOCK: tl.constexpr):
    """dh . h of a token, three tenths of it in one row of dot and the rest in another."""
    t, head = tl.program_id(0) // H, tl.program_id(0) % H
    lanes = tl.arange(0, BLOCK)
    at = (t * H + head) * V + lanes
    both = tl.load(dh + at, mask=lanes < V, other=0.0) * tl.load(h + at, mask=lanes < V, other=0.0)
    place = dot + head * chunks_per_head * L + t
    tl.store(place, 0.3 * tl.sum(both, 0))
    tl.store(place + rest, 0.7 * tl.sum(both, 0))


def test_a_scan_of_dv_that_makes_dh_h(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hopper.py does, in parts to be added; then nobody reads dh and h for it again."""
    g = torch.Generator().manual_seed(4)
    shapes = [(16,), (16,), (20,), (), (), (20,)]
    *x, dh = (torch.randn(1, 40, 2, *d, generator=g) for d in shapes)
    leaves = [y.requires_grad_() for y in x]
    real, launches = kernels.scan, []

    def scan(name: str, *args: Any, dot: Any = None, **options: Any) -> Any:
        found = real(name, *args, dot=dot, **options)
        if name != "dv":
            return found
        dh, weights = args[2:4]
        rows, chunks, L = *weights.sizes[:2], weights.plan.L
        share = dh.builder.new("share", 2, rows, chunks, L)
        numbers = {"T": 40, "H": 2, "V": 20, "rest": rows * chunks * L, "chunks_per_head": chunks}
        dh.builder.launch(
            "share",
            _share_kernel,
            (80,),
            1,
            1,
            reads={"dh": dh, "h": dot},
            writes={"dot": share},
            numbers=numbers,
            constants={"L": L, "BLOCK": 32},
        )
        launches.append(dh.builder.launches)
        return found._replace(dot=share)

    with planned():
        h, _ = tfla.mlstm(*leaves, backend="triton")
        wanted = torch.autograd.grad(h, leaves, dh)
    monkeypatch.setattr(kernels, "scan", scan)
    with planned():
        h, _ = tfla.mlstm(*leaves, backend="triton")
        # The same but for dh . h, summed in another order.
        for one, other in zip(torch.autograd.grad(h, leaves, dh), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    (column,) = (x for x in launches[0] if x.label == "column")
    reads = column.parameters.reads
    assert reads["dh"] is None and reads["h"] is None


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with a gap after each: the last axis is not contiguous."""
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_any_strides(gate: str) -> None:
    """Head-first tensors, strides of 0 (h.sum() makes such a dh), last axes with gaps."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=g).transpose(1, 2) for _ in range(3))
    k = k[:, :1].expand(-1, 40, -1, -1)
    i = torch.randn(1, 2, 40, generator=g).transpose(1, 2)
    f = torch.full((1,), 3.0).expand(1, 40, 2)
    C, n = torch.randn(1, 2, 16, 16, generator=g).mT, spread(torch.randn(1, 2, 16, generator=g))
    state = tfla.State(C, n, torch.ones(1).expand(1, 2))
    if gate == "sigmoid":
        state = tfla.State(C, None, None)
    runs = {}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [spread(x).to(dtype).detach().requires_grad_() for x in (q, k, v)]
        leaves += [x.to(dtype).detach().requires_grad_() for x in (i, f)]
        start = [x if x is None else x.to(dtype).detach().requires_grad_() for x in state]
        leaves += [x for x in start if x is not None]
        with planned():
            h, end = tfla.mlstm(
                *(spread(x) for x in leaves[:3]),
                *leaves[3:5],
                input_gate=gate,
                initial_state=tfla.State(*start),
                output_final_state=True,
                backend=backend,
            )
            loss = h.sum() if end.n is None else h.sum() + (end.n.sum(-1) * end.m.exp()).sum()
            runs[backend] = [h, *torch.autograd.grad(loss, leaves)]
    for ours, truth in zip(runs["triton"], runs["reference"], strict=True):
        assert checks.distance(ours.double(), truth) <= 1e-5 * truth.norm()


@pytest.mark.parametrize("lengths", [(0, -9, 50, 80, 30), (5, 100, 20, 70, 64), (40, 64)])
@pytest.mark.parametrize("final", [True, False])
def test_offsets_out_of_range_write_nothing_outside(lengths: tuple[int, ...], final: bool) -> None:
    """The host never reads the offsets on a GPU: wrong ones give wrong numbers, inside the
    buffers."""
    q, k, v = (torch.randn(1, 64, 1, 16) for _ in range(3))
    gate = torch.zeros(1, 64, 1)
    offsets = torch.tensor(lengths, dtype=torch.int32)
    unread = mock.patch("tfla.checks.host_has_values", return_value=False)
    with planned(split_len=32), unread:
        inputs = [x.requires_grad_() for x in (q, k, v, gate)]
        h, _ = tfla.mlstm(
            *inputs, gate, cu_seqlens=offsets, backend="triton", output_final_state=final
        )
        grads = torch.autograd.grad(h.nan_to_num().sum(), inputs)
    assert h.shape == v.shape and all(
        g.shape == x.shape for g, x in zip(grads, inputs, strict=True)
    )


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("V", [20, 48])
def test_step(gate: str, V: int) -> None:
    """The decode kernel, in slots of a larger state, against the reference; the other slots
    stay as they are."""
    g = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 2, 3, 12, generator=g).unbind(0)
    v, i, f = (
        torch.randn(2, 3, V, generator=g),
        torch.randn(2, 3, generator=g),
        torch.randn(2, 3, generator=g),
    )
    normalized = gate == "exp"
    states = [
        torch.randn(4, 3, 12, V, generator=g),
        torch.randn(4, 3, 12, generator=g),
        torch.randn(4, 3, generator=g),
    ]
    slots = torch.tensor([3, 1])
    results = []
    for backend in ("triton", "reference"):
        state = tfla.State(*(x.clone() if normalized or x.dim() == 4 else None for x in states))
        with mock.patch.object(step, "REGISTERS", 256):
            for _ in range(2):  # the counters are left at zero
                h, state = tfla.mlstm_step(
                    q,
                    k,
                    v,
                    i,
                    f,
                    state,
                    input_gate=gate,
                    inplace=True,
                    slots=slots,
                    backend=backend,
                )
        results.append([h, *(x for x in state if x is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    assert torch.equal(results[0][1][[0, 2]], states[0][[0, 2]])


def test_counters_of_a_step_go_with_the_memory_of_m() -> None:
    """So that launches at the same time have different ones; all are left at zero."""
    m = torch.zeros(6, 2)
    counters = [decode._arrived(x) for x in (m, m[3:], m[::2], torch.zeros(6, 2))]
    assert len({x.data_ptr() for x in counters}) == 4
    assert decode._arrived(m.view_as(m)) is counters[0]

    q, k, v = torch.randn(2, 2, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 48)
    i, f = torch.randn(2, 2, 2).unbind(0)
    options = StepOptions(1.0, "exp", True, "triton")
    with mock.patch.object(step, "REGISTERS", 128):
        for slots in ([5, 0], [3, 3], [-1, 2]):  # right; twice the same; out of range
            arguments = torch.zeros(6, 2, 8, 48), torch.zeros(6, 2, 8), m, torch.tensor(slots)
            before = m.clone()
            decode.update(StepInputs(q, k, v, i, f, *arguments), options)
            used = [slot for slot in slots if slot >= 0]
            assert ((m != before).any(1).nonzero()[:, 0]).tolist() == sorted(set(used))
            assert not any(x.any() for x in counters)


def test_a_second_run_is_the_same_bit_for_bit() -> None:
    case = Case(**SMALL)
    inputs = checks.make_inputs(case)
    with planned(split_len=32):
        first, second = (checks.run_tfla(case, inputs, torch.zeros(1, 1)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [(3,), (2, 5), (2, 0)])
def test_what_lies_between_matrix_products(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    H, V, F = 3, 20, 1100
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*rows, *shape, generator=g).to(dtype)

    def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
        assert ours.dtype == dtype and ours.shape == exact.shape
        limits = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-6}
        torch.testing.assert_close(ours.double(), exact, **limits)

    x, h, wide = normal(2 * F), normal(H, V), normal(2 * H * V)
    for a, b in (x.chunk(2, -1), (normal(F), normal(F))):  # halves of one tensor, and two
        close(pointwise.swiglu(a, b), torch.nn.functional.silu(a.double()) * b.double())
    o, weight = wide[..., H * V :], torch.rand(H * V, generator=g).to(dtype)
    norm = torch.nn.functional.layer_norm(h.double(), (V,), eps=1e-6).flatten(-2)
    exact = torch.sigmoid(o.double()) * weight.double() * norm
    close(pointwise.head_norm(h, o, weight, 1e-6), exact)

    x, y, weight = normal(F), normal(F), torch.rand(F, generator=g).to(dtype)
    total, norm = pointwise.add_norm(x, y, weight, 1e-6)
    assert torch.equal(total, x + y)  # what torch rounds to
    exact = torch.nn.functional.rms_norm(total.double(), (F,), weight.double(), 1e-6)
    close(norm, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cap", [15.0, None])
def test_the_gates_of_a_step(cap: float | None, dtype: torch.dtype) -> None:
    H, D, g = 3, 40, torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(n, generator=g).to(dtype) for n in ((5, D), (6, D), (6,)))
    exact = x.double() @ weight.double().T + bias.double()
    exact = exact if cap is None else cap * torch.tanh(exact / cap)
    free = pointwise.gates(x, weight, bias, cap, None, 1e4)
    torch.testing.assert_close(free.double(), exact, rtol=2e-6, atol=2e-6)
    active = torch.tensor([True, False, True, True, False])
    closed = torch.tensor([-1e4] * H + [1e4] * H)
    wanted = torch.where(active[:, None], free, closed)
    assert torch.equal(pointwise.gates(x, weight, bias, cap, active, 1e4), wanted)
