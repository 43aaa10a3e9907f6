"""Two input gates that tfla does not have, torch and Triton forms side by side; inside
``registered`` they are known. And what holds for each of them on both backends: ``check_...``."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import recurrence as oracle
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import tfla
from tfla import gates

# ---------------------------------------------------------------- log_i = -i^2 / 2, normalised


@triton.jit
def _bell(i):
    return -0.5 * i * i


@triton.jit
def _bell_gradient(dlog_i, i):
    return -dlog_i * i


BELL = gates.Gate(
    name="bell",
    about="a toy of the tests",
    normalize=True,
    log_i=lambda i: -0.5 * i * i,
    gradient=lambda dlog_i, i: -dlog_i * i,
    triton=lambda: gates.TritonForm(_bell, _bell_gradient),
)


# ---------------------------------------------------------------- log_i = -softplus(-2 i)


@triton.jit
def _steep(i):
    return tl.minimum(2.0 * i, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(2.0 * i)))


@triton.jit
def _steep_gradient(dlog_i, i):
    return 2.0 * dlog_i / (1.0 + tl.exp(2.0 * i))


STEEP = gates.Gate(
    name="steep",
    about="a toy of the tests",
    normalize=False,
    log_i=lambda i: -F.softplus(-2.0 * i),
    gradient=lambda dlog_i, i: 2.0 * dlog_i * torch.sigmoid(-2.0 * i),
    triton=lambda: gates.TritonForm(_steep, _steep_gradient),
)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The other tests of a process know the gates of the package alone."""
    for gate in (BELL, STEEP):
        gates.register(gate)
    yield
    for gate in (BELL, STEEP):
        del gates.INPUT_GATES[gate.name]


# ---------------------------------------------------------------- what holds for both, on "backend"

LOG_I: dict[str, Callable[[Tensor], Tensor]] = {  # what the toys are, written down once more
    "bell": lambda i: -(i**2) / 2,
    "steep": lambda i: F.logsigmoid(2 * i),
}
DTYPES = {"reference": torch.float64, "triton": torch.float32}
BOUNDS = {"reference": 1e-10, "triton": 2e-5}  # relative


@dataclasses.dataclass
class Problem:
    """q, k, v, i, f and the cotangents of h, C and n, in fp64."""

    inputs: list[Tensor]
    memory: list[Tensor | None]
    dh: Tensor
    dC: Tensor
    dn: Tensor | None


def problem(gate: str, lengths: tuple[int, ...] = (), B: int = 1, T: int = 40) -> Problem:
    g = torch.Generator().manual_seed(T)
    B, T, N = (1, sum(lengths), len(lengths)) if lengths else (B, T, B)
    H, K, V = 2, 12, 20

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs = [new(B, T, H, D) for D in (K, K, V)] + [2 * new(B, T, H), 2 + new(B, T, H)]
    memory: list[Tensor | None] = [new(N, H, K, V), new(N, H, K), new(N, H)]
    dn: Tensor | None = new(N, H, K)
    if not gates.INPUT_GATES[gate].normalize:
        memory[1:], dn = [None, None], None
    return Problem(inputs, memory, new(B, T, H, V), new(N, H, K, V), dn)


def true_size(state: tfla.State | oracle.Memory) -> list[Tensor]:
    """C e^m and n e^m, which do not depend on the gauge."""
    if state.n is None or state.m is None:
        return [state.C]
    weight = state.m.exp()
    return [state.C * weight[..., None, None], state.n * weight[..., None]]


def everything(
    p: Problem, dtype: torch.dtype, run: Callable[..., tuple[Tensor, tfla.State | oracle.Memory]]
) -> list[Tensor]:
    """h, the final state and all gradients of ``run``, computed in ``dtype``."""
    leaves = [x.to(dtype).requires_grad_() for x in p.inputs]
    memory = [None if x is None else x.to(dtype).requires_grad_() for x in p.memory]
    h, end = run(*leaves, memory)
    outputs = [h, *true_size(end)]
    cotangents = [x.to(dtype) for x in (p.dh, p.dC, p.dn) if x is not None]
    of = [*leaves, *[x for x in memory[:2] if x is not None]]
    grads = torch.autograd.grad(outputs, of, cotangents)
    return [x.detach().double() for x in (*outputs, *grads)]


def truth(gate: str, lengths: tuple[int, ...] | None = None) -> Callable[..., object]:
    def run(q, k, v, i, f, memory):  # type: ignore[no-untyped-def]
        return oracle.linear_attention(
            q,
            k,
            v,
            F.logsigmoid(f),
            LOG_I[gate](i),
            memory=oracle.Memory(*memory),
            normalize=gates.INPUT_GATES[gate].normalize,
            lengths=lengths,
        )

    return run


