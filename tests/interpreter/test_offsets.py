"""Integer tensors in the kernels: any strides, and values that no host has read."""

import checks
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tfla

K, V = 8, 6
VARIANTS = [("exp", True), ("sigmoid", False)]


def problem(
    T: int, N: int, normalize: bool, H: int = 1
) -> tuple[list[Tensor], list[Tensor | None]]:
    """q, k, v, i, f and states of N sequences."""
    g = torch.Generator().manual_seed(T)
    x = [torch.randn(1, T, H, D, generator=g) for D in (K, K, V)]
    x += [torch.randn(1, T, H, generator=g), torch.randn(1, T, H, generator=g) + 2]
    states = [torch.randn(N, H, K, V, generator=g), torch.randn(N, H, K, generator=g)]
    m = torch.randn(N, H, generator=g)
    return x, [*states, m] if normalize else [states[0], None, None]


def gate_of(normalize: bool) -> str:
    return "exp" if normalize else "sigmoid"


def run(
    x: list[Tensor], states: list[Tensor | None], cu: Tensor, normalize: bool, backend: str
) -> list[Tensor]:
    """h, final states, dq, dk, dv, di and df of the operator, which checks no values."""
    leaves = [t.clone().requires_grad_() for t in x]
    final = states[0] is not None
    options = (0.5, gate_of(normalize), True, normalize, final, True, backend, "ieee")
    h, *ends, _ = torch.ops.tfla.forward(*leaves, *states, cu, *options)
    t = torch.arange(h.numel()).view_as(h)
    grads = torch.autograd.grad((h * (1 + (t % 7))).sum(), leaves)
    return [h.detach(), *(s.detach() for s in ends if s.numel()), *grads]


def ascending(values: list[int], T: int) -> list[int]:
    """What offsets of any values mean: within [0, T], and none below an earlier one."""
    out: list[int] = []
    for value in values:
        out.append(max([0, min(value, T), *out[-1:]]))
    return out


def check(values: list[int], T: int, with_states: bool, normalize: bool, H: int = 1) -> None:
    """Against "reference", which sees what no sequence owns as sequences of their own."""
    N = len(values) - 1
    x, states = problem(T, N, normalize, H)
    states = states if with_states else [None] * 3
    with checks.poisoned_buffers():
        got = run(x, states, torch.tensor(values), normalize, "triton")
    meant = ascending(values, T)
    around = [None if s is None else torch.cat([s[:1], s, s[:1]]) for s in states]
    expected = run(x, around, torch.tensor([0, *meant, T]), normalize, "reference")
    outside = torch.ones(T, dtype=torch.bool)
    outside[meant[0] : meant[-1]] = False
    ends = (1 + 2 * normalize) if with_states else 0
    for at, (a, b) in enumerate(zip(got, expected, strict=True)):
        if 1 <= at <= ends:
            assert a.isfinite().all()
            if at == 1:  # as C e^m: gauges may differ
                gauge = [got[3], expected[3][1:-1]] if normalize else [a.new_zeros(N, H)] * 2
                pairs = zip((a, b[1:-1]), gauge, strict=True)
                a, b = (y * m.exp()[..., None, None] for y, m in pairs)
                checks.assert_close(a, b, 1e-4)
            continue
        assert (a[:, outside] == 0).all(), at
        if not outside.all():
            checks.assert_close(a[:, ~outside], b[:, ~outside], 1e-4, str(at))


@pytest.mark.parametrize(("input_gate", "normalize"), VARIANTS)
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
    ("T", "values"),
    [
        (24, [0, 8, 16]),
        (24, [5, 8, 16]),
        (24, [0, 16, 8, 24]),
        (24, [-3, 8, 99]),
        (24, [30, -2, 50]),
        (24, [16, 8, 0]),
        (150, [0, 70, 130]),
        (150, [66, 10, 140, 140]),
        (70, [2**40, -(2**40), 7]),
        (70, [0, 0, 0]),
    ],
)
def test_values_that_no_host_has_read(
    T: int, values: list[int], states: bool, input_gate: str, normalize: bool
) -> None:
    check(values, T, states, normalize)


