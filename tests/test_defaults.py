"""Torch's default device and default dtype are of no matter: tensors are made for their inputs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from problems import Case, make_inputs, offsets
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from xlstm_models import SMALL, draw

import tfla
import tfla.nn
from tfla.xlstm import XLSTM
from tfla.xlstm import run as runs
from tfla.xlstm.train import Placement, train
from tfla.xlstm.writer import load_writer

X = make_inputs(Case(T=70, B=1, dtype=torch.float32))
PACKED = make_inputs(Case(T=70, lengths=(20, 50), B=1, dtype=torch.float32))
CU, ROW = offsets((20, 50)), torch.tensor([2])
ZEROS = [torch.zeros(3, *s.shape[1:]) for s in X.memory]
MODEL, TOKENS = XLSTM(SMALL), draw(2, 9)
PROMPTS = [[1, 2, 3], [4]]
LAYER = tfla.nn.MLSTM(8, 16, 2, bidirectional=True, proj_size=4)
TEXT, TEXTS = torch.randn(2, 7, 8), pack_sequence([torch.randn(7, 8), torch.randn(5, 8)])


def sequence(gate: str, packed: bool, states: bool) -> list[Tensor]:
    x = PACKED if packed else X
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.i, x.f)]
    memory = tfla.State(*x.memory) if gate == "exp" else tfla.State(x.memory.C, None, None)
    h, end = tfla.mlstm(
        *leaves,
        input_gate=gate,
        cu_seqlens=CU if packed else None,
        initial_state=memory if states else None,
        output_final_state=states,
    )
    loss = h.sum() if end is None else h.sum() + end.C.sum()
    ends = [] if end is None else [t.detach() for t in end if t is not None]
    return [h.detach(), *ends, *torch.autograd.grad(loss, leaves)]


def step() -> list[Tensor]:
    state = tfla.State(*(s.clone() for s in ZEROS))
    token = [t[:, 0] for t in (X.q, X.k, X.v, X.i, X.f)]
    return [tfla.mlstm_step(*token, state, inplace=True, slots=ROW)[0], *state]


def family() -> list[Tensor]:
    per_head = X.f[0, 0]
    return [
        tfla.linear_attention(X.q, X.k, X.v)[0],
        tfla.linear_attention(X.q, X.k, X.v, per_head, normalize=True)[0],
        tfla.linear_attention(X.q[:, :1], X.k[:, :1], X.v[:, :1], normalize=True)[0],
    ]


def model() -> list[Tensor]:
    logits, state = MODEL(TOKENS, output_state=True)
    one, _ = MODEL.step(TOKENS[:, 0], MODEL.init_state(2))
    sampled = MODEL.generate(TOKENS, 3, seed=0, stop=[1], top_k=5).tokens
    mixed = MODEL.generate(PROMPTS, 3, seed=0, top_p=0.9, state_dtype=torch.bfloat16).tokens
    return [logits.detach(), state[0].C.detach(), one.detach(), sampled, mixed]


def layer() -> list[Tensor]:
    return [LAYER(TEXT)[0].detach(), LAYER(TEXTS)[0].data.detach()]


def new_layer() -> list[Tensor]:
    """A device and a dtype that are named are obeyed."""
    torch.manual_seed(0)
    new = tfla.nn.MLSTM(8, 16, proj_size=4, device="cpu", dtype=torch.float32)
    return [new(TEXT)[0].detach()]


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    f"{gate}{' packed' * packed}{' states' * states}": (
        lambda gate=gate, packed=packed, states=states: sequence(gate, packed, states)
    )
    for gate in ("exp", "sigmoid")
    for packed in (False, True)
    for states in (False, True)
} | {"step": step, "family": family, "model": model, "layer": layer, "new layer": new_layer}  # type: ignore[dict-item]


@pytest.fixture(params=["meta", "float64", "bfloat16"])
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Sets another default, which ends with the test."""

    def change() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_defaults_change_nothing(name: str, other_default: Callable[[], None]) -> None:
    before = CALLS[name]()
    other_default()
    for a, b in zip(CALLS[name](), before, strict=True):
        assert a.device == b.device and a.dtype == b.dtype
        assert torch.equal(a, b)


def test_runs_are_where_they_are_placed(tmp_path: Path) -> None:
    """Training, its checkpoints and what reads them know no default device."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 40)
    small = {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "context": 16, "batch": 2}
    written = []
    for device in (None, "meta"):
        folder = tmp_path / str(device)
        try:
            torch.set_default_device(device)
            begun = runs.start(folder, {**small, "paths": [text], "steps": 2, "eval_bytes": 64})
            list(train(begun, Placement("cpu")))
            resumed = list(train(runs.resume(folder, {"steps": 4}), Placement("cpu")))
            said = "".join(load_writer(folder).write(b"to ", 8, seed=1))
        finally:
            torch.set_default_device(None)
        bits = [record["bits_per_byte"] for record in resumed if record["event"] == "eval"]
        written.append((bits, said))
    assert written[0] == written[1]