def assert_same(bound: float, found: list[Tensor], right: list[Tensor]) -> None:
    assert len(found) == len(right)
    for n, (x, y) in enumerate(zip(found, right, strict=True)):
        assert torch.isfinite(x).all(), n
        assert (x - y).norm() <= bound * y.norm(), (n, float((x - y).norm() / y.norm()))


def check_forward_and_backward(gate: str, backend: str) -> None:
    p = problem(gate)

    def run(q, k, v, i, f, memory):  # type: ignore[no-untyped-def]
        return tfla.mlstm(
            q,
            k,
            v,
            i,
            f,
            input_gate=gate,
            initial_state=tfla.State(*memory),
            output_final_state=True,
            backend=backend,
        )

    assert_same(
        BOUNDS[backend],
        everything(p, DTYPES[backend], run),
        everything(p, torch.float64, truth(gate)),
    )


def check_packed_sequences(gate: str, backend: str) -> None:
    lengths = (9, 0, 5, 20)
    p = problem(gate, lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)

    def run(q, k, v, i, f, memory):  # type: ignore[no-untyped-def]
        return tfla.mlstm(
            q,
            k,
            v,
            i,
            f,
            input_gate=gate,
            initial_state=tfla.State(*memory),
            output_final_state=True,
            cu_seqlens=offsets,
            backend=backend,
        )

    assert_same(
        BOUNDS[backend],
        everything(p, DTYPES[backend], run),
        everything(p, torch.float64, truth(gate, lengths)),
    )
    # Without states sequences may be computed as one.
    leaves = [x.to(DTYPES[backend]).requires_grad_() for x in p.inputs]
    h, _ = tfla.mlstm(*leaves, input_gate=gate, cu_seqlens=offsets, backend=backend)
    grads = torch.autograd.grad(h, leaves, p.dh.to(DTYPES[backend]))
    plain = [x.clone().requires_grad_() for x in p.inputs]
    right, _ = oracle.linear_attention(
        *plain[:3],
        F.logsigmoid(plain[4]),
        LOG_I[gate](plain[3]),
        lengths=lengths,
        normalize=gates.INPUT_GATES[gate].normalize,
    )
    found = [x.detach().double() for x in (h, *grads)]
    assert_same(BOUNDS[backend], found, [right.detach(), *torch.autograd.grad(right, plain, p.dh)])


def check_steps(gate: str, backend: str, inplace: bool) -> None:
    p = problem(gate, T=6)
    x = [t.to(DTYPES[backend]) for t in p.inputs]
    state = tfla.State(*(None if s is None else s.to(DTYPES[backend]).clone() for s in p.memory))  # type: ignore[arg-type]
    rows = []
    for t in range(6):
        token = [y[:, t] for y in x]
        h, state = tfla.mlstm_step(*token, state, input_gate=gate, inplace=inplace, backend=backend)
        rows.append(h)
    h, end = truth(gate)(*p.inputs, p.memory)  # type: ignore[misc]
    found = [torch.stack(rows, 1), *true_size(state)]
    assert_same(BOUNDS[backend], [y.double() for y in found], [h, *true_size(end)])


def check_calls_that_come_again(gate: str, backend: str) -> None:
    """Calls that are alike but for the gate share nothing that is kept from call to call."""
    p = problem(gate, T=9)
    x = [t.to(DTYPES[backend]) for t in p.inputs]
    normalize = gates.INPUT_GATES[gate].normalize
    for _ in range(3 if backend == "reference" else 2):
        seen = [
            tfla.mlstm(*x, input_gate=name, normalize=normalize, backend=backend)[0]
            for name in (gate, "exp", "sigmoid")
        ]
        for h, log_i in zip(seen, (LOG_I[gate], lambda i: i, F.logsigmoid), strict=True):
            right, _ = oracle.linear_attention(
                *p.inputs[:3], F.logsigmoid(p.inputs[4]), log_i(p.inputs[3]), normalize=normalize
            )
            assert_same(BOUNDS[backend], [h.double()], [right])


def check_limits(gate: str, backend: str) -> None:
    """A closed input gate writes nothing, whatever the gate."""
    p = problem(gate, T=9)
    x = [t.to(DTYPES[backend]) for t in p.inputs]
    x[3][:, 4] = -float("inf")
    v = x[2].clone()
    v[:, 4] = 7.0
    a, _ = tfla.mlstm(*x, input_gate=gate, backend=backend)
    b, _ = tfla.mlstm(*x[:2], v, *x[3:], input_gate=gate, backend=backend)
    assert a.isfinite().all() and torch.equal(a, b)
