"""The plan is a value: integers in, the shape of every kernel out."""

import dataclasses

import pytest

from tfla.plan import Device, Plan, Problem, plan

H200 = Device((9, 0), 132, 232448)
A100 = Device((8, 0), 108, 166912)
MI300X = Device((0, 0), 304, 65536)
DEVICES = [H200, A100, MI300X, Device((12, 0), 170, 101376)]
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


def test_precision_is_part_of_the_plan() -> None:
    exact = dataclasses.replace(PAPER, bytes=4)
    fast = dataclasses.replace(exact, precision="tf32")
    assert plan(exact, H200).h.block_x < plan(fast, H200).h.block_x
    assert plan(fast, H200).h.hopper and not plan(exact, H200).h.hopper
    assert not plan(dataclasses.replace(fast, T=32), H200).h.hopper
    for device in (H200, A100):  # what a program holds of shared memory at least: its stages
        p = plan(fast, device)
        for tile in (p.h, p.dq):
            stage = 4 * p.L * (2 * tile.block_a + tile.block_x)
            assert tile.stages * stage <= device.shared_memory


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
