"""Below fp64: at most twice as far from the truth as the recurrence in the same dtype."""

import dataclasses

import pytest
import recurrence as oracle
import torch
from checks import (
    assert_close,
    check_against_recurrence,
    failures,
    run_recurrence,
    run_tfla,
    sixteen_bits,
)
from problems import EXTREME, RESETS, Case, make_inputs, normalized, variants

import tfla

MANY = 24  # sequences, where errors are compared: the ratio of two errors needs many samples


@pytest.mark.parametrize(("input_gate", "normalize"), [("exp", None), ("sigmoid", None)])
def test_over_a_thousand_tokens_nothing_drifts(input_gate: str, normalize: bool | None) -> None:
    """One truth, two dtypes: the same fp32 numbers given as fp64 and as fp32."""
    case = Case(
        T=1100, B=MANY, K=5, V=4, dtype=torch.float32, input_gate=input_gate, normalize=normalize
    )
    low = make_inputs(case)
    truth, c = run_recurrence(case, low, torch.float64)
    plain, _ = run_recurrence(case, low, torch.float32, c)
    broken = failures(
        run_tfla(case, low, c), truth, plain, case, low, torch.finfo(torch.float32).eps
    )
    assert not broken, broken
    high = low.to(torch.float64)
    exact = dataclasses.replace(case, dtype=torch.float64)
    broken = failures(
        run_tfla(exact, high, c), truth, None, exact, high, torch.finfo(torch.float64).eps
    )
    assert not broken, broken


@normalized
@pytest.mark.parametrize("gates", [*EXTREME, *RESETS, "initial", "ordinary"])
def test_fp32_is_as_exact_as_the_recurrence_in_fp32(
    gates: str, input_gate: str, normalize: bool | None
) -> None:
    check_against_recurrence(
        Case(
            T=100,
            B=MANY,
            gates=gates,
            dtype=torch.float32,
            input_gate=input_gate,
            normalize=normalize,
        )
    )


@pytest.mark.parametrize("gates", [*EXTREME[:6], *RESETS, "initial", "ordinary"])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_fp32_without_normaliser(input_gate: str, gates: str) -> None:
    check_against_recurrence(
        Case(
            T=100, B=MANY, gates=gates, dtype=torch.float32, input_gate=input_gate, normalize=False
        )
    )


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_recurrence(
    dtype: torch.dtype, input_gate: str, normalize: bool | None
) -> None:
    check_against_recurrence(
        Case(T=100, B=MANY, dtype=dtype, input_gate=input_gate, normalize=normalize)
    )


@normalized
@pytest.mark.parametrize(
    "gates", ["initial", "f=-1e5", "f=+30", "i=+30", "i=-30", "resets 50%", "swings"]
)
def test_bf16_with_extreme_gates(gates: str, input_gate: str, normalize: bool | None) -> None:
    check_against_recurrence(
        Case(
            T=100,
            B=MANY,
            dtype=torch.bfloat16,
            gates=gates,
            input_gate=input_gate,
            normalize=normalize,
        )
    )


@variants
def test_bf16_results_lose_only_what_rounding_them_loses(
    input_gate: str, normalize: bool | None
) -> None:
    """A harder yardstick: the recurrence in fp32 on bf16 inputs, its results rounded to bf16."""
    case = Case(
        T=100,
        B=MANY,
        dtype=torch.bfloat16,
        gate_dtype=torch.float32,
        input_gate=input_gate,
        normalize=normalize,
    )
    inputs = make_inputs(case)
    truth, c = run_recurrence(case, inputs, torch.float64)
    plain, _ = run_recurrence(case, inputs, torch.float32, c)
    ours = run_tfla(case, inputs, c)
    rounded = {name: truth[name] for name in ("h", "dq", "dk", "dv")}
    broken = failures(ours, rounded, plain, case, inputs, 0.0)
    assert not broken, broken


@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_gates_may_have_another_dtype(dtype: torch.dtype, gate_dtype: torch.dtype) -> None:
    if (
        dtype == torch.float64
    ):  # the gradients are rounded to the gates' dtype: hold them against that
        case = Case(T=70, dtype=dtype, gate_dtype=gate_dtype)
        inputs = make_inputs(case)
        truth, c = run_recurrence(case, inputs, torch.float64)
        ours = run_tfla(case, inputs, c)
        for name, t in truth.items():
            rounded = gate_dtype if name in ("di", "df") else torch.float64
            if name != "m":
                assert_close(ours[name], t, max(1e-9, torch.finfo(rounded).eps), name)
    else:
        check_against_recurrence(Case(T=70, B=MANY, dtype=dtype, gate_dtype=gate_dtype))


@pytest.mark.parametrize("gates", ["ordinary", "f=-12", "i=+95"])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_sixteen_bits_are_told_from_fourteen(input_gate: str, gates: str) -> None:
    """What holds fp32 products of 16 bits on a GPU: the truth of inputs of 16 bits passes, that of
    14 does not, nor does, where nothing cancels, a gradient of f that is off by 0.3%."""
    case = Case(T=150, K=32, V=16, input_gate=input_gate, gates=gates, dtype=torch.float32)
    inputs = make_inputs(case)
    truth, c = run_recurrence(case, inputs, torch.float64)

    def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    def broken(bits: int) -> set[str]:
        tokens = {name: rounded(getattr(inputs, name), bits) for name in ("q", "k", "v", "dh")}
        near = dataclasses.replace(inputs.to(torch.float64), **tokens)
        found = run_recurrence(case, near, torch.float64, c)[0]
        return {line.split(":")[0] for line in sixteen_bits(found, truth, case, inputs, c)}

    assert not broken(16)
    assert broken(14) >= ({"C", "n"} if input_gate == "exp" else {"h", "C", "dv"})
    if gates == "ordinary":
        lines = sixteen_bits(truth | {"df": 1.003 * truth["df"]}, truth, case, inputs, c)
        assert [line.split(":")[0] for line in lines] == ["df"]


@pytest.mark.parametrize("seed", range(4))
def test_log_gates_of_many_magnitudes(seed: int) -> None:
    """Whether a token or the state before it decides a gauge is told by a comparison of numbers of
    1e-18 to 10: rounding any of them on the way would take away a whole decay."""
    g = torch.Generator().manual_seed(seed)

    def magnitudes() -> torch.Tensor:
        size = torch.rand(8, 70, 3, generator=g, dtype=torch.float64) * 19 - 18
        return -(10**size) * torch.randint(0, 2, size.shape, generator=g)

    q, k, v = torch.randn(3, 8, 70, 3, 6, generator=g, dtype=torch.float64).unbind(0)
    tokens = [x.float() for x in (q, k, v, magnitudes(), magnitudes())]
    truth, memory = oracle.linear_attention(*(x.double() for x in tokens), normalize=True)
    h, state = tfla.linear_attention(*tokens, normalize=True, output_final_state=True)
    assert state is not None and state.m is not None and memory.m is not None
    C = state.C.double() * (state.m.double() - memory.m).exp()[..., None, None]
    assert_close(h.double(), truth, 2e-5)
    assert_close(C, memory.C, 2e-6)
