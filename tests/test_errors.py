"""Bad input: a TypeError or ValueError that names the argument, what came and what is wanted."""

from collections.abc import Callable

import pytest
import torch
from refusals import B, H, K, T, V, good, good_state, refuses
from torch import Tensor

import tfla
from tfla import checks


def test_the_input_that_the_others_spoil_is_good() -> None:
    tfla.mlstm(**good(), initial_state=good_state())
    tfla.linear_attention(*list(good().values())[:3])
    tfla.mlstm_step(**{n: t[:, 0] for n, t in good().items()}, state=good_state())


FIELDS = ["q", "k", "v", "i", "f"]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    ("value", "came"),
    [([1.0, 2.0], "list"), ("text", "str"), (None, "None"), (3, "int")],
)
def test_what_is_no_tensor(name: str, value: object, came: str) -> None:
    for call in (
        lambda: tfla.mlstm(**{**good(), name: value}),
        lambda: tfla.mlstm_step(
            **{**{n: t[:, 0] for n, t in good().items()}, name: value}, state=good_state()
        ),
    ):
        refuses(TypeError, call, names=name, came=came, wanted="Tensor")


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_floating_point(name: str, dtype: torch.dtype) -> None:
    given = good()
    refuses(
        TypeError,
        lambda: tfla.mlstm(**{**given, name: torch.ones(given[name].shape, dtype=dtype)}),
        names=name,
        came=str(dtype).removeprefix("torch."),
        wanted="floating" if name in "if" else "fp32",
    )


def test_an_fp8_query_is_refused() -> None:
    given = {n: t.to(torch.float8_e4m3fn) if n in "qkv" else t for n, t in good().items()}
    refuses(TypeError, lambda: tfla.mlstm(**given), names="q", came="float8_e4m3fn", wanted="bf16")


@pytest.mark.parametrize("name", ["k", "v"])
def test_q_k_and_v_of_two_dtypes(name: str) -> None:
    given = good()
    for dtype in (torch.bfloat16, torch.float64):
        refuses(
            TypeError,
            lambda dtype=dtype: tfla.mlstm(**{**given, name: given[name].to(dtype)}),
            names=name,
            came=str(dtype).removeprefix("torch."),
            wanted="float32",
        )


WRONG_SHAPES = {
    "q": [(B, T, H), (B, T, H, K, 1)],
    "k": [(B, T, H), (B, T, H, K + 1), (B, T + 1, H, K), (B, T, 1, K), (1, T, H, K)],
    "v": [(B, T, H), (B, T + 1, H, V), (B, T, H + 1, V), (B + 1, T, H, V)],
    "i": [(B, T), (B, H, T), (B, T, H, 1), (H,), (B, T, 1), ()],
    "f": [(B, T), (B, H, T), (B, T, H, 1), (H,), (B, T, 1), ()],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n, shapes in WRONG_SHAPES.items() for s in shapes]
)
def test_wrong_shapes(name: str, shape: tuple[int, ...]) -> None:
    refuses(
        ValueError,
        lambda: tfla.mlstm(**{**good(), name: torch.zeros(shape)}),
        names=name,
        came=str(shape),
        wanted="(B, T, H" if name in "qif" or len(shape) != 4 else str((B, T, H))[:-1],
    )


@pytest.mark.parametrize("name", FIELDS)
def test_a_step_with_a_time_axis(name: str) -> None:
    given = {n: t[:, 0] for n, t in good().items()}
    given[name] = good()[name]
    refuses(
        ValueError,
        lambda: tfla.mlstm_step(**given, state=good_state()),
        names=name,
        came=str(tuple(given[name].shape)),
        wanted="(B, H",
    )


@pytest.mark.parametrize("name", ["log_f", "log_i"])
@pytest.mark.parametrize("shape", [(T,), (B, H), (T, H), (B, T), (1, H), (H, 1), (B, T, H, 1)])
def test_log_gates_of_a_wrong_shape(name: str, shape: tuple[int, ...]) -> None:
    q, k, v = list(good().values())[:3]
    refuses(
        ValueError,
        lambda: tfla.linear_attention(q, k, v, **{name: torch.zeros(shape)}),
        names=name,
        came=str(shape),
        wanted="(H,)",
    )


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x[..., :1, :].expand(*x.shape[:-2], heads, x.shape[-1])


