"""The plan is a value: integers in, the shape of every kernel out."""

import dataclasses

import pytest

from tfla.plan import Device, Plan, Problem, plan

H200 = Device((9, 0), 132, 232448)
A100 = Device((8, 0), 108, 166912)
MI300X = Device((0, 0), 304, 65536)
CONSUMER = Device((12, 0), 170, 101376)
DEVICES = [H200, A100, MI300X, CONSUMER]
PAPER = Problem(B=4, T=16384, H=16, K=128, V=256, N=4, packed=False, bytes=2, precision="ieee")


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 17, 1000, 65536, 1 << 20])
@pytest.mark.parametrize("dims", [(8, 8), (48, 80), (92, 184), (128, 256), (512, 512), (1000, 24)])
@pytest.mark.parametrize("bytes", [2, 4])
def test_a_plan_covers_its_problem(
    device: Device, T: int, dims: tuple[int, int], bytes: int
) -> None:
    K, V = dims
    p = plan(Problem(2, T, 3, K, V, 2, False, bytes, "ieee"), device)
    for tile, A, X in ((p.h, K, V), (p.dq, V, K)):
        assert tile.slices * tile.block_a >= A > (tile.slices - 1) * tile.block_a
        assert tile.tiles * tile.block_x >= X > (tile.tiles - 1) * tile.block_x
        # The state of a program is at most half of its registers.
        assert tile.block_a * tile.block_x <= 128 * 32 * tile.warps
    assert p.checkpoint_every % p.L == 0 and (
        p.split_len == 0 or p.split_len % p.checkpoint_every == 0
    )
    # dq and dk start from what h and dv store, so checkpoints must hold every entry.
    assert p.checkpoint_shape[0] >= K and p.checkpoint_shape[1] >= V


def test_long_sequences_with_few_heads_are_cut_and_full_batches_are_not() -> None:
    assert plan(PAPER, H200).split_len == 0
    one = dataclasses.replace(PAPER, B=1, N=1, T=65536)
    few = plan(one, H200)
    assert 0 < few.split_len < 65536
    programs = 16 * few.h.tiles * -(-65536 // few.split_len)
    assert programs >= 0.9 * H200.multiprocessors


def test_short_packed_documents_get_short_chunks() -> None:
    packed = dataclasses.replace(PAPER, B=1, T=65536, N=4096, packed=True)
    assert plan(packed, H200).L == 16
    assert plan(dataclasses.replace(packed, N=2), H200).L == plan(PAPER, H200).L


def test_descriptors_need_their_unit_and_rows_of_16_bytes() -> None:
    assert plan(PAPER, H200).h.descriptor and not plan(PAPER, A100).h.descriptor
    assert not plan(dataclasses.replace(PAPER, K=92), H200).h.descriptor


def test_fp32_is_multiplied_in_parts_wherever_a_kernel_by_hand_can() -> None:
    """Three bf16 parts are 24 bits, two are what TF32 allows; the rest runs on the plain units."""
    exact = dataclasses.replace(PAPER, bytes=4)
    fast = dataclasses.replace(exact, precision="tf32")
    for device in (H200, A100, CONSUMER):
        for problem, parts in ((exact, 3), (fast, 2), (PAPER, 1)):
            p = plan(problem, device)
            assert p.h.parts == p.dq.parts == parts
            assert p.h.hopper == p.dq.hopper == (device is H200)
            assert p.h.mma == p.dq.mma == (device is not H200)
    for problem in (dataclasses.replace(exact, T=32), dataclasses.replace(exact, K=90)):
        p = plan(problem, H200)
        assert p.h.parts == 1 and not p.h.hopper


def test_tiles_of_all_stages_and_parts_fit_into_shared_memory() -> None:
    """What a program holds at least: fp32 tiles, whose first two parts lie in their place, a third
    for the chunk that is worked on, and the scores in parts."""
    exact = dataclasses.replace(PAPER, bytes=4)
    for problem in (exact, dataclasses.replace(exact, precision="tf32")):
        for device in (H200, A100, CONSUMER):
            p = plan(problem, device)
            for tile in (p.h, p.dq):
                numbers = p.L * (2 * tile.block_a + tile.block_x)
                third = 2 * numbers * (tile.parts == 3)
                scores = 2 * p.L**2 * tile.parts
                assert tile.stages * 4 * numbers + third + scores <= device.shared_memory


def test_the_denominator_of_fp32_is_summed_in_fp64_where_that_is_fast() -> None:
    exact = dataclasses.replace(PAPER, bytes=4)
    found = {device: plan(exact, device).denominator for device in DEVICES}
    assert found == {H200: "fp64", A100: "fp64", MI300X: "ieee", CONSUMER: "ieee"}
    assert not plan(exact, H200).fuse_denominator
    assert plan(dataclasses.replace(exact, precision="tf32"), H200).denominator == "tf32x3"
    assert plan(PAPER, A100).denominator == "ieee"


def test_a_plan_prints_and_is_cached() -> None:
    p = plan(PAPER, H200)
    assert isinstance(p, Plan) and plan(PAPER, H200) is p
    text = str(p)
    assert "chunk 64" in text and "h, dv" in text and "dq, dk" in text


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    from tfla.cli import run_command

    assert run_command(["plan", "4", "16384", "16", "128", "256", "--device", "h200"]) == 0
    first, forward, backward = capsys.readouterr().out.strip().split("\n\n")
    assert first == str(plan(PAPER, H200))
    labels = [[line.split(":")[0] for line in x.splitlines()] for x in (forward, backward)]
    assert labels[0] == ["forward", "sums", "gauge", "h"]
    assert labels[1][:4] == ["backward", "dv", "column", "dq"] and len(labels[1]) == 7
    assert run_command(["plan", "4", "16384", "16", "128", "256", "--device", "abacus"]) == 2
    assert "one of this, a100" in capsys.readouterr().err