@settings(max_examples=12)
@given(
    st.integers(1, 50),
    st.lists(st.integers(-20, 70), min_size=2, max_size=6),
    st.booleans(),
    st.sampled_from([True, False]),
)
@example(1, [1, 0], True, True)
def test_any_values(T: int, values: list[int], states: bool, normalize: bool) -> None:
    check(values, T, states, normalize, H=2)


@pytest.mark.parametrize(("input_gate", "normalize"), VARIANTS)
@pytest.mark.parametrize("states", [False, True])
def test_tokens_of_no_sequence_are_not_read(states: bool, input_gate: str, normalize: bool) -> None:
    """Buffers of one size for all batches have anything in their tails."""
    x, memory = problem(40, 2, normalize)
    memory = memory if states else [None] * 3
    cu = torch.tensor([3, 8, 20])
    clean = run(x, memory, cu, normalize, "triton")
    for t in x:
        t[:, :3] = t[:, 20:] = float("nan")
    for a, b in zip(run(x, memory, cu, normalize, "triton"), clean, strict=True):
        assert torch.equal(a, b)


def test_more_offsets_than_a_block_of_the_kernel_has() -> None:
    from tfla.kernels.grid import offsets

    g = torch.Generator().manual_seed(0)
    values = torch.randint(-50, 9000, (5000,), generator=g)
    meant = values.clamp(0, 7000).cummax(0).values
    assert torch.equal(offsets(values, 7000), meant)


def strided(x: Tensor) -> dict[str, Tensor]:
    wide = torch.stack([x, x + 1, x - 1, x * 0 + 99], 1)
    return {
        "column of a table": wide[:, 0],
        "every second": torch.stack([x, x * 0 - 7], 1).flatten()[::2],
        "row of a transposed table": wide.T.contiguous().T[:, 0],
        "int32": x.int(),
        "int32 column": wide.int()[:, 0],
        "part of a longer one": torch.cat([x - 5, x, x + 5])[len(x) : 2 * len(x)],
    }


CU = torch.tensor([0, 8, 16, 24])