def three_functions(q: Tensor, k: Tensor, v: Tensor) -> list[Callable[[], object]]:
    """mlstm, linear_attention and mlstm_step of these operands."""
    i, f = (torch.zeros(v.shape[:-1]) for _ in "if")
    heads = v.shape[-2]
    state = tfla.State(torch.zeros(B, heads, K, V), torch.zeros(B, heads, K), torch.zeros(B, heads))
    first = [x[:, 0] for x in (q, k, v, i, f)]
    return [
        lambda: tfla.mlstm(q, k, v, i, f),
        lambda: tfla.linear_attention(q, k, v),
        lambda: tfla.mlstm_step(*first, state),
    ]


@pytest.mark.parametrize(("groups", "heads"), [(2, 3), (3, 2), (4, 6), (3, 1)])
def test_heads_of_v_that_are_no_multiple(groups: int, heads: int) -> None:
    x = good()
    q, k, v = heads_of(x["q"], groups), heads_of(x["k"], groups), heads_of(x["v"], heads)
    for call in three_functions(q, k, v):
        refuses(ValueError, call, names="v", came=f"H = {heads} ", wanted=f"G = {groups} ")


def test_a_reverse_that_is_no_flag() -> None:
    for call in (
        lambda: tfla.mlstm(**good(), reverse="yes"),  # type: ignore[arg-type]
        lambda: tfla.linear_attention(*list(good().values())[:3], reverse="yes"),  # type: ignore[arg-type]
    ):
        refuses(TypeError, call, names="reverse", came="'yes'", wanted="True or False")


def test_head_dims_and_heads_of_zero() -> None:
    for name, empty in (("q", (B, T, H, 0)), ("v", (B, T, H, 0))):
        given = {**good(), name: torch.zeros(empty)}
        if name == "q":
            given["k"] = torch.zeros(empty)
        with pytest.raises(ValueError, match="at least 1"):
            tfla.mlstm(**given)


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "q"])
def test_tensors_on_two_devices(name: str) -> None:
    given = good()
    refuses(
        ValueError,
        lambda: tfla.mlstm(**{**given, name: given[name].to("meta")}),
        names=name,
        came="meta",
        wanted="cpu",
    )


@pytest.mark.parametrize("value", ["tanh", "", "Exp", None, 1])
def test_an_unknown_input_gate(value: object) -> None:
    for call in (
        lambda: tfla.mlstm(**good(), input_gate=value),
        lambda: tfla.mlstm_step(
            **{n: t[:, 0] for n, t in good().items()}, state=good_state(), input_gate=value
        ),
    ):
        refuses(ValueError, call, names="input_gate", came=repr(value), wanted="'exp' or 'sigmoid'")


def test_an_input_gate_that_cannot_be_looked_up() -> None:
    with pytest.raises((TypeError, ValueError), match="input_gate"):
        tfla.mlstm(**good(), input_gate=["exp"])


@pytest.mark.parametrize("value", ["cuda", "", "Triton", "torch", ["triton"], 1])
def test_an_unknown_backend(value: object) -> None:
    refuses(
        ValueError,
        lambda: tfla.mlstm(**good(), backend=value),
        names="backend",
        came=repr(value),
        wanted="'reference', 'triton'",
    )


def test_a_named_backend_raises_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (
        lambda: tfla.mlstm(**good(), backend="triton"),
        lambda: tfla.linear_attention(*list(good().values())[:3], backend="triton"),
        lambda: tfla.mlstm_step(
            **{n: t[:, 0] for n, t in good().items()}, state=good_state(), backend="triton"
        ),
    ):
        with pytest.raises(RuntimeError, match="triton.*CPU.*TRITON_INTERPRET"):
            call()
    wide = {n: t.double() for n, t in good().items()}
    with pytest.raises(RuntimeError, match='triton.*fp64.*"reference"'):
        tfla.mlstm(**wide, backend="triton")


@pytest.mark.parametrize(
    ("value", "came"), [("0.1", "str"), (torch.tensor(0.1), "()"), ([1], "list")]
)
def test_a_scale_that_is_no_number(value: object, came: str) -> None:
    refuses(
        TypeError,
        lambda: tfla.mlstm(**good(), scale=value),
        names="scale",
        came=came,
        wanted="number",
    )


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_scale_that_is_not_finite(value: float) -> None:
    refuses(
        ValueError,
        lambda: tfla.mlstm(**good(), scale=value),
        names="scale",
        came=str(value),
        wanted="finite",
    )


