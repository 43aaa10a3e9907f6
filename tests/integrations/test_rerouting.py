"""``tfla.integrations.rerouting``: a function's calls go elsewhere under all its names."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tfla.integrations.rerouting import Rerouted


def plain(a: int, b: int = 2, *, c: int = 3) -> tuple[str, int, int, int]:
    return "plain", a, b, c


def make_closure(x: int, y: int) -> Any:
    def closure(a: int) -> tuple[str, int]:
        return "closure", a + x * y

    return closure


def elsewhere(original: Any) -> Any:
    return lambda args, kwargs: ("elsewhere", args, kwargs, original(*args, **kwargs))


def test_every_name_of_it_is_rerouted_and_restored() -> None:
    imported, bound = plain, functools.partial(plain, b=5)

    def by_default(f: Any = plain) -> Any:
        return f(1)

    held = Rerouted(plain, elsewhere)
    try:
        assert imported(1, c=4) == ("elsewhere", (1,), {"c": 4}, ("plain", 1, 2, 4))
        assert bound(1)[0] == by_default()[0] == "elsewhere"
    finally:
        held.restore()
    assert imported(1) == ("plain", 1, 2, 3)
    assert plain.__kwdefaults__ == {"c": 3}


def test_a_function_with_cells_keeps_them() -> None:
    closure, other = make_closure(3, 4), make_closure(5, 6)
    held = Rerouted(closure, elsewhere)
    assert closure(1)[3] == ("closure", 13)
    assert other(1) == ("closure", 31)  # shares its code, not its fate
    held.restore()
    assert closure(1) == ("closure", 13)


def test_what_another_has_made_of_it_since_stays() -> None:
    closure = make_closure(3, 4)
    first = Rerouted(closure, elsewhere)
    second = Rerouted(closure, elsewhere)
    assert closure(1)[3][3] == ("closure", 13)
    first.restore()
    assert closure(1)[3][3] == ("closure", 13)
    second.restore()
    first.restore()
    assert closure(1) == ("closure", 13)


def test_torch_compile_looks_into_the_handler_and_not_into_the_restored_function() -> None:
    @torch.compiler.disable
    def disabled(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def call(x: torch.Tensor) -> torch.Tensor:
        return disabled(x) * 2

    held = Rerouted(disabled, lambda original: lambda args, kwargs: args[0] + 10)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [20, 20]
    held.restore()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(2))
    assert call(torch.zeros(2)).tolist() == [2, 2]


def test_threads_meet_either_the_old_or_the_new() -> None:
    closure = make_closure(3, 4)
    results: set[str] = set()

    def call(_: int) -> None:
        for _ in range(3000):
            results.add(closure(1)[0])

    def exchange(_: int) -> None:
        for _ in range(1000):
            Rerouted(closure, elsewhere).restore()

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(call, 0), pool.submit(call, 1), pool.submit(exchange, 2)]
        for job in jobs:
            job.result()
    assert "closure" in results <= {"closure", "elsewhere"}


@pytest.mark.parametrize("value", [len, functools.partial(plain), None])
def test_what_has_no_python_code_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="function must be a Python function; got"):
        Rerouted(value, elsewhere)
