"""A token of a patched transformers model as one graph: what it computes, what it notices, and what
it leaves behind. On a CPU a tape stands where a CUDA graph is; ``-m gpu`` runs them on the graph.
"""

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import make, relative, tokens, transformers
from tapes import Recorder
from test_transformers import go_on
from torch import Tensor, nn

from tfla.integrations import inference
from tfla.integrations.transformers import patch, unpatch

pytestmark = [pytest.mark.peers]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


class Counted:
    """Counts what is recorded and replayed, on either device."""

    def __init__(self, record: Any) -> None:
        self.record, self.recorded, self.replayed = record, 0, 0

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> Any:
        replay, y = self.record(run, device)
        self.recorded += 1

        def again() -> None:
            self.replayed += 1
            replay()

        return again, y


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def graphs(device: str, monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(inference.record)
    if device == "cpu":
        counted = Counted(Recorder())
        monkeypatch.setattr(inference, "can_record", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(inference, "record", counted)
    return counted


class Reader:
    """A model that reads tokens one by one, and remembers them in a cache of its own."""

    def __init__(self, model: nn.Module, batch: int = 2, **options: Any) -> None:
        self.model, self.options = model, {"use_cache": True, **options}
        self.cache = None
        self.read(tokens(batch, 9))

    @torch.no_grad()
    def read(self, x: Tensor, **options: Any) -> Tensor:
        x = x.to(self.model.device)
        out, self.cache = go_on(self.model, x, cache=self.cache, **self.options, **options)
        return out.logits

    def three(self) -> Tensor:
        """The logits after each of three more tokens."""
        return torch.cat([self.read(x) for x in tokens(2, 3).split(1, 1)], 1)


def plainly(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    """What `run` returns where nothing is recorded."""
    with monkeypatch.context() as patched:
        patched.setattr(inference, "can_record", lambda x: False)
        return run()


def new(device: str, **fields: Any) -> nn.Module:
    return patch(make(torch.bfloat16 if device == "cuda" else torch.float32, **fields)).to(device)


@pytest.mark.parametrize("mode", ["single", "fused"])
def test_it_generates_the_same_tokens(
    mode: str, device: str, graphs: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = new(device, weight_mode=mode), tokens(3, 20).to(device)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    out = model.generate(x, **options)
    assert (graphs.recorded, graphs.replayed) == (1, 28)  # 29 tokens are read, the first by blocks
    assert torch.equal(out, plainly(monkeypatch, lambda: model.generate(x, **options)))
    assert out[:, 20:].unique().numel() > 10


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_logits_and_states_are_the_same_bits(
    state_dtype: torch.dtype, device: str, graphs: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch(new(device), state_dtype=state_dtype)

    def run() -> tuple[list[Tensor], Any]:
        reader = Reader(model)
        return [reader.three() for _ in range(3)], reader.cache

    (found, a), (wanted, b) = run(), plainly(monkeypatch, run)
    assert graphs.replayed == 8
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    for one, other in zip(a.rnn_state.values(), b.rnn_state.values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    assert torch.equal(a.seqlen_offset, b.seqlen_offset)


def test_an_output_is_not_overwritten_by_the_next(graphs: Counted, device: str) -> None:
    reader = Reader(new(device))
    reader.three()
    outputs: list[Tensor] = []
    reader.model.backbone.out_norm.register_forward_pre_hook(lambda _, x: outputs.append(x[0]))
    reader.read(tokens(2, 1))
    before = outputs[0].clone()
    reader.read(tokens(2, 1) + 1)
    assert graphs.replayed == 4
    assert torch.equal(outputs[0], before) and not torch.equal(outputs[1], before)


# ------------------------------------------------------------------------------- changes


def q_of(model: nn.Module) -> nn.Linear:
    return model.backbone.blocks[1].mlstm_layer.q


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        q_of(model).weight.mul_(-2)


def other_data(model: nn.Module) -> None:
    q_of(model).weight.data = q_of(model).weight.data * -2


def other_parameter(model: nn.Module) -> None:
    q_of(model).weight = nn.Parameter(q_of(model).weight.detach() * -2)


def other_module(model: nn.Module) -> None:
    layer = copy.deepcopy(q_of(model))
    in_place(model)
    layer.weight = nn.Parameter(q_of(model).weight.detach().clone())
    model.backbone.blocks[1].mlstm_layer.q = layer


def other_norm(model: nn.Module) -> None:
    norm = model.backbone.blocks[0].norm_ffn
    norm.weight = nn.Parameter(norm.weight.detach() * -2)


def a_hook(model: nn.Module) -> None:
    q_of(model).register_forward_hook(lambda *args: args[-1] * -2)


def a_hook_on_a_block(model: nn.Module) -> None:
    model.backbone.blocks[1].register_forward_hook(lambda *args: (args[-1][0] * -2, args[-1][1]))


def a_forward(model: nn.Module) -> None:
    layer = q_of(model)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight * -2)


def a_forward_of_a_block(model: nn.Module) -> None:
    block = model.backbone.blocks[1]
    before = block.forward
    block.forward = lambda *args, **options: before(args[0] * 2, *args[1:], **options)


def a_parametrization(model: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -2 * x

    nn.utils.parametrize.register_parametrization(q_of(model), "weight", Twice())


def adapters(model: nn.Module) -> None:
    peft = pytest.importorskip("peft", reason="needs peft", exc_type=ImportError)
    config = peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False)
    torch.manual_seed(7)
    peft.inject_adapter_in_model(config, model)


CHANGES = {
    in_place: True,  # whether a graph is at work afterwards
    other_data: True,
    other_parameter: True,
    other_module: True,
    other_norm: True,
    a_hook: False,
    a_hook_on_a_block: False,
    a_forward: False,
    a_forward_of_a_block: False,
    a_parametrization: False,
    adapters: False,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_is_changed_between_two_tokens_acts_on_the_next(
    change: Callable[[nn.Module], None],
    device: str,
    graphs: Counted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = new(device)

    def run(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        reader = Reader(model)
        before = reader.three()
        change(model)
        return before, reader.three(), reader.three()

    same = copy.deepcopy(model)
    found = run(model)
    assert graphs.replayed > 4 if CHANGES[change] else graphs.replayed == 2
    wanted = plainly(monkeypatch, lambda: run(same))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    unchanged = Reader(new(device))
    unchanged.three()
    assert not torch.equal(unchanged.three(), found[1])  # what a stale graph would say


def test_other_states_are_noticed(device: str, graphs: Counted) -> None:
    """reset() makes new ones; what is written into them is read from where they lie."""
    model = new(device)
    reader, other = Reader(model), Reader(model)
    first = reader.three()
    reader.cache.reset()
    reader.read(tokens(2, 9))
    assert torch.equal(reader.three(), first)
    for mine, theirs in zip(
        reader.cache.rnn_state.values(), other.cache.rnn_state.values(), strict=True
    ):
        for x, y in zip(mine, theirs, strict=True):
            x.copy_(y)
    replayed = graphs.replayed
    assert torch.equal(reader.three(), first)
    assert graphs.replayed == replayed + 3


def test_a_copy_of_a_cache_is_another(device: str, graphs: Counted) -> None:
    reader = Reader(new(device))
    reader.three()
    other = copy.copy(reader)
    other.cache = copy.deepcopy(reader.cache)
    here = reader.three()
    assert torch.equal(other.three(), here)
    stream = io.BytesIO()
    torch.save(reader.cache, stream)
    stream.seek(0)
    other.cache = torch.load(stream, weights_only=False)
    assert torch.equal(other.three(), reader.three())


def test_one_model_reads_batches_of_several_sizes_and_caches_by_turns(
    device: str, graphs: Counted
) -> None:
    model = new(device)
    alone = [Reader(model, n) for n in (1, 2, 3)]
    x = tokens(3, 5)
    wanted = [[r.read(x[:n, t : t + 1]) for t in range(5)] for n, r in enumerate(alone, 1)]
    turns = [Reader(model, n) for n in (1, 2, 3)]
    for t in range(5):
        for n, reader in enumerate(turns, 1):
            assert torch.equal(reader.read(x[:n, t : t + 1]), wanted[n - 1][t])
    assert graphs.recorded == 6


def test_a_cache_of_transformers_becomes_one_of_ours(device: str, graphs: Counted) -> None:
    model = new(device)
    reader = Reader(model)
    wanted = reader.three()
    other = copy.copy(reader)
    other.cache = transformers.models.xlstm.modeling_xlstm.xLSTMCache(
        model.config, 2, dtype=model.dtype, device=model.device
    )
    other.read(tokens(2, 9))
    assert torch.equal(other.three(), wanted)
    assert graphs.recorded == 2


# ------------------------------------------------------------------------------- other ways


def test_masked_tokens_hidden_states_and_gradients_go_block_by_block(
    device: str, graphs: Counted
) -> None:
    reader = Reader(new(device))
    reader.three()
    replayed = graphs.replayed
    mask = torch.ones(2, 1, dtype=torch.long, device=device)
    mask[0] = 0
    other = copy.copy(reader)
    other.cache = copy.deepcopy(reader.cache)
    reader.read(tokens(2, 1), attention_mask=mask)
    before, after = (r.cache.rnn_state[0][2] for r in (other, reader))
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    x = tokens(2, 1).to(device)
    with torch.no_grad():
        out, _ = go_on(reader.model, x, cache=reader.cache, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert not torch.equal(out.hidden_states[0], out.hidden_states[1])
    out, _ = go_on(reader.model, x, cache=reader.cache)
    assert out.logits.requires_grad
    assert graphs.replayed == replayed


def test_beam_search_moves_the_rows_that_the_graph_reads(
    device: str, graphs: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = new(device, pad_token_id=11), tokens(2, 12).to(device)
    options: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False}
    out = model.generate(x, **options)
    assert graphs.replayed == 10
    assert torch.equal(out, plainly(monkeypatch, lambda: model.generate(x, **options)))


def test_what_cannot_be_recorded_is_said_once(
    device: str, graphs: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new(device)
    wanted = plainly(monkeypatch, lambda: Reader(model).three())

    def fails(run: Any, device: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(inference, "record", fails)
    with pytest.warns(UserWarning, match="cannot record .* operation not permitted"):
        found = Reader(model).three()
    assert torch.equal(found, wanted)
    assert torch.equal(Reader(model).three(), wanted)  # and warns no more


def test_threads_that_share_a_model_have_graphs_of_their_own(device: str, graphs: Counted) -> None:
    model = new(device)
    texts = [tokens(1, 12 + n).to(device) for n in range(3)]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    wanted = [model.generate(x, **options) for x in texts]
    found: dict[int, list[Tensor]] = {n: [] for n in range(3)}

    def work(n: int) -> None:
        for _ in range(3):
            found[n].append(model.generate(texts[n], **options))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(3):
        assert len(found[n]) == 3 and all(torch.equal(x, wanted[n]) for x in found[n])


def test_inference_mode_and_no_grad_by_turns(device: str, graphs: Counted) -> None:
    model = new(device)
    wanted, reader = Reader(model), Reader(model)
    x = tokens(2, 6)
    expected = [wanted.read(x[:, t : t + 1]) for t in range(6)]
    for t in range(6):
        with torch.inference_mode(t % 2 == 1):
            assert torch.equal(reader.read(x[:, t : t + 1]), expected[t])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64])
def test_a_block_of_xlstm_7b_reads_prompts_and_tokens_to_the_same_bits(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time, with a graph and without."""
    fields = {"hidden_size": 4096, "num_heads": 8, "num_hidden_layers": 1}
    model = patch(make(torch.bfloat16, **fields)).cuda()
    x = tokens(batch, 136).cuda()

    @torch.no_grad()
    def run() -> list[Tensor]:
        out, cache = go_on(model, x[:, :128], cache=None, use_cache=True)
        found = [out.logits, *(state.clone() for s in cache.rnn_state.values() for state in s)]
        for one in x[:, 128:].split(1, 1):
            out, cache = go_on(model, one, cache=cache, use_cache=True)
            found.append(out.logits)
        return [*found, *(state for s in cache.rnn_state.values() for state in s)]

    wanted = plainly(monkeypatch, run)
    again = plainly(monkeypatch, run)
    assert [torch.equal(a, b) for a, b in zip(again, wanted, strict=True)] == [True] * len(wanted)
    for _ in range(3):
        assert [torch.equal(a, b) for a, b in zip(run(), wanted, strict=True)] == [True] * len(
            wanted
        )


# ------------------------------------------------------------------------------- what it leaves


def test_a_graph_dies_with_its_cache(device: str, graphs: Counted) -> None:
    """At once, not when Python next looks for cycles: it holds memory of a GPU."""
    reader = Reader(new(device))
    reader.three()
    known = [
        weakref.ref(x) for x in (reader.cache, reader.cache.graph, reader.cache.rnn_state[0][0])
    ]
    gc.disable()
    try:
        reader.cache = None
        assert [ref() for ref in known] == [None] * 3
    finally:
        gc.enable()


def test_a_cache_keeps_no_weights_alive(device: str, graphs: Counted) -> None:
    if device == "cpu":  # a tape does; a CUDA graph knows addresses alone
        graphs.record = lambda run, device: (lambda: None, run())
    reader = Reader(new(device))
    reader.three()
    known, cache = weakref.ref(q_of(reader.model).weight), reader.cache
    reader.model = None  # type: ignore[assignment]
    gc.collect()
    assert known() is None
    assert cache.graph is not None


def test_a_model_that_was_used_is_copied_saved_and_moved(device: str, graphs: Counted) -> None:
    model = new(device)
    wanted = Reader(model).three()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for again in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        recorded = graphs.recorded
        assert torch.equal(Reader(again).three(), wanted)
        assert graphs.recorded == recorded + 1
    assert relative(Reader(model.double()).three(), wanted.double()) < 0.1


def test_it_is_undone(device: str, graphs: Counted) -> None:
    theirs = make(torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    model = patch(copy.deepcopy(theirs))
    reader = Reader(model)
    reader.three()
    kept = copy.deepcopy(model)
    assert unpatch(model) is model
    replayed = graphs.replayed
    unpatched = Reader(model)
    assert torch.equal(unpatched.three(), Reader(theirs).three())
    assert type(unpatched.cache) is transformers.models.xlstm.modeling_xlstm.xLSTMCache
    reader.three()  # with the cache from before
    assert graphs.replayed == replayed
    ours = Reader(kept)
    ours.three()
    assert graphs.replayed > replayed
    assert torch.equal(Reader(patch(unpatch(model))).three(), Reader(kept).three())
    for a, b in zip(model.modules(), theirs.modules(), strict=True):
        unpatch(model)
        assert vars(a).keys() == vars(b).keys()
        assert len(a._forward_hooks) == len(b._forward_hooks)
        assert len(a._forward_pre_hooks) == len(b._forward_pre_hooks)
    assert unpatch(theirs) is theirs
    with pytest.raises(TypeError, match="xLSTMModel.*Linear"):
        unpatch(nn.Linear(2, 2))