@pytest.mark.parametrize(("input_gate", "normalize"), VARIANTS)
@pytest.mark.parametrize(("states", "compiled"), [(0, 0), (1, 0), (0, 1)])
def test_offsets_of_any_strides(
    compiled: int, states: int, input_gate: str, normalize: bool
) -> None:
    x, memory = problem(24, 3, normalize)
    leaves = [t.clone().requires_grad_() for t in x]

    def call(cu: Tensor) -> Tensor:
        h, end = tfla.mlstm(
            *leaves,
            input_gate=input_gate,
            cu_seqlens=cu,
            backend="triton",
            initial_state=tfla.State(*memory) if states else None,
            output_final_state=bool(states),
        )
        return h if end is None else h + end.C.sum()

    torch._dynamo.reset()
    fn = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    h = call(CU)
    grads = torch.autograd.grad(h.sum(), leaves)
    for name, cu in strided(CU).items():
        assert torch.equal(cu, CU)
        if compiled and name not in ("column of a table", "int32"):
            continue  # a graph takes the strides as the call does
        # A call that comes again may be played from a record of it.
        for _ in range(3 if name == "column of a table" and not compiled else 1):
            again = fn(cu)
            checks.assert_close(again.detach(), h.detach(), 1e-6, name)
            for a, b in zip(torch.autograd.grad(again.sum(), leaves), grads, strict=True):
                checks.assert_close(a, b, 1e-6, name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_of_any_strides(dtype: torch.dtype, compiled: bool, backend: str) -> None:
    slots = torch.tensor([4, 0, 2])
    x, memory = problem(3, 6, True, H=2)
    token = [t[0] for t in x]

    def call(slots: Tensor, C: Tensor, n: Tensor, m: Tensor) -> Tensor:
        state = tfla.State(C, n, m)
        return tfla.mlstm_step(*token, state, inplace=True, slots=slots, backend=backend)[0]

    def fresh() -> list[Tensor]:
        return [memory[0].to(dtype), memory[1].to(dtype), memory[2].clone()]  # type: ignore[union-attr]

    torch._dynamo.reset()
    fn = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    before = [t.clone() for t in fresh()]
    right = [t.clone() for t in before]
    h = call(slots, *right)
    for a, b in zip(right, before, strict=True):
        assert torch.equal(a[[1, 3, 5]], b[[1, 3, 5]])
    for name, some in strided(slots).items():
        state = [t.clone() for t in before]
        checks.assert_close(fn(some, *state), h, 1e-6, name)
        for a, b in zip(state, right, strict=True):
            checks.assert_close(a.float(), b.float(), 1e-6, name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("slots", [[4, -1, 2], [-1, 0, 6], [9, -(2**40), 6], [-1, 2**40, 3]])
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_that_do_not_exist(normalize: bool, slots: list[int], backend: str) -> None:
    """Where the host cannot look (here: through the operator) h is NaN for them, and neither
    their neighbours nor any other row is written to."""
    x, memory = problem(3, 6, normalize, H=2)
    token = [t[0] for t in x]
    states = [None if s is None else s.clone() for s in memory]
    rest = (0.5, gate_of(normalize), True, backend)
    h = torch.ops.tfla.step(*token, *states, torch.tensor(slots), *rest)
    known = [0 <= s < 6 for s in slots]
    rows = [s for s in slots if 0 <= s < 6]
    for b, (slot, there) in enumerate(zip(slots, known, strict=True)):
        if not there:
            assert h[b].isnan().all()
            continue
        own = [None if s is None else s[slot : slot + 1].clone() for s in memory]
        alone = torch.ops.tfla.step(*(t[b : b + 1] for t in token), *own, None, *rest)
        checks.assert_close(h[b], alone[0], 1e-6)
        for s, o in zip(states, own, strict=True):
            if s is not None and o is not None:
                checks.assert_close(s[slot], o[0], 1e-6)
    others = [row for row in range(6) if row not in rows]
    for s, before in zip(states, memory, strict=True):
        assert s is None or before is None or torch.equal(s[others], before[others])


@pytest.mark.parametrize("values", [[0, 8, 16], [0, 16, 8, 24], [-1, 24], [0, 25], [24, 0]])
def test_values_that_the_host_has_are_refused(values: list[int]) -> None:
    x, _ = problem(24, 1, True)
    with pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0 to T = 24; got \["):
        tfla.mlstm(*x, cu_seqlens=torch.tensor(values), backend="triton")


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_bf16_is_what_it_is_on_a_gpu(input_gate: str) -> None:
    """The interpreter's own products of bf16 are off by 1e10."""
    x, _ = problem(70, 1, True)
    low = [t.bfloat16().requires_grad_() for t in x[:3]] + [t.requires_grad_() for t in x[3:]]
    state = tfla.State(*problem(70, 1, True)[1])
    state = state if input_gate == "exp" else tfla.State(state.C, None, None)

    def run(backend: str) -> list[Tensor]:
        h, end = tfla.mlstm(
            *low,
            input_gate=input_gate,
            initial_state=state,
            output_final_state=True,
            backend=backend,
        )
        assert h.dtype == torch.bfloat16 and end.C.dtype == torch.float32
        token = tfla.mlstm_step(
            *(t[:, 0] for t in low), state, input_gate=input_gate, backend=backend
        )[0]
        loss = h.float().square().sum() + token.float().sum()
        return [h, end.C, token, *torch.autograd.grad(loss, low)]

    for a, b in zip(run("triton"), run("reference"), strict=True):
        assert a.dtype == b.dtype
        checks.assert_close(a.detach().float(), b.detach().float(), 1e-2)


def test_threads_do_not_meet_in_the_interpreter() -> None:
    import threading

    x, _ = problem(40, 1, True)
    args = [[t * (n + 1) for t in x[:3]] + x[3:] for n in range(2)]
    right = [tfla.mlstm(*a, backend="triton")[0] for a in args]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(5):
            if not torch.equal(tfla.mlstm(*args[n], backend="triton")[0], right[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
