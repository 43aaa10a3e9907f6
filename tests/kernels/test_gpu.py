"""The kernels on a GPU: ``pytest -m gpu``. Every tile that the plan can choose, against fp64.

The rule is that of the whole suite: at most twice the error of the plain recurrence in the same
dtype.
"""

import threading
from collections import Counter
from collections.abc import Iterator

import checks
import pytest
import recurrence as oracle
import torch
from problems import Case, packed
from xlstm_models import make

import tfla
from tfla.xlstm import XLSTMConfig

pytestmark = pytest.mark.gpu

GATES = ["exp", "sigmoid"]
DIMS = [
    (8, 8),
    (16, 64),
    (48, 80),
    (92, 184),
    (96, 96),
    (128, 128),
    (128, 256),
    (256, 128),
    (256, 512),
    (512, 256),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def poison() -> None:
    """What a kernel forgets to write is NaN: the allocator hands out memory that was filled with
    it."""
    torch.full((1 << 26,), float("nan"), device="cuda")  # the pool of large blocks
    del [torch.full((1 << 17,), float("nan"), device="cuda") for _ in range(512)][
        :
    ]  # of small ones


def on_gpu(**fields: object) -> Case:
    return Case(**{"device": "cuda", "backend": "triton"} | fields)  # type: ignore[arg-type]


def check(case: Case) -> None:
    """At most twice the error of the plain recurrence. df and dm0 are differences of terms that are
    rounded themselves: where they cancel, and in fp32, where the recurrence never forms the terms,
    they have an absolute floor, one unit of the last place of the terms."""
    floors = case.dtype == torch.float32 or case.gates in checks.CANCELLING
    checks.check_against_recurrence(case, floor_eps=torch.finfo(case.dtype).eps if floors else None)


@pytest.mark.parametrize("dims", DIMS, ids=lambda d: f"{d[0]}-{d[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_every_head_dim(gate: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    K, V = dims
    check(on_gpu(T=200, B=4, H=4, K=K, V=V, dtype=dtype, input_gate=gate))


@pytest.mark.parametrize("T", [0, 1, 31, 32, 33, 64, 65, 257, 1000])
@pytest.mark.parametrize("gate", GATES)
def test_every_length(gate: str, T: int) -> None:
    checks.check_against_recurrence(on_gpu(T=T, K=64, V=64, dtype=torch.bfloat16, input_gate=gate))


# Heads of v, groups of q and k: few heads a group, and many.
GROUPS = [(6, 3), (6, 1), (16, 2)]


@pytest.mark.parametrize("dims", [(16, 64), (92, 40), (128, 64), (64, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_groups(gate: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """Over more than one interval between checkpoints."""
    for H, G in GROUPS:
        sizes = {"H": H, "groups": G, "K": dims[0], "V": dims[1]}
        check(on_gpu(T=450, B=1, dtype=dtype, input_gate=gate, **sizes))


@pytest.mark.parametrize("T", [1, 20, 64, 129, 384, 1000])
@pytest.mark.parametrize("gate", GATES)
def test_groups_of_every_length(gate: str, T: int) -> None:
    sizes = {"H": 10, "groups": 2, "K": 64, "V": 64}
    check(on_gpu(T=T, dtype=torch.bfloat16, input_gate=gate, reverse=True, **sizes))


@pytest.mark.parametrize("states", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_groups_packed(gate: str, states: tuple[bool, bool]) -> None:
    fields = {"state": states[0], "final": states[1], "dtype": torch.bfloat16, "input_gate": gate}
    sizes = {"H": 12, "groups": 2, "K": 128, "V": 64}
    lengths = (0, 5, 0, 500, 33, 390)
    check(packed(*lengths, device="cuda", backend="triton", **fields, **sizes))


def test_groups_take_no_memory_of_all_heads() -> None:
    """128 heads of 64, state 128: dq and dk of every head would be 2 x 32 KiB a token."""
    T, H, K, V = 32768, 128, 128, 64
    q, k = torch.randn(2, 1, T, 8, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    v = torch.randn(1, T, H, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    log_f = -torch.rand(1, T, H, device="cuda").requires_grad_()
    dh = torch.randn_like(v)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    h, _ = tfla.linear_attention(q, k, v, log_f, scale=1.0, backend="triton")
    found = torch.autograd.grad(h, [q, k, v, log_f], dh)
    assert (torch.cuda.max_memory_allocated() - before) / T < 60 * 1024
    again = torch.autograd.grad(
        tfla.linear_attention(q, k, v, log_f, scale=1.0, backend="triton")[0], [q, k, v, log_f], dh
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("T", [33, 64, 65, 1000, 8192])
@pytest.mark.parametrize("gate", GATES)
def test_every_length_in_fp32(gate: str, T: int) -> None:
    """Of short sequences on the plain units, of others in three parts; cut where they are long."""
    check(on_gpu(T=T, H=1, K=64, V=64, dtype=torch.float32, input_gate=gate, state=T != 64))


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_packed_in_fp32(gate: str, final: bool) -> None:
    fields = {"K": 64, "V": 128, "input_gate": gate, "state": final, "final": final}
    check(packed(0, 5, 0, 300, 33, **fields, device="cuda", backend="triton", dtype=torch.float32))


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_passes_through_fp32_as_in_ieee_arithmetic(
    where: str, value: float
) -> None:
    """inf times a number is inf, not NaN, though one of its three parts is 0 or has another sign.
    All inputs are positive, for the recurrence to have no inf - inf of its own."""
    g = torch.Generator().manual_seed(0)
    x = {n: torch.rand(1, 150, 1, 16, generator=g) + 0.5 for n in "qkv"}
    gates = [torch.randn(1, 150, 1, generator=g) for _ in "if"]
    x["v"][0, 3, 0, 5] = 1.0  # whose lower parts are 0
    x[where][0, 70, 0, 5] = value
    truth, _ = oracle.mlstm(*x.values(), *gates, input_gate="sigmoid", dtype=torch.float64)
    on_device = [t.cuda() for t in (*x.values(), *gates)]
    h = tfla.mlstm(*on_device, input_gate="sigmoid", backend="triton")[0].cpu()
    later = torch.arange(150) >= 70  # earlier tokens of its chunk multiply it by 0
    untouched = torch.arange(150) < 64
    for tokens in (later, untouched):
        torch.testing.assert_close(
            h[:, tokens], truth[:, tokens], rtol=1e-6, atol=0.0, equal_nan=True
        )


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("gate", GATES)
class TestFp32WithTf32Allowed:
    """With products of 16 bits, where TF32 has 11: twice the error of such inputs."""

    @pytest.fixture(autouse=True)
    def pairs(self) -> None:
        if torch.cuda.get_device_capability()[0] not in (8, 9, 12):
            pytest.skip("where no scan is written for it, the products are TF32's own, of 11 bits")

    @pytest.mark.parametrize("dims", DIMS, ids=str)
    def test_every_head_dim(self, gate: str, dims: tuple[int, int]) -> None:
        fields = {"T": 200, "B": 4, "H": 4, "K": dims[0], "V": dims[1], "input_gate": gate}
        checks.check_sixteen_bits(on_gpu(dtype=torch.float32, **fields))

    @pytest.mark.parametrize("T", [33, 64, 65, 1000, 8192])
    def test_every_length(self, gate: str, T: int) -> None:
        case = on_gpu(T=T, H=1, K=64, V=64, dtype=torch.float32, input_gate=gate, state=T != 64)
        checks.check_sixteen_bits(case)

    @pytest.mark.parametrize("gates", ["f=-1e5", "f=-12", "f=+30", "i=-30", "i=+95", "resets 50%"])
    def test_extreme_gates(self, gate: str, gates: str) -> None:
        fields = {"T": 150, "K": 128, "V": 64, "gates": gates, "input_gate": gate}
        checks.check_sixteen_bits(on_gpu(dtype=torch.float32, **fields))

    def test_a_long_sequence_cut_of_strided_inputs(self, gate: str) -> None:
        """Eight warps, many chunks, splits; twice the same bit for bit."""
        B, T, H, K, V = 1, 20000, 2, 128, 256
        *_, i, f = problem(B, T, H, K, V, torch.float32)
        q, k, v = torch.randn(B, T, H, 2 * K + V, device="cuda").split((K, K, V), -1)
        dh = torch.randn(B, T, V, H, device="cuda").mT
        exact = [x.double() for x in (q, k, v, i, f)]
        off = [x * (1 + 2**-17 * torch.randn_like(x).sign()) for x in (*exact[:3], dh.double())]
        truth = gradients(exact, dh.double(), input_gate=gate, backend="reference")
        near = gradients([*off[:3], *exact[3:]], off[3], input_gate=gate, backend="reference")
        ours, again = (gradients([q, k, v, i, f], dh, input_gate=gate) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        for name, x, y, z in zip(NAMES, ours, truth, near, strict=True):
            error, yardstick = ((r.double() - y).norm() for r in (x, z))
            if name == "df":  # a difference of terms, each of which is rounded
                terms = checks.squares_of_later((truth[1] * exact[0]).square().sum(-1), 1).sqrt()
                error -= 2**-17 * (terms * torch.sigmoid(-exact[4])).norm()
            assert error <= 2 * yardstick, f"{name}: {error / y.norm():.1e}"

    @pytest.mark.parametrize("final", [True, False])
    def test_packed(self, gate: str, final: bool) -> None:
        fields = {"K": 64, "V": 128, "input_gate": gate, "state": final, "final": final}
        case = packed(
            0, 5, 0, 300, 33, **fields, device="cuda", backend="triton", dtype=torch.float32
        )
        checks.check_sixteen_bits(case)


@pytest.mark.parametrize("lengths", [(0, 5, 0, 300, 33), (1, 2) * 20, (2, 5) * 20, (700,)])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("states", [(True, True), (True, False), (False, False)], ids=str)
def test_packed(gate: str, lengths: tuple[int, ...], states: tuple[bool, bool]) -> None:
    """With states before, behind, or none at all, which makes one sequence of them."""
    if gate == "exp" and not any(states) and lengths[0] == 1:
        # The recurrence has di of one token exactly, 0. test_thousands_of_documents has such too.
        pytest.skip("nothing to compare the rounding of di with")
    fields = {"K": 64, "V": 128, "dtype": torch.bfloat16, "input_gate": gate, "device": "cuda"}
    case = packed(*lengths, **fields, backend="triton", state=states[0], final=states[1])
    checks.check_against_recurrence(case)


@pytest.mark.parametrize(
    "values",
    [
        [0, 300, 650],
        [40, 300, 650],
        [0, 650, 300, 700],
        [-5, 100, 9000],
        [700, 300, 0],
    ],
)
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_offsets_that_no_host_has_read(gate: str, states: bool, values: list[int]) -> None:
    """They count as ascending within [0, T], from a column of a table too; tokens of no sequence
    have zeros in h and in all gradients."""
    T, N = 700, len(values) - 1
    inputs = problem(1, T, 4, 64, 128, torch.bfloat16)
    meant: list[int] = []
    for value in values:
        meant.append(max([0, min(value, T), *meant[-1:]]))
    C, n, m = (torch.randn(N, 4, *s, device="cuda") for s in ((64, 128), (64,), ()))

    def run(cu: torch.Tensor, around: bool) -> list[torch.Tensor]:
        memory = [torch.cat([s[:1], s, s[:1]]) if around else s for s in (C, n, m)]
        memory = memory if gate == "exp" else [memory[0], None, None]  # type: ignore[list-item]
        leaves = [x.detach().requires_grad_() for x in inputs]
        h, end = tfla.mlstm(
            *leaves,
            input_gate=gate,
            cu_seqlens=cu,
            output_final_state=states,
            backend="triton",
            initial_state=tfla.State(*memory) if states else None,
        )
        assert end is None or all(s.isfinite().all() for s in end if s is not None)
        return [h.detach(), *torch.autograd.grad(h.float().square().sum(), leaves)]

    table = torch.tensor(values, device="cuda")[:, None].repeat(1, 3)
    outside = torch.ones(T, dtype=torch.bool, device="cuda")
    outside[meant[0] : meant[-1]] = False
    expected = run(torch.tensor([0, *meant, T], device="cuda"), True)
    for _ in range(3):  # the second and the third launch by the driver
        for a, b in zip(run(table[:, 1], False), expected, strict=True):
            assert (a[:, outside] == 0).all()
            a, b = a[:, ~outside].float(), b[:, ~outside].float()
            assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_that_do_not_exist(normalize: bool) -> None:
    q, k, v, i, f = (x[0] for x in problem(1, 3, 4, 64, 128, torch.bfloat16))
    state = [torch.randn(6, 4, *s, device="cuda") for s in ((64, 128), (64,), ())]
    state = state if normalize else [state[0], None, None]  # type: ignore[list-item]
    memory = [None if s is None else s.clone() for s in state]
    slots = torch.tensor([[4, 0], [-1, 0], [6, 0]], device="cuda")[:, 0]
    h, _ = tfla.mlstm_step(
        q,
        k,
        v,
        i,
        f,
        tfla.State(*memory),
        normalize=normalize,
        inplace=True,
        slots=slots,
        backend="triton",
    )
    assert h[0].isfinite().all() and h[1:].isnan().all()
    for s, before in zip(memory, state, strict=True):
        assert s is None or torch.equal(s[[0, 1, 2, 3, 5]], before[[0, 1, 2, 3, 5]])
        assert s is None or not torch.equal(s[4], before[4])


@pytest.mark.parametrize(
    "gates", ["f=-1e5", "f=-1000", "f=-12", "f=+30", "i=-30", "i=+30", "i=+95", "resets 50%"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(dtype: torch.dtype, gates: str) -> None:
    if dtype == torch.float16 and gates.startswith("i="):
        pytest.skip("the true gradients, 1e6 and more where n . q is next to 0, are beyond fp16")
    check(on_gpu(T=150, K=64, V=64, dtype=dtype, gates=gates))


def problem(
    B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)

    def new(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=g, device="cuda").to(of)

    gates = [new(B, T, H, of=torch.float32), 3 + new(B, T, H, of=torch.float32)]
    return [new(B, T, H, K), new(B, T, H, K), new(B, T, H, V), *gates]


def gradients(
    inputs: list[torch.Tensor], dh: torch.Tensor, **options: object
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    options.setdefault("backend", "triton")
    h, _ = tfla.mlstm(*leaves, **options)  # type: ignore[arg-type]
    return [h, *torch.autograd.grad(h, leaves, dh.to(h.dtype))]


NAMES = ("h", "dq", "dk", "dv", "di", "df")


@pytest.mark.parametrize("gate", GATES)
def test_thousands_of_documents(gate: str) -> None:
    """As one sequence, which they are where nobody wants their states, as right as one by one."""
    T = 20000
    inputs = problem(1, T, 2, 64, 128, torch.bfloat16)
    dh = torch.randn_like(inputs[2])
    cuts = (
        torch.randint(0, T + 1, (4999,), generator=torch.Generator().manual_seed(0)).sort().values
    )
    ends = torch.cat([torch.tensor([0]), cuts, torch.tensor([T])]).cuda()
    options = {"input_gate": gate, "cu_seqlens": ends}
    exact = [x.double() for x in inputs]
    true = gradients(exact, dh.double(), **options, backend="reference")
    one = gradients(inputs, dh, **options, backend="triton")
    each = gradients(inputs, dh, **options, backend="triton", output_final_state=True)
    for name, x, y, z in zip(NAMES, one, each, true, strict=True):
        off, usual = ((t.double() - z).norm() / z.norm() for t in (x, y))
        assert off < 1.5 * usual + 1e-4, f"{name}: {off}, document by document {usual}"


@pytest.mark.parametrize("gate", GATES)
def test_long_sequences_with_few_heads(gate: str) -> None:
    """Split along T, against the recurrence."""
    case = on_gpu(T=8192, H=1, K=64, V=64, dtype=torch.bfloat16, input_gate=gate)
    checks.check_against_recurrence(case)


@pytest.mark.parametrize("opened", [0.0, 3.0], ids=["fades within a split", "does not"])
@pytest.mark.parametrize("gate", GATES)
def test_the_longest_sequence(gate: str, opened: float) -> None:
    """65,536 tokens, against the chunked reference in fp64: the recurrence would take minutes.

    The bounds are three units of bf16's last place for a rounded result, and ten for df, a sum over
    what may be thousands of tokens of differences of rounded terms (docs/how/math.md).
    """
    inputs = problem(1, 65536, 2, 64, 128, torch.bfloat16)
    inputs[4] += opened
    dh = torch.randn_like(inputs[2])
    truth = gradients([x.double() for x in inputs], dh, input_gate=gate, backend="reference")
    ours = gradients(inputs, dh, input_gate=gate, backend="triton")
    for name, x, y in zip(NAMES, ours, truth, strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error <= (10 if name == "df" else 3) * 2**-9, f"{name}: {error:.1e}"


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("gate", GATES)
def test_ten_thousand_random_problems(gate: str, part: int) -> None:
    """Lengths, batches and gates drawn by seed over one specialisation a dtype: h and all
    gradients.

    Each within one unit of the dtype's last place and four times what the chunked reference is off
    by in the same dtype (its products are in fp32: it shows how ill-conditioned a problem is), or
    within twice what the recurrence or the roundings of the inputs make of the problem. Where one
    token with n . q next to 0 makes up the norm, an error is one draw, and one program's alone may
    be ten times below another's: of the inputs' roundings the largest of six draws is taken.
    """
    draw = torch.Generator().manual_seed(7 + part)
    for seed in range(1250 * part, 1250 * (part + 1)):
        dtype = DTYPES[seed % 3]
        B, T, H = (int(torch.randint(1, n, (1,), generator=draw)) for n in (4, 300, 4))
        inputs = problem(B, T, H, 32, 32, dtype, seed)
        inputs[4] -= 8 * torch.rand(1, generator=draw).item()
        dh = torch.randn_like(inputs[2])
        truth = gradients([x.double() for x in inputs], dh, input_gate=gate, backend="reference")
        plain = gradients(inputs, dh, input_gate=gate, backend="reference")
        ours = gradients(inputs, dh, input_gate=gate, backend="triton")
        eps = max(torch.finfo(dtype).eps, 1e-6)
        for name, x, y, z in zip(NAMES, ours, truth, plain, strict=True):
            scale = y.norm() if name != "df" else y.norm() + (truth[1] * inputs[0]).abs().sum()
            error, yardstick = ((r.double() - y).norm() for r in (x, z))
            if error > eps * scale + 4 * yardstick:  # a rounded h may cancel: ask the recurrence
                yardstick = (recurrence(inputs, dh, gate)[name] - y.cpu()).norm().item()
                if error > 2 * yardstick:
                    yardstick = max(yardstick, *roundings(inputs, dh, gate, name, y))
                assert error <= 2 * yardstick, (
                    f"{name}, seed {seed}, B {B}, T {T}, H {H}, {dtype}: {error / scale:.1e}, "
                    f"the recurrence and roundings of the inputs {yardstick / scale:.1e}"
                )


def roundings(
    inputs: list[torch.Tensor], dh: torch.Tensor, gate: str, name: str, truth: torch.Tensor
) -> list[float]:
    """Distances from the truth, in exact arithmetic, where each fp32 input is off by what its
    rounding may have been: half a unit of its last place. No program in fp32 can be held to less.
    (In 16 bits the inputs are what they are, and sums are in fp32: their error is the output's.)"""
    found, draw = [], torch.Generator("cuda").manual_seed(0)
    for _ in range(6):
        moved = [x.double() for x in inputs]
        for x in moved:
            half = torch.finfo(torch.float32).eps / 2
            x *= 1 + half * (2 * torch.rand(x.shape, generator=draw, device="cuda") - 1)
        other = gradients(moved, dh.double(), input_gate=gate, backend="reference")
        found.append((other[NAMES.index(name)] - truth).norm().item())
    return found


def recurrence(inputs: list[torch.Tensor], dh: torch.Tensor, gate: str) -> dict[str, torch.Tensor]:
    """h and gradients of the plain recurrence in the dtype of the inputs."""
    leaves = [x.cpu().requires_grad_() for x in inputs]
    h = oracle.mlstm(*leaves, input_gate=gate, dtype=leaves[0].dtype)[0]
    grads = torch.autograd.grad(h, leaves, dh.cpu().to(h.dtype))
    return dict(zip(NAMES, [x.double() for x in (h.detach(), *grads)], strict=True))


def test_a_second_run_is_the_same_bit_for_bit() -> None:
    inputs = problem(1, 20000, 2, 128, 256, torch.bfloat16)
    dh = torch.randn_like(inputs[2])
    first, second = (gradients(inputs, dh, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
@pytest.mark.parametrize("gate", GATES)
def test_a_call_is_a_few_launches_from_any_thread(gate: str) -> None:
    """From the cache, by the CUDA driver alone: a new thread has no context yet. Only on Hopper the
    scan of h makes the denominator itself."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    launches = 2 if gate == "sigmoid" else 3 if hopper else 4
    x = [torch.randn(1, 300, 4, D, device="cuda").bfloat16() for D in (128, 128, 256)]
    gates = [torch.randn(1, 300, 4, device="cuda") for _ in range(2)]

    def forward() -> torch.Tensor:
        return tfla.mlstm(*x, *gates, input_gate=gate, backend="triton")[0]

    found = [forward() for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        found.append(forward())
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    assert sum(event.device_type == on_device for event in seen.events()) == launches
    thread = threading.Thread(target=lambda: found.append(forward()))
    thread.start()
    thread.join()
    assert len(found) == 5 and all(torch.equal(h, found[0]) for h in found)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_a_cuda_graph_replays_forward_and_backward() -> None:
    inputs = problem(2, 500, 2, 64, 64, torch.bfloat16)
    dh = torch.randn_like(inputs[2])
    leaves = [x.requires_grad_() for x in inputs]

    def step() -> list[torch.Tensor]:
        h, _ = tfla.mlstm(*leaves, backend="triton")
        return [h, *torch.autograd.grad(h, leaves, dh)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves[:3]:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, again in zip(captured, step(), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiles_as_one_graph() -> None:
    inputs = [x.requires_grad_() for x in problem(2, 300, 2, 64, 64, torch.bfloat16)]
    run = torch.compile(lambda *x: tfla.mlstm(*x, backend="triton")[0], fullgraph=True)
    dh = torch.randn_like(inputs[2])
    for ours, eager in zip(
        (h := run(*inputs), *torch.autograd.grad(h, inputs, dh)), gradients(inputs, dh), strict=True
    ):
        torch.testing.assert_close(ours, eager)


def test_another_length_compiles_nothing() -> None:
    from tfla.kernels import gates, hopper, mma, normalizer, scan

    def compiled() -> int:
        kernels = [k for m in (gates, normalizer, scan, hopper, mma) for k in vars(m).values()]
        kernels = [k for k in kernels if hasattr(k, "device_caches")]
        return sum(len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels)

    for T in (300, 301, 1000):
        gradients(problem(2, T, 2, 64, 64, torch.bfloat16), torch.ones(2, T, 2, 64, device="cuda"))
    before = compiled()
    for B, T in ((3, 333), (5, 512), (1, 999)):
        gradients(problem(B, T, 2, 64, 64, torch.bfloat16), torch.ones(B, T, 2, 64, device="cuda"))
    assert compiled() == before > 0


@pytest.mark.parametrize("B", [1, 100_000])
def test_any_number_of_heads(B: int) -> None:
    inputs = problem(B, 2, 1, 16, 16, torch.bfloat16)
    truth = oracle.mlstm(*(x.double().cpu() for x in inputs), dtype=torch.float64)[0]
    h, _ = tfla.mlstm(*inputs, backend="triton")
    assert (h.double().cpu() - truth).norm() <= 4e-3 * truth.norm()


def test_more_than_two_to_the_31_elements() -> None:
    T = 9 * 2**20
    q, k, v, i, f = problem(1, T, 2, 16, 128, torch.bfloat16)
    h, _ = tfla.mlstm(q, k, v, i, f, backend="triton")
    tail = slice(T - 4096, T)  # f = 3: what lies further back is forgotten
    last, _ = tfla.mlstm(*(x[:, tail].double() for x in (q, k, v, i, f)), backend="reference")
    ours = h[:, tail][:, 2048:].double()
    assert (ours - last[:, 2048:]).norm() <= 4e-3 * last[:, 2048:].norm()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dims", [(64, 64), (256, 512)])
def test_steps_equal_the_sequence(dims: tuple[int, int], gate: str) -> None:
    q, k, v, i, f = problem(3, 20, 2, *dims, torch.float32)
    h, end = tfla.mlstm(
        q, k, v, i, f, input_gate=gate, output_final_state=True, backend="reference"
    )
    state = tfla.State(*(None if x is None else torch.zeros_like(x) for x in end))
    for t in range(20):
        h_t, state = tfla.mlstm_step(
            *(x[:, t] for x in (q, k, v, i, f)),
            state,
            input_gate=gate,
            inplace=True,
            backend="triton",
        )
        torch.testing.assert_close(h_t, h[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_fused_between_matrix_products_is_what_torch_computes(
    gate: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(XLSTMConfig(97, 96, 2, 3, input_gate=gate), dtype).cuda()
    tokens = torch.randint(97, (2, 70), device="cuda")
    active = torch.tensor([True, False], device="cuda")

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits, state = model(tokens[:, :-1], output_state=True)
        last, after = model.step(tokens[:, -1], state, active=active)
        assert all(torch.equal(a.C[1], b.C[1]) for a, b in zip(state, after, strict=True))
        return torch.cat([logits.flatten(0, 1), last[:1]])

    found = run()
    monkeypatch.setattr("tfla.xlstm.model.fused", lambda x, weight: None)
    wanted = run()  # the gates of this model are wild: rounding weighs more than usual
    assert (found - wanted).norm() / wanted.norm() < (1e-3 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4096), (3, 50, 96), (16384, 4096)], ids=str)
def test_a_fused_sum_is_rounded_as_torch_rounds_it(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    from tfla.kernels import pointwise

    x, y = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    weight = torch.rand(shape[-1], device="cuda").to(dtype)
    total, norm = pointwise.add_norm(x, y, weight, 1e-6)
    assert torch.equal(total, x + y)
    exact = torch.nn.functional.rms_norm(total.double(), shape[-1:], weight.double(), 1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(norm.double(), exact, rtol=max(eps, 1e-6), atol=1e-6)


@pytest.mark.parametrize("warm", [True, False], ids=["after a step", "before any"])
@pytest.mark.parametrize("shared", [False, True], ids=["two states", "slots of one"])
def test_recorded_steps_run_at_the_same_time(shared: bool, warm: bool) -> None:
    """Two graphs on two streams, of two states or of one, update what one after the other does."""
    from tfla.kernels import decode

    H, K, V = 8, 256, 512
    inputs = [[x[:, 0] for x in problem(4, 1, H, K, V, torch.bfloat16)] for _ in range(2)]
    slots = [torch.tensor([0, 2, 4, 6], device="cuda") + n for n in range(2)] if shared else None

    def states() -> list[tfla.State]:
        one = (torch.zeros(8, H, K, V), torch.zeros(8, H, K), torch.zeros(8, H))
        made = [tfla.State(*(x.cuda() for x in one)) for _ in range(1 if shared else 2)]
        return made * 2 if shared else [tfla.State(*(x[:4] for x in s)) for s in made]

    def act(n: int, state: list[tfla.State]) -> None:
        rows = slots[n] if slots else None
        tfla.mlstm_step(*inputs[n], state[n], inplace=True, slots=rows, backend="triton")

    wanted, found = states(), states()
    for _ in range(100 + warm):
        for n in range(2):
            act(n, wanted)
    if not warm:  # addresses that no step has seen; the kernel itself is compiled by now
        for key in [k for k in decode._arrivals if k[1] in {s.m.data_ptr() for s in found}]:
            del decode._arrivals[key]
    graphs, streams = [], [torch.cuda.Stream() for _ in range(2)]
    for n in range(2):
        if warm:
            act(n, found)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[n]):
            act(n, found)
    torch.cuda.synchronize()
    for _ in range(100):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(x.any() for x in decode._arrivals.values())


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_a_recorded_layer_of_a_step_is_four_products_and_six_kernels() -> None:
    def launches(layers: int) -> Counter[str]:
        model = make(XLSTMConfig(256, 512, layers, 2), torch.bfloat16).cuda()
        state, tokens = model.init_state(1), torch.zeros(1, dtype=torch.int64, device="cuda")
        with torch.no_grad():
            model.step(tokens, state, inplace=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model.step(tokens, state, inplace=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            graph.replay()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return Counter(e.name for e in seen.events() if e.device_type == on_device)

    of_two = launches(3) - launches(1)
    ours = Counter({name: n for name, n in of_two.items() if name.startswith("_")})
    wanted = "_add_norm_kernel _gates_kernel _step_kernel _head_norm_kernel _add_norm_kernel"
    assert ours == Counter(2 * [*wanted.split(), "_swiglu_kernel"])
    assert not [name for name in of_two if "elementwise" in name]
    # A library may cut a product of one row along its sum, and add up in a launch of its own.
    assert 8 <= (of_two - ours).total() <= 16