@pytest.mark.parametrize("value", ["no", 1, torch.tensor(True)])
def test_a_flag_that_is_not_true_or_false(value: object) -> None:
    step = {n: t[:, 0] for n, t in good().items()} | {"state": good_state()}
    for call, name in (
        (lambda: tfla.mlstm(**good(), normalize=value), "normalize"),
        (lambda: tfla.linear_attention(*list(good().values())[:3], normalize=value), "normalize"),
        (lambda: tfla.mlstm(**good(), output_final_state=value), "output_final_state"),
        (lambda: tfla.mlstm_step(**step, normalize=value), "normalize"),
        (lambda: tfla.mlstm_step(**step, inplace=value), "inplace"),
    ):
        refuses(TypeError, call, names=name, came=checks.what(value), wanted="True or False")


class TestPacking:
    def call(self, cu_seqlens: object, batch: int = 1) -> Callable[[], object]:
        given = {n: t[:batch] for n, t in good().items()}
        return lambda: tfla.mlstm(**given, cu_seqlens=cu_seqlens)

    def test_what_is_no_tensor(self) -> None:
        refuses(TypeError, self.call([0, 5]), names="cu_seqlens", came="list", wanted="Tensor")

    @pytest.mark.parametrize(
        "value",
        [
            torch.tensor([0.0, 5.0]),
            torch.tensor([0, 5], dtype=torch.int16),
            torch.tensor([False, True]),
        ],
    )
    def test_a_wrong_dtype(self, value: Tensor) -> None:
        with pytest.raises((TypeError, ValueError), match="cu_seqlens must be .*int32 or int64"):
            self.call(value)()

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 2)])
    def test_a_wrong_shape(self, shape: tuple[int, ...]) -> None:
        refuses(
            ValueError,
            self.call(torch.zeros(shape, dtype=torch.int64)),
            names="cu_seqlens",
            came=str(shape),
            wanted="(N + 1,)",
        )

    def test_a_batch_of_two(self) -> None:
        refuses(
            ValueError,
            self.call(torch.tensor([0, 5]), batch=2),
            names="cu_seqlens",
            came=str((2, T, H, K)),
            wanted="B must be 1",
        )

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize(
        "values", [[1, 5], [0, 4], [0, 6], [0, 3, 2, 5], [0, -1, 5], [0, 9, 5], [5, 0], [0, 0]]
    )
    def test_offsets_that_do_not_ascend_from_0_to_T(
        self, values: list[int], dtype: torch.dtype
    ) -> None:
        cu = torch.tensor(values, dtype=dtype)
        refuses(
            ValueError,
            self.call(cu),
            names="cu_seqlens",
            came=str(values),
            wanted="from 0 to T = 5",
        )

    def test_bad_offsets_are_seen_inside_of_compiled_code(self) -> None:
        given = {n: t[:1] for n, t in good().items()}
        torch._dynamo.reset()
        fn = torch.compile(
            lambda cu: tfla.mlstm(**given, cu_seqlens=cu)[0], fullgraph=True, backend="aot_eager"
        )
        fn(torch.tensor([0, 2, 5]))
        with pytest.raises(ValueError, match="cu_seqlens"):
            fn(torch.tensor([0, 7, 5]))

    def test_another_device(self) -> None:
        cu = torch.zeros(2, dtype=torch.int64, device="meta")
        refuses(ValueError, self.call(cu), names="cu_seqlens", came="meta", wanted="cpu")


def test_errors_leave_no_trace_in_the_warnings_of_a_good_call(
    recwarn: pytest.WarningsRecorder,
) -> None:
    tfla.mlstm(**good())
    assert not recwarn.list


@pytest.mark.parametrize("first", ["q k v", "i f", "i", "q k", "v", "q k v, grouped"])
def test_heads_that_come_first_are_recognised(first: str) -> None:
    """(B, H, T, D) beside (B, T, H): the error says how to make one of the other."""
    groups = 1 if "grouped" in first else 3
    shapes = {"q": (2, 50, groups, 8), "k": (2, 50, groups, 8), "v": (2, 50, 3, 4)}
    x = {
        name: torch.zeros(shape)
        for name, shape in {**shapes, "i": (2, 50, 3), "f": (2, 50, 3)}.items()
    }
    tfla.mlstm(**x)
    x |= {name: x[name].transpose(1, 2) for name in first.split(",")[0].split()}
    with pytest.raises(ValueError, match=r"heads first.*x\.transpose\(1, 2\)"):
        tfla.mlstm(**x)
