"""tfla.nn.MLSTM: the layer it says it is, for every way of giving it sequences."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import tfla
from tfla.nn import MLSTM, States

VARIANTS = [
    {},
    {"num_layers": 3, "dropout": 0.3},
    {"num_layers": 2, "bidirectional": True, "proj_size": 5},
    {"input_gate": "sigmoid", "qk_size": 4, "bias": False},
]
LENGTHS = [7, 1, 30, 12, 30]


def make(dtype: torch.dtype = torch.float64, **options: object) -> MLSTM:
    """In evaluation, with gates that vary from token to token; the initial ones hide mistakes."""
    layer = MLSTM(6, 16, **{"num_heads": 4, "batch_first": True, **options}).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "gates" in name or "norm" in name:
                parameter.normal_()
    return layer


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def same_state(a: States | Sequence[tfla.State], b: States | Sequence[tfla.State]) -> None:
    """Up to the gauge m, in which states may differ."""
    for x, y in zip(layers(a), layers(b), strict=True):
        assert (x.m is None) == (y.m is None)
        if x.m is None or y.m is None:
            close(x.C, y.C)
        else:
            close(x.C * x.m.exp()[..., None, None], y.C * y.m.exp()[..., None, None])
            close(x.n * x.m.exp()[..., None], y.n * y.m.exp()[..., None])


def layers(state: States | Sequence[tfla.State]) -> Sequence[tfla.State]:
    return state.layers if isinstance(state, States) else state


def row(state: States, n: int) -> States:
    rows = ([None if t is None else t[n : n + 1] for t in s] for s in state.layers)
    return States(tuple(tfla.State(*s) for s in rows))


# ------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_one_layer_is_its_equation(input_gate: str) -> None:
    """Written out head by head and token by token, without a gauge."""
    layer = make(input_gate=input_gate, proj_size=5, qk_size=8)
    x = draw(9)
    w = dict(layer.layers[0].named_parameters())
    q, k, v, o = (w["qkvo.weight"] @ x.T).T.add(w["qkvo.bias"]).split([8, 8, 16, 16], -1)
    gates = x @ w["gates.weight"].T + w["gates.bias"]
    heads = []
    for head in range(4):
        C, n, rows = torch.zeros(2, 4, dtype=x.dtype), torch.zeros(2, dtype=x.dtype), []
        for t in range(9):
            q_t, k_t = (y[t, 2 * head : 2 * head + 2] for y in (q, k))
            i, f = gates[t, head], torch.sigmoid(gates[t, 4 + head])
            i = i.exp() if input_gate == "exp" else torch.sigmoid(i)
            C = f * C + i * torch.outer(k_t, v[t, 4 * head : 4 * head + 4])
            n = f * n + i * k_t
            h = C.T @ q_t / 2**0.5
            if input_gate == "exp":
                h = h / max(abs(n @ q_t) / 2**0.5, 1)
            rows.append((h - h.mean()) / (h.var(correction=0) + 1e-6).sqrt())
        heads.append(torch.stack(rows))
    h = torch.cat(heads, -1) * w["norm_weight"] + w["norm_bias"]
    close(layer(x)[0], (torch.sigmoid(o) * h) @ w["proj.weight"].T)


@pytest.mark.parametrize("options", VARIANTS)
def test_tokens_one_by_one_are_the_sequence(options: dict[str, object]) -> None:
    if options.get("bidirectional"):
        options = {**options, "bidirectional": False}  # one needs the end to begin
    layer, x = make(**options), draw(3, 20)
    whole, end = layer(x)
    with torch.no_grad():
        y, state = layer(x[:, :6])
        out = [y]
        for t in range(6, 20):
            y, state = layer(x[:, t : t + 1], state)
            out.append(y)
    close(torch.cat(out, 1), whole)
    same_state(state, end)


def test_both_directions_are_two_layers_side_by_side() -> None:
    both, x = make(bidirectional=True), draw(3, 20)
    forward, backward = make(), make()
    forward.layers[0].load_state_dict(both.layers[0].state_dict())
    backward.layers[0].load_state_dict(both.layers[1].state_dict())
    there, back = forward(x), backward(x.flip(1))
    y, state = both(x)
    close(y, torch.cat([there[0], back[0].flip(1)], -1))
    same_state(state, (*there[1].layers, *back[1].layers))


def test_layers_read_one_another_with_dropout_between_them_in_training_only() -> None:
    layer, x = make(num_layers=2, dropout=0.5), draw(3, 20)
    first, second = make(), MLSTM(16, 16, num_heads=4, batch_first=True).double().eval()
    first.layers[0].load_state_dict(layer.layers[0].state_dict())
    second.layers[0].load_state_dict(layer.layers[1].state_dict())
    between = first(x)[0]
    close(layer(x)[0], second(between)[0])
    layer.train()
    torch.manual_seed(7)
    y = layer(x)[0]
    torch.manual_seed(7)
    close(y, second(F.dropout(between, 0.5))[0])
    one = make(dropout=0.5).train()
    close(one(x)[0], one.eval()(x)[0])


# ------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequences_are_separate_ones(
    options: dict[str, object], enforce_sorted: bool
) -> None:
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    layer, texts = make(**options), [draw(n) for n in lengths]
    _, before = layer(draw(len(texts), 4))  # a state of its own for each
    packed, after = layer(pack_sequence(texts, enforce_sorted), before)
    assert isinstance(packed, PackedSequence)
    padded, got = pad_packed_sequence(packed, batch_first=True)
    assert got.tolist() == lengths
    for n, text in enumerate(texts):
        y, state = layer(text[None], row(before, n))
        close(padded[n, : len(text)], y[0])
        same_state(row(after, n), state)


def test_packed_output_feeds_the_next_packed_module() -> None:
    """It keeps batch_sizes and the order, so it goes on like the output of nn.LSTM."""
    x = pack_sequence([draw(n) for n in LENGTHS], enforce_sorted=False)
    y, _ = make()(x)
    other = torch.nn.LSTM(6, 16).double()(x)[0]
    assert torch.equal(y.batch_sizes, other.batch_sizes)
    assert torch.equal(y.sorted_indices, other.sorted_indices)
    assert torch.equal(y.unsorted_indices, other.unsorted_indices)
    assert make(num_layers=2)(x)[0].data.shape == (sum(LENGTHS), 16)


def test_time_first_and_unbatched() -> None:
    layer, x = make(num_layers=2), draw(3, 20)
    y, state = layer(x)
    time_first = make(num_layers=2, batch_first=False)
    time_first.load_state_dict(layer.state_dict())
    z, other = time_first(x.transpose(0, 1))
    close(z.transpose(0, 1), y)
    same_state(other, state)
    one, alone = layer(x[1], row(layer(draw(3, 1))[1], 0))
    two, again = layer(x[1:2], row(layer(draw(3, 0))[1], 0))
    assert one.shape == (20, 16) and two.shape == (1, 20, 16)
    close(layer(x[1])[0], y[1])
    close(two[0], y[1])
    assert alone[0].C.shape == again[0].C.shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    "arguments",
    [(6, 16), (6, 16, 2), (6, 16, 2, False, True), (6, 16, 2, True, False, 0.1, True, 5)],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_arguments_and_layout_are_those_of_nn_lstm(arguments: tuple[int, ...]) -> None:
    """In its order: layers, bias, batch_first, dropout, bidirectional, proj_size; and (T, B)."""
    theirs, ours = torch.nn.LSTM(*arguments), MLSTM(*arguments)
    for x in (torch.randn(7, 3, 6), torch.randn(7, 6)):
        assert ours(x)[0].shape == theirs(x)[0].shape
    assert len(ours(x)[1]) == theirs.num_layers * (1 + theirs.bidirectional)
    names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    ours.flatten_parameters()


@pytest.mark.parametrize(
    ("hidden", "qk", "heads"), [(64, None, 4), (6, None, 3), (7, None, 1), (16, 6, 2)]
)
def test_heads_by_default(hidden: int, qk: int | None, heads: int) -> None:
    assert MLSTM(6, hidden, qk_size=qk).num_heads == heads


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_state_unpacked_as_that_of_nn_lstm_says_what_to_take(num_layers: int) -> None:
    layer = make(num_layers=num_layers)
    with pytest.raises(TypeError, match=r"no \(h, c\).*y\[:, -1\].*pad_packed_sequence"):
        _, (_, _) = layer(draw(2, 9))
    _, state = layer(draw(2, 9))
    with pytest.raises(
        TypeError, match="state must be what this layer has returned.*Tensor, Tensor"
    ):
        layer(draw(2, 9), (torch.zeros(1, 2, 16), torch.zeros(1, 2, 16)))
    assert state[0] is state.layers[0] and len(state) == num_layers


def test_the_last_output_of_padded_and_packed_sequences() -> None:
    """What the error tells programs to take where nn.LSTM has h[-1]."""
    layer, x = make(), [draw(n) for n in LENGTHS]
    last = torch.stack([layer(text)[0][-1] for text in x])
    lengths = torch.tensor(LENGTHS)
    y, _ = layer(torch.nn.utils.rnn.pad_sequence(x, batch_first=True))
    close(y[range(len(x)), lengths - 1], last)
    y, lengths = pad_packed_sequence(layer(pack_sequence(x, enforce_sorted=False))[0])
    close(y[lengths - 1, range(len(x))], last)


def test_states_are_saved_and_loaded(tmp_path: Path) -> None:
    _, state = make(num_layers=2)(draw(2, 9))
    torch.save(state.detach(), tmp_path / "state.pt")
    same_state(torch.load(tmp_path / "state.pt", weights_only=True), state)


# ------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_are_those_of_finite_differences(options: dict[str, object]) -> None:
    layer = make(**options)
    x = [draw(n).requires_grad_() for n in (5, 3)]
    parameters = list(layer.parameters())

    def f(*_: Tensor) -> Tensor:
        y, state = layer(pack_sequence(x, enforce_sorted=True))
        ends = [
            (s.C if s.m is None else s.C * s.m.detach().exp()[..., None, None])
            for s in state.layers
        ]
        return y.data.pow(3).sum() + sum(e.square().sum() for e in ends)

    tensors = [*x, *parameters]
    grads = torch.autograd.grad(f(), tensors)
    for _ in range(3):  # along random directions through all of them at once
        directions = [torch.randn_like(tensor) for tensor in tensors]
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6, 1e-6):
                for tensor, direction in zip(tensors, directions, strict=True):
                    tensor.add_(direction, alpha=step)
                values.append(f())
        got = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        torch.testing.assert_close(got, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-5)


def test_gradients_flow_from_segment_to_segment() -> None:
    layer = make(num_layers=2)
    x = draw(2, 20).requires_grad_()
    whole = torch.autograd.grad(layer(x)[0].pow(3).sum(), [x, *layer.parameters()])
    first, state = layer(x[:, :8])
    second, _ = layer(x[:, 8:], state)
    loss = first.pow(3).sum() + second.pow(3).sum()
    for a, b in zip(torch.autograd.grad(loss, [x, *layer.parameters()]), whole, strict=True):
        close(a, b)
    cut, _ = layer(x[:, 8:], state.detach())
    assert not torch.autograd.grad(cut.sum(), x)[0][:, :8].any()


# ------------------------------------------------------------------------------- as a module


def test_state_dict_is_stable() -> None:
    """Names and shapes that saved weights rely on."""
    layer = MLSTM(6, 16, 2, bidirectional=True, proj_size=5, num_heads=4, qk_size=8)
    kinds = {
        "norm_weight": (16,),
        "norm_bias": (16,),
        "qkvo.weight": (48, 6),
        "qkvo.bias": (48,),
        "gates.weight": (8, 6),
        "gates.bias": (8,),
        "proj.weight": (5, 16),
    }
    second = {**kinds, "qkvo.weight": (48, 10), "gates.weight": (8, 10)}
    want = {
        f"layers.{n}.{name}": shape
        for n in range(4)
        for name, shape in (kinds if n < 2 else second).items()
    }
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == want
    assert MLSTM(6, 16, bias=False).state_dict().keys() == {
        f"layers.0.{name}"
        for name in ("norm_weight", "norm_bias", "qkvo.weight", "gates.weight", "gates.bias")
    }


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_compute_the_same_and_are_their_own(clone: object) -> None:
    layer, x = make(num_layers=2, bidirectional=True), draw(2, 9)
    again = clone(layer)
    close(again(x)[0], layer(x)[0])
    assert not {p.data_ptr() for p in layer.parameters()} & {
        p.data_ptr() for p in again.parameters()
    }
    assert repr(again) == repr(layer)


@pytest.mark.parametrize("state", [False, True])
def test_compiles_without_a_break(state: bool) -> None:
    layer, x = make(torch.float32, bidirectional=True), draw(2, 9).float()
    before = layer(x)[1] if state else None
    before = before.detach() if before else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(layer(x, before)[0].pow(2).sum(), list(layer.parameters()))
    y, _ = compiled(x, before)
    torch.testing.assert_close(y, layer(x, before)[0])
    got = torch.autograd.grad(y.pow(2).sum(), list(layer.parameters()))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_and_autocast(dtype: torch.dtype) -> None:
    layer, x = make(torch.float32), draw(2, 30).float()
    truth = layer(x)[0]
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-5}[dtype]
    low = copy.deepcopy(layer).to(dtype)
    y, state = low(x.to(dtype))
    assert y.dtype == dtype and state[0].C.dtype == torch.float32
    assert ((y.float() - truth).norm() / truth.norm()).item() < tolerance
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            z, _ = layer(x)
        assert ((z.float() - truth).norm() / truth.norm()).item() < tolerance


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden_size": 10}, "hidden_size must be a multiple of num_heads = 4; got 10"),
        ({"qk_size": 6}, "qk_size must be a multiple of num_heads = 4; got 6"),
        ({"num_layers": 0}, "num_layers must be a whole number, at least 1; got 0"),
        ({"input_size": 2.0}, "input_size must be a whole number, at least 1; got 2.0"),
        ({"proj_size": -1}, "proj_size must be a whole number, 0 for none; got -1"),
        ({"dropout": 1.5}, "dropout must be a number from 0 to 1; got 1.5"),
        ({"dropout": "0.1"}, "dropout must be a number from 0 to 1; got '0.1'"),
        ({"input_gate": "tanh"}, "input_gate must be 'exp' or 'sigmoid'; got 'tanh'"),
    ],
)
def test_options_that_make_no_layer_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MLSTM(**{"input_size": 6, "hidden_size": 16, "num_heads": 4, **options})


def test_inputs_that_do_not_fit_are_refused() -> None:
    layer = make(num_layers=2)
    with pytest.raises(ValueError, match=r"x must be \(B, T, 6\).*got \(2, 9, 5\)"):
        layer(torch.zeros(2, 9, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must be .*got \(1, 6\)"):
        layer(torch.zeros(6, dtype=torch.float64))
    with pytest.raises(TypeError, match="x must have the dtype.*float64; got torch.float32"):
        layer(torch.zeros(2, 9, 6))
    with pytest.raises(ValueError, match="state must be 2 tfla.State.*got 1"):
        layer(draw(2, 9), layer(draw(2, 9))[1].layers[:1])
    with pytest.raises(ValueError, match=r"initial_state.C must be \(2, 4, 4, 4\)"):
        layer(draw(2, 9), layer(draw(3, 9))[1])


@pytest.mark.parametrize(
    ("x", "came"),
    [([[0.0]], "list"), (None, "NoneType"), (torch.ones(2, 9, 6, dtype=torch.int64), "int64")],
)
def test_an_input_that_is_no_floating_point_tensor(x: object, came: str) -> None:
    with pytest.raises(TypeError, match=f"x must be a floating point tensor.*got .*{came}"):
        MLSTM(6, 16)(x)
