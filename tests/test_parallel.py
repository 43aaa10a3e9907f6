"""T split over ranks equals one process; the checks are in parallel_worker.py, which ranks run."""

import pytest
import ranks
from parallel_worker import TRITON, checks


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    outcome = ranks.run("parallel_worker", world)
    assert outcome.keys() == checks(world).keys()
    assert not ranks.failures(outcome)


def test_ranks_equal_one_process_in_triton() -> None:
    pytest.importorskip("triton")
    outcome = ranks.run("parallel_worker", 2, TRITON_INTERPRET="1")
    assert outcome.keys() == TRITON.keys()
    assert not ranks.failures(outcome)
