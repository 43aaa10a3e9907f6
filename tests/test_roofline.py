"""What calls cost: held against counts by hand, the paper's figures and measured limits."""

import dataclasses
import math
from typing import Any

import pytest
import torch

import tfla
from tfla.bench import measure
from tfla.bench import roofline as r
from tfla.bench.memory import Memory, memory
from tfla.plan import Device, Plan, Problem, Tile, plan
from tfla.programs import call_of, programs

H200 = r.MACHINES["h200"]


def tile(A: int, X: int, block_a: int, block_x: int) -> Tile:
    return Tile(A, X, block_a, block_x, -(-A // block_a), 4, 2, False, False)


def plan_of(L: int, h: Tile, dq: Tile) -> Plan:
    """A plan with these tiles; what else a plan has does not matter here."""
    real = plan(Problem(1, 64, 1, 64, 64, 1, False, 2, "ieee"), Device((9, 0), 132, 232448))
    return dataclasses.replace(real, L=L, checkpoint_every=2048, split_len=0, h=h, dq=dq)


def by_name(kernels: list[r.Kernel]) -> dict[str, r.Kernel]:
    return {kernel.name: kernel for kernel in kernels}


def test_the_least_time_is_the_one_known_by_hand() -> None:
    """65,536 tokens, 16 heads 128/256, bf16 at 4.28 TB/s: 0.378 and 1.009 ms."""
    times = [
        r.least_bytes(65536, 16, 128, 256, 2, 8, backward) / 4.28e12 * 1e3
        for backward in (False, True)
    ]
    assert times == pytest.approx([0.378, 1.009], abs=5e-4)


@pytest.mark.parametrize(("block_x", "count"), [(64, 884736), (128, 753664)])
def test_four_scans_have_the_arithmetic_counted_by_hand(block_x: int, count: int) -> None:
    """At chunks of 64: h and dv have 256 / block_x tiles, each with 2 64 128 for its scores, and
    256 (2 64 + 4 128) for the rest; dq and dk 128 / block_x, 2 64 256 and 128 (2 64 + 4 256).
    """
    planned = plan_of(64, tile(128, 256, 128, block_x), tile(256, 128, 256, block_x))
    problem = Problem(4, 16384, 16, 128, 256, 4, False, 2, "ieee")
    found = by_name(r.kernels(problem, planned, normalize=False))
    flops = sum(found[name].flops for name in ("h", "dv", "dq", "dk"))
    assert flops == 65536 * 16 * count


def test_a_tile_is_counted_as_its_program_runs() -> None:
    """One head of 100 tokens: products of whole blocks, scores again in every tile."""
    planned = plan_of(16, tile(40, 24, 64, 16), tile(24, 40, 32, 16))
    problem = Problem(1, 100, 1, 40, 24, 1, False, 2, "ieee")
    found = by_name(r.kernels(problem, planned, normalize=False, train=False))
    per_tile = 2 * 16 * 64 + 2 * 16 * 16 + 4 * 64 * 16  # scores, times values, state twice
    assert found["h"].flops == 100 * 2 * per_tile
    assert set(found) == {"weights", "h"}


def test_slices_repeat_the_values_and_carry_partial_sums() -> None:
    problem = Problem(1, 128, 1, 128, 64, 1, False, 2, "ieee")

    def scan(block_a: int) -> r.Kernel:
        planned = plan_of(64, tile(128, 64, block_a, 64), tile(64, 128, 64, 64))
        return by_name(r.kernels(problem, planned, normalize=False, train=False))["h"]

    whole, split = scan(128), scan(64)
    assert (whole.launches, split.launches) == (1, 2)
    assert split.flops - whole.flops == 128 * 2 * 64 * 64  # the second product with the values
    weights_and_values = 6 * 4 + 64 * 2
    assert split.bytes - whole.bytes == 128 * (weights_and_values + 2 * 64 * 4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("K", [64, 128, 256])
def test_a_plan_never_undercuts_the_function(K: int, normalize: bool) -> None:
    """Real plans move no fewer bytes and compute no less than the function itself."""
    for name, machine in r.MACHINES.items():
        for T in (100, 4096, 65536):
            problem = Problem(2, T, 4, K, 2 * K, 2, False, 2, "ieee")
            assert machine.device is not None
            planned = plan(problem, machine.device)
            for train in (False, True):
                found = r.kernels(problem, planned, normalize, train)
                least = r.least_bytes(2 * T, 4, K, 2 * K, 2, 8, train)
                assert sum(kernel.bytes for kernel in found) >= least, (name, T)
                state = 2 * T * 4 * 4 * K * 2 * K * (4 if train else 1)
                assert sum(kernel.flops for kernel in found) >= state, (name, T)
                assert all(kernel.l2_bytes >= kernel.bytes for kernel in found)


def test_cutting_a_sequence_costs_launches_and_bytes() -> None:
    problem = Problem(1, 65536, 1, 64, 64, 1, False, 2, "ieee")
    found = plan(problem, Device((9, 0), 132, 232448))
    assert found.split_len
    split = by_name(r.kernels(problem, found, normalize=True))
    assert split["h: splits"].launches == 2 * found.h.slices
    assert 0 < split["h: splits"].flops < split["h"].flops


def test_kernels_of_both_variants_are_those_that_are_launched() -> None:
    problem = Problem(4, 4096, 16, 128, 256, 4, False, 2, "ieee")
    found = plan(problem, Device((9, 0), 132, 232448))
    sigmoid, exp = (set(by_name(r.kernels(problem, found, n))) for n in (False, True))
    assert sigmoid == {"weights", "h", "dv", "dq", "dk", "gate gradients"}
    assert exp - sigmoid == {"sums", "gauge", "column", "column states"}


def arithmetic(launch: Any, chunks: int) -> int:
    """FLOPs of a launch of a scan: of each chunk that one of its programs walks over, the scores,
    their product with the values and the state's share, unless it makes states alone; and the
    state's update."""
    c, numbers = launch.parameters.constants, launch.parameters.numbers
    L, A, X = c["L"], c["BLOCK_A"], c["BLOCK_X"]
    whole = launch.parameters.writes["out"] is not None
    once = 2 * L * A * X + (2 * L * L * (A + X) + 2 * L * A * X if whole else 0)
    return chunks * -(-numbers["X"] // X) * once


def passes_over(launch: Any, name: str) -> float:
    """How often a launch goes over an argument: a slice of a contraction takes its part of a, b and
    checkpoints; what is updated is read and written, but checkpoints only where splits start."""
    numbers, c = launch.parameters.numbers, launch.parameters.constants
    if name == "checkpoints" and "BLOCK_A" in c:
        stored, x = numbers["stride_checkpoint"], c["STRIDE_CHECKPOINT_X"]
        return c["BLOCK_A"] / (stored // c["STRIDE_CHECKPOINT_A"] if x == 1 else x)
    if name in ("a", "b") and "BLOCK_A" in c:
        return numbers["A"] / numbers["stride_ah"]
    return 2 if name in launch.parameters.updates else 1


@pytest.mark.parametrize("machine", ["h200", "a100", "4090", "b200"])
@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 16384, 16, 128, 256), torch.bfloat16),
        ((4, 8192, 8, 256, 512), torch.bfloat16),
        ((8, 8192, 16, 64, 64), torch.float16),
        ((4, 4096, 8, 128, 128), torch.float32),
        ((1, 65536, 2, 128, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_the_counts_are_those_of_the_program(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, gate: str, machine: str
) -> None:
    """Launch by launch: as many, the FLOPs of every scan exactly, and the bytes of what each launch
    reads, updates and writes. A Program says which arrays, not which lines of them: of eight
    vectors of weights a launch may read one, of n a row a checkpoint."""
    pytest.importorskip("triton")
    device = r.MACHINES[machine].device
    assert device is not None
    B, T, H, K, V = shape
    problem = Problem(B, T, H, K, V, B, False, dtype.itemsize, "ieee")
    planned = r.for_dtype(plan(problem, device), dtype)
    counted = by_name(r.kernels(problem, planned, gate == "exp"))
    both = programs(call_of(problem, dtype, gate), device)
    chunks, vector = B * H * T // planned.L, 4 * B * T * H
    found: dict[str, list[int]] = {name: [0, 0, 0] for name in counted}
    for program in both:
        assert program is not None
        for launch in program.launches:
            one = found[launch.label]  # no launch that is not counted
            p = launch.parameters
            scan = "BLOCK_X" in p.constants
            one[0] += 1
            one[1] += arithmetic(launch, chunks) if scan else 0
            one[2] += sum(
                int(passes_over(launch, name) * program.buffers[n].bytes)
                for name, n in (p.reads | p.updates | p.writes).items()
                if n is not None
            )
    for name, (launches, flops, moved) in found.items():
        k = counted[name]
        assert launches == k.launches
        if name in ("h", "dv", "dq", "dk", "h: splits", "dv: splits"):
            assert flops == k.flops, name
        if "splits" in name:  # an estimate of what has not faded
            continue
        more = 8 * vector * k.launches  # lines of vectors that are not read
        more += 2 * 4 * chunks * K if name == "gate gradients" else 0
        assert 0.99 * k.bytes <= moved <= 1.01 * k.bytes + more, (name, moved, k.bytes)


def test_arithmetic_of_the_reference_grows_with_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(1, 1024, 1, 64, 64, 1, False, 4, "ieee")
    before = by_name(r.reference_kernels(problem, normalize=True))
    monkeypatch.setattr(r.layout, "L", 2 * r.layout.L)
    after = by_name(r.reference_kernels(problem, normalize=True))
    L = r.layout.L // 2
    assert after["h"].flops - before["h"].flops == 1024 * 2 * L * (64 + 64)
    assert "nu" in after and "nu" not in by_name(r.reference_kernels(problem, normalize=False))


@pytest.mark.parametrize("name", sorted(r.MACHINES))
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 256), (256, 512)])
def test_the_best_chunk_is_the_least_of_the_papers_cost(name: str, K: int, V: int) -> None:
    machine = r.MACHINES[name]

    def seconds(L: float) -> float:
        flops, moved = r.paper_cost(L, K, V, 2)
        return flops / machine.flops_per_s["bfloat16"] + moved / machine.bytes_per_s

    best = r.paper_best_chunk(machine, "bfloat16", K, V)
    assert seconds(best) < min(seconds(best * 1.02), seconds(best / 1.02))
    # A state in memory once a chunk is what makes the best chunk large: without it, no more FLOPs.
    assert best > 5 * math.sqrt(2 * K * V / (K + V))


def test_attention_is_counted_as_causal() -> None:
    """Both products over the lower triangle, backward two and a half times as much."""
    T, H, D = 64, 3, 16
    exact = H * 2 * 2 * D * T * (T + 1) // 2
    assert r.attention_flops(T, T, H, D, False) == pytest.approx(exact, rel=1 / T)
    assert r.attention_flops(T, T, H, D, True) == pytest.approx(3.5 * exact, rel=1 / T)


def test_limits_of_a_kernel_are_its_work_over_the_rates() -> None:
    kernel = r.Kernel("h", False, 1, flops=2 * 10**12, bytes=10**9, l2_bytes=10**9)
    machine = r.Machine("m", 1e12, {"bfloat16": 1e15}, "made up")
    assert kernel.ms(machine, "bfloat16") == pytest.approx((1.0, 2.0))
    assert r.limit_ms([kernel, kernel], machine, "bfloat16") == pytest.approx(4.0)
    assert kernel.intensity == 2000.0


def test_named_machines_name_every_dtype() -> None:
    for machine in r.MACHINES.values():
        assert set(machine.flops_per_s) == set(r.SIZES)
        assert all(getattr(torch, name).itemsize == size for name, size in r.SIZES.items())


# ---------------------------------------------------------------- memory of a call


@pytest.mark.parametrize(("gate", "both"), [("exp", 2401862144), ("sigmoid", 2378596352)])
def test_memory_is_what_an_h200_was_seen_to_take(gate: str, both: int) -> None:
    """docs/results/gpu-memory.json, a checkpoint every 2,048 tokens: peaks of forward and backward
    together over what was there before, by torch's allocator. Passes that are played fit their
    buffers in another way."""
    problem = Problem(8, 8192, 8, 256, 512, 8, False, 2, "ieee")
    m = memory(problem, H200.device, torch.bfloat16, gate)
    assert m.output == 8 * 8192 * 8 * 512 * 2
    assert m.inputs == 8 * 8192 * 8 * (2 * 256 + 512) * 2 + 2 * 8 * 8192 * 8 * 4
    assert m.output + m.saved + m.backward == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize("name", sorted(r.MACHINES))
def test_memory_of_every_named_machine(name: str) -> None:
    """At least the gradients; and what is saved is the plan's checkpoints and vectors."""
    device = r.MACHINES[name].device
    assert device is not None
    problem = Problem(2, 4096, 4, 128, 256, 2, False, 2, "ieee")
    m = memory(problem, device, torch.bfloat16, "sigmoid")
    planned = plan(problem, device)
    rows, entries = 2 * 4, planned.checkpoint_shape[0] * planned.checkpoint_shape[1]
    chunks, checkpoints = 4096 // planned.L, 4096 // planned.checkpoint_every - 1
    least = 4 * rows * (chunks + checkpoints * entries)
    assert least <= m.saved <= least + 4 * rows * 4096 * 8 + 4096
    assert m.forward >= m.output + m.saved
    assert m.backward >= m.inputs  # the gradients of q, k, v, i, f


def test_memory_grows_with_tokens_and_not_with_what_the_caller_has() -> None:
    def of(B: int, device: Device | None = H200.device) -> Memory:
        problem = Problem(B, 4096, 8, 64, 64, B, False, 2, "ieee")
        return memory(problem, device, torch.bfloat16, "exp")

    few, many = of(64), of(128)
    assert all(1.9 < b / a < 2.1 for a, b in zip(few, many, strict=True)), (few, many)
    assert of(64) == few  # nothing of one count stays for the next
    reference = of(1, None)
    assert reference.backward > reference.inputs


def test_memory_of_the_reference_is_what_torch_allocates() -> None:
    """Followed on the CPU, by the same passes on real tensors, of gates as they are counted."""
    B, T, H, K, V = 2, 256, 2, 32, 48
    problem = Problem(B, T, H, K, V, B, False, 4, "ieee")
    x = [torch.randn(B, T, H, D, requires_grad=True) for D in (K, K, V)]
    # Gates as at the start of training: those that forget at once take more.
    x += [(torch.randn(B, T, H) + bias).requires_grad_() for bias in (0, 4)]
    dh = torch.randn(B, T, H, V)

    def run(_: int) -> object:
        h, _state = tfla.mlstm(*x, backend="reference")
        return h, torch.autograd.grad(h, x, dh)

    run(0)
    seen = measure.peak_bytes(run, torch.device("cpu"))
    m = memory(problem, None, torch.float32, "exp")
    assert m.output + m.saved + m.backward == pytest.approx(seen, rel=0.1)


def test_memory_that_cannot_be_counted_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Problem(1, 64, 1, 2**30, 64, 1, False, 2, "ieee")
    with pytest.raises(RuntimeError, match="more than 4096 launches"):
        memory(wide, H200.device, torch.bfloat16, "exp")
    monkeypatch.setattr("tfla._compat.triton_error", lambda: "ImportError: no")
    with pytest.raises(RuntimeError, match="need Triton .ImportError: no"):
        memory(Problem(1, 64, 1, 64, 64, 1, False, 2, "ieee"), H200.device, torch.bfloat16, "exp")


def test_a_contraction_of_millions_of_slices_is_counted_at_once() -> None:
    """Equal to the sum over slices, and in no time."""
    problem = Problem(1, 64, 1, 10**9, 8, 1, False, 2, "ieee")
    found = by_name(r.kernels(problem, plan(problem, H200.device or Device((9, 0), 1, 1)), False))
    assert found["h"].launches > 10**6 and found["h"].flops > 4 * 64 * 10**9 * 8
    few, more = (
        by_name(
            r.kernels(
                Problem(1, 64, 1, K, 64, 1, False, 2, "ieee"),
                plan_of(64, tile(K, 64, 64, 64), tile(64, K, 64, 64)),
                False,
            )
        )["h"]
        for K in (320, 384)
    )
    assert (few.launches, more.launches) == (5, 6)
    per_slice = 2 * 64 * 64 + 64 * (2 * 64 + 4 * 64)
    assert more.flops - few.flops == 64 * per_slice
