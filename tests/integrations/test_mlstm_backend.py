"""``tfla.integrations.mlstm_backend`` as TiRex-2 and Bolmo call a backend; needs no other package.

Where mlstm_kernels is installed its own backend is the judge.
"""

import dataclasses
import itertools
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import tfla
from tfla import api
from tfla.integrations.mlstm_backend import mLSTMBackend, mLSTMBackendConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others warn about when they are imported is their affair
    try:
        from mlstm_kernels.torch import backend_module as theirs
    except ImportError:
        theirs = None

B, H, T, K, V = 3, 2, 37, 8, 12
RESET = -100_000.0


def draw(*, T: int = T, dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    """q, k, v, i, f."""
    shapes = [(T, K), (T, K), (T, V), (T,), (T,)]
    x = [torch.randn(B, H, *shape, dtype=torch.float64) for shape in shapes]
    x[4] += 2
    return [y.to(dtype).requires_grad_(grad) for y in x]


def backend(**fields: Any) -> mLSTMBackend:
    return mLSTMBackend(mLSTMBackendConfig(**fields))


def cut(x: list[Tensor], start: int, stop: int) -> list[Tensor]:
    return [y[:, :, start:stop] for y in x]


def reset_at(x: list[Tensor], row: int, t: int) -> list[Tensor]:
    """A new document begins at token t of a row."""
    f = x[4].clone()
    f[row, :, t] = RESET
    return [*x[:4], f]


def same(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    for x, y in zip(a, b, strict=True):
        assert ((x - y).abs().max() / y.abs().max()).item() < tolerance


# ------------------------------------------------------------------------------- what it computes


def test_it_is_tfla_with_heads_first() -> None:
    x = draw()
    h, (c, n, m) = backend()(*x)
    want, state = tfla.mlstm(*(y.transpose(1, 2) for y in x), output_final_state=True)
    assert state is not None and state.n is not None and state.m is not None
    same([h, c, n, m], [want.transpose(1, 2), state.C, state.n, state.m[..., None]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_states_are_fp32_in_any_model(dtype: torch.dtype, mode: str) -> None:
    h, states = backend(mode=mode)(*draw(dtype=dtype))
    assert h.dtype == dtype
    assert {s.dtype for s in states} == {torch.float32}


def test_inference_gives_c_and_n_in_the_dtype_asked_for() -> None:
    make = backend(mode="inference", inference_state_dtype="bfloat16")
    x = draw(dtype=torch.float32)
    _, states = make(*x)
    assert [s.dtype for s in states] == [torch.bfloat16, torch.bfloat16, torch.float32]
    h, _ = make(*cut(x, 0, 1), *states)  # and reads them
    assert h.isfinite().all()


def test_autocast_computes_in_the_dtype_of_the_configuration() -> None:
    make = backend(return_last_states=False)
    x = draw(dtype=torch.float32)
    assert make(*x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert make(*x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kernel", "precision"),
    [
        ("chunkwise--triton_limit_chunk", "tf32"),
        ("chunkwise--triton_xl_chunk", "tf32"),
        ("chunkwise--triton_xl_chunk_siging", "tf32"),
        ("parallel--triton_limit_headdim", "tf32"),
        ("chunkwise--native_autograd", "ieee"),
        ("parallel--native_siging_autograd", "ieee"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_products_of_fp32_are_of_the_class_of_their_kernels(
    kernel: str, precision: str, mode: str, autocast: bool
) -> None:
    """Their Triton kernels take TF32 whatever torch is set to; native ones follow torch. No setting
    of torch's changes, and ``tfla.mlstm`` on the same tensors still follows torch."""
    x = draw(dtype=torch.float32)
    module = backend(chunkwise_kernel=kernel, autocast_kernel_dtype="float32", mode=mode)
    seen = []
    real = api.ops.run
    before = torch.get_float32_matmul_precision()
    with mock.patch.object(api.ops, "run", lambda x, spec: (seen.append(spec), real(x, spec))[1]):
        with torch.autocast("cpu", enabled=autocast):
            module(*x)
        tfla.mlstm(*(t.transpose(1, 2) for t in x), input_gate="exp")
    assert [spec.precision for spec in seen] == [precision, "ieee"]
    assert {spec.dtype for spec in seen} == {torch.float32}
    assert torch.get_float32_matmul_precision() == before


def test_the_mode_and_the_states_are_the_calls() -> None:
    """Neither stays on the module."""
    make = backend(mode="train", return_last_states=False)
    x = draw()
    assert isinstance(make(*x), Tensor)
    assert len(make(*x, return_last_states=True)) == 2
    assert len(make(*x, mode="inference", return_last_states=False)) == 2  # always
    assert isinstance(make(*x), Tensor)


# ------------------------------------------------------------------------------- TiRex-2's calls

PLAIN = {"sequence_kernel": "native_sequence__native", "step_kernel": "native"}
TRITON = {
    "chunkwise_kernel": "chunkwise--triton_limit_chunk",
    "sequence_kernel": "native_sequence__triton",
    "step_kernel": "triton",
    "autocast_kernel_dtype": "bfloat16",
}


@pytest.mark.parametrize("names", [PLAIN, TRITON])
def test_both_directions_with_shared_weights(names: dict[str, str]) -> None:
    """One backend, its input mirrored by torch.flip(...).contiguous(), its output mirrored back:
    the token at t then sees t and what follows, and gradients of both directions add up."""
    make = backend(**names)
    x = draw(grad=True)
    back = [torch.flip(y, [2]).contiguous() for y in x]
    h = make(*x, return_last_states=False)
    g = torch.flip(make(*back, return_last_states=False), [2])
    for t in (0, 5, T - 1):
        alone, _ = make(*(torch.flip(y[:, :, t:], [2]) for y in x), mode="inference")
        same([g[:, :, t]], [alone[:, :, -1]])
    both = torch.autograd.grad((h * g).sum(), x, retain_graph=True)
    ahead = torch.autograd.grad((h * g.detach()).sum(), x, retain_graph=True)
    behind = torch.autograd.grad((h.detach() * g).sum(), x)
    same(both, [a + b for a, b in zip(ahead, behind, strict=True)])


def test_a_reset_by_the_forget_gate_is_a_new_sequence() -> None:
    """Exactly: nothing before it reaches it, however large, in values and in gradients."""
    x = reset_at(draw(), 1, 20)
    x[2][1, :, :20] *= 1e6
    x = [y.detach().requires_grad_() for y in x]
    h, states = backend()(*x)
    rest, after = backend()(*cut(x, 20, T))
    same([h[1, :, 20:], *(s[1] for s in states[:2])], [rest[1], *(s[1] for s in after[:2])])
    (dv,) = torch.autograd.grad(h[1, :, 20:].sum(), x[2])
    assert not dv[1, :, :20].any()


# ------------------------------------------------------------------------------- Bolmo's calls


@pytest.mark.parametrize("inference", [False, True])
def test_rows_of_states_are_selected_and_put_by_a_mask(inference: bool) -> None:
    """Only some rows go on; their states are taken out of the table and put back into it."""
    make = backend(
        chunkwise_kernel="chunkwise--triton_limit_chunk", autocast_kernel_dtype="float32"
    )
    mode = "inference" if inference else "train"
    x = reset_at(draw(dtype=torch.float32), 2, 4)
    rows = torch.tensor([True, False, True])
    with torch.inference_mode(inference):
        _, table = make(*cut(x, 0, 10), mode=mode)
        kept = [s[1].clone() for s in table]
        some = [s[rows] for s in table]
        h, new = make(*(y[rows] for y in cut(x, 10, T)), *some, mode=mode)
        for s, now in zip(table, new, strict=True):
            s[rows] = now
        whole, states = make(*x, mode=mode)
    same([h], [whole[rows, :, 10:]], 1e-4)
    assert all(torch.equal(s[1], k) for s, k in zip(table, kept, strict=True))
    for s, want in zip(table, states, strict=True):
        torch.testing.assert_close(s[rows], want[rows], rtol=1e-4, atol=1e-5)


def test_a_prompt_and_then_tokens_one_by_one_are_the_whole() -> None:
    """The mode is switched by the call: a prompt of any length in training mode, then steps."""
    make = backend(**TRITON)
    x = draw()
    whole = make(*x, return_last_states=False)
    with torch.no_grad():
        h, states = make(*cut(x, 0, 30), mode="train", return_last_states=True)
        out = [h]
        for t in range(30, T):
            before = [s.clone() for s in states]
            h, new = make(*cut(x, t, t + 1), *states, mode="inference")
            assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))
            out.append(h)
            states = new
    same([torch.cat(out, 2)], [whole])


def test_gradients_pass_from_segment_to_segment_through_the_states() -> None:
    make = backend()
    x = draw(grad=True)
    whole = torch.autograd.grad(make(*x)[0].pow(3).sum(), x)
    first, states = make(*cut(x, 0, 16))
    second, _ = make(*cut(x, 16, T), *states)
    same(torch.autograd.grad(first.pow(3).sum() + second.pow(3).sum(), x), whole, 1e-8)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_sigmoid_gate_infers_in_parts(normalize: bool) -> None:
    make = backend(
        chunkwise_kernel="chunkwise--triton_xl_chunk_siging",
        mode="inference",
        normalize_siging=normalize,
    )
    x = draw()
    with torch.no_grad():
        whole, _ = make(*x)
        h, states = make(*cut(x, 0, T - 1))
        last, _ = make(*cut(x, T - 1, T), *states)
    same([h, last], [whole[:, :, :-1], whole[:, :, -1:]])


def test_it_compiles_as_one_graph() -> None:
    make = backend(mode="train", return_last_states=False)
    x = draw(dtype=torch.float32)
    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")
    same([compiled(*x)], [make(*x)], 1e-5)


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(mLSTMBackendConfig)])
def test_a_field_that_names_nothing_is_named(field: str) -> None:
    if field in ("chunk_size", "eps", "return_last_states", "normalize_siging"):
        return  # no names
    with pytest.raises(ValueError, match=f"{field} must be one of .*'chunk'"):
        backend(**{field: "chunk"})


def test_a_mode_that_is_none_and_states_that_come_alone_are_named() -> None:
    x = draw()
    with pytest.raises(ValueError, match="mode must be one of 'train'"):
        backend()(*x, mode="eval")
    with pytest.raises(ValueError, match="c_initial, n_initial and m_initial"):
        backend()(*x, c_initial=torch.zeros(B, H, K, V))


def test_it_prints_its_configuration_and_has_no_weights() -> None:
    make = backend(chunk_size=32)
    assert "chunk_size=32" in repr(make)
    assert not list(make.state_dict())


# ------------------------------------------------------------------------------- beside theirs


installed = pytest.mark.skipif(theirs is None, reason="needs mlstm_kernels, of the extra peers")


@pytest.mark.peers
@installed
def test_the_configuration_has_their_fields_names_and_defaults() -> None:
    def described(config: Any) -> list[tuple[str, Any]]:
        return [(f.name, f.default) for f in dataclasses.fields(config)]

    assert described(mLSTMBackendConfig) == described(theirs.mLSTMBackendConfig)


@pytest.mark.peers
@installed
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of torch's compiler, which they load
@pytest.mark.parametrize("mode", ["train", "train_with_padding", "inference"])
def test_it_is_their_backend_on_plain_functions(mode: str) -> None:
    x = draw(T=32)
    state = (torch.randn(B, H, K, V), torch.randn(B, H, K), torch.randn(B, H, 1))
    state = tuple(s.double() for s in state)
    fields = {"mode": mode, "eps": 0.0, "chunk_size": 16}
    fields["return_last_states"] = mode != "train_with_padding"
    plain = theirs.mLSTMBackend(theirs.mLSTMBackendConfig(**fields))
    # Theirs passes states of inference through fp32, and pads with an eps of its own, 1e-6.
    tolerance = {"train": 1e-8, "inference": 1e-6, "train_with_padding": 1e-4}[mode]
    for start, T in itertools.product(((), state), (32, 1) if mode == "inference" else (32,)):
        out = [make(*cut(x, 0, T), *start) for make in (backend(**fields), plain)]
        if mode == "train_with_padding":
            same(*([h] for h in out), tolerance=tolerance)
            continue
        # C and n may be divided by another exp(m); what they stand for is the same.
        out = [[h, c * m[..., None].exp(), n * m.exp()] for h, (c, n, m) in out]
        same(*out, tolerance=tolerance)
