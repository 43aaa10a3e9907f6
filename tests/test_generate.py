"""Generation: the carried state equals reading the text again, and sampling is what it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import tfla
from tfla.xlstm import (
    XLSTM,
    Stream,
    XLSTMConfig,
    load_state,
    prefill,
    put,
    sample,
    save_state,
    take,
)

VOCAB = 19


@pytest.fixture(params=["exp", "sigmoid"])
def model(request: pytest.FixtureRequest) -> XLSTM:
    """Lively gates, sharp logits, and fp64, so that no near-tie of two tokens decides a test."""
    config = XLSTMConfig(VOCAB, 24, 2, 3, input_gate=request.param)
    model = XLSTM(config).double()
    with torch.no_grad():
        for block in model.blocks:
            block.mlstm.gates.weight.normal_()
            block.mlstm.gates.bias.normal_()
        model.head.weight.mul_(4)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


def equal(a: tuple[tfla.State, ...], b: tuple[tfla.State, ...]) -> bool:
    pairs = [(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def reread(model: XLSTM, prompt: Tensor, new: int) -> Tensor:
    """Greedy generation the slow way: the whole text read again for every token. prompt (T,)."""
    text = prompt
    for _ in range(new):
        text = torch.cat((text, model(text[None])[0][0, -1].argmax()[None]))
    return text[len(prompt) :]


# ---------------------------------------------------------------- the state is carried


@torch.no_grad()
def test_greedy_generation_equals_reading_the_text_again(model: XLSTM) -> None:
    prompts = draw(3, 8)
    out = model.generate(prompts, 12, temperature=0)
    assert torch.equal(out.tokens, torch.stack([reread(model, p, 12) for p in prompts]))
    assert out.lengths.tolist() == [12] * 3
    assert len(out.tokens.unique()) > 3, "a model that repeats one token tests nothing"


@torch.no_grad()
def test_prompts_of_different_lengths_are_as_if_alone(model: XLSTM) -> None:
    prompts = [draw(n) for n in (5, 1, 17, 2)]
    out = model.generate(prompts, 9, temperature=0)
    assert torch.equal(out.tokens, torch.stack([reread(model, p, 9) for p in prompts]))
    as_lists = model.generate([p.tolist() for p in prompts], 9, temperature=0)
    assert torch.equal(as_lists.tokens, out.tokens)


def test_no_token_is_read_twice(model: XLSTM) -> None:
    read: list[int] = []
    model.embedding.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    model.generate([draw(5), draw(7)], 6, seed=0)
    assert read == [12, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 8}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_saved_state_continues_as_if_unbroken(
    model: XLSTM, packed: bool, sampling: dict, tmp_path: Path
) -> None:
    prompts = [draw(n) for n in (4, 6, 3)] if packed else draw(3, 5)
    whole = model.generate(prompts, 14, seed=torch.Generator().manual_seed(1), **sampling)
    generator = torch.Generator().manual_seed(1)
    first = model.generate(prompts, 6, seed=generator, **sampling)
    save_state(first.state, tmp_path / "state.safetensors")
    state = load_state(tmp_path / "state.safetensors")
    assert equal(state, first.state)
    second = model.generate(first.tokens[:, -1:], 8, state=state, seed=generator, **sampling)
    assert torch.equal(torch.cat((first.tokens, second.tokens), 1), whole.tokens)


def test_states_in_bf16_are_saved_and_continued_too(model: XLSTM, tmp_path: Path) -> None:
    """m stays; what is rounded after each token is rounded at a break too, and nothing else is."""
    low = {"temperature": 0, "state_dtype": torch.bfloat16}
    prompts = [draw(4), draw(6)]
    whole, first = (model.generate(prompts, n, **low) for n in (14, 6))
    assert all(s.C.dtype == torch.bfloat16 for s in first.state)
    assert all(s.m is None or s.m.dtype == torch.float64 for s in first.state)
    save_state(first.state, tmp_path / "state.safetensors")
    state = load_state(tmp_path / "state.safetensors")
    second = model.generate(first.tokens[:, -1:], 8, state=state, **low)
    assert torch.equal(torch.cat((first.tokens, second.tokens), 1), whole.tokens)


def test_a_prefix_is_read_once_and_continued_many_times(model: XLSTM) -> None:
    prefix, ends = draw(1, 9), [draw(3), draw(1), draw(6)]
    _, state = prefill(model, prefix)
    kept = take(state, [0])
    for prompts in (ends, torch.stack([e[:1] for e in ends])):
        whole = model.generate([torch.cat((prefix[0], p)) for p in prompts], 7, temperature=0)
        branched = model.generate(prompts, 7, temperature=0, state=state)
        assert torch.equal(branched.tokens, whole.tokens)
        assert equal(state, kept), "generation changed the state it was given"


def test_a_stream_is_the_same_and_can_be_branched_on_the_way(model: XLSTM) -> None:
    prompts = [draw(4), draw(2)]
    whole = model.generate(prompts, 10, temperature=0)
    stream = model.stream(prompts, 10, temperature=0)
    tokens = [next(stream) for _ in range(4)]
    branch = take(stream.state, [0, 1])
    assert torch.equal(stream.last, whole.tokens[:, 3]) and stream.lengths.tolist() == [4, 4]
    tokens += list(stream)
    assert torch.equal(torch.stack(tokens, 1), whole.tokens)
    assert next(stream, None) is None
    again = model.generate(whole.tokens[:, 3:4], 6, temperature=0, state=branch)
    assert torch.equal(again.tokens, whole.tokens[:, 4:])


def test_one_row_of_a_batch_is_branched_saved_and_continued(model: XLSTM, tmp_path: Path) -> None:
    prompts = [draw(4), draw(9), draw(2)]
    whole = model.generate(prompts, 12, temperature=0)
    first = model.generate(prompts, 5, temperature=0)
    save_state(take(first.state, [1]), tmp_path / "row.safetensors")
    row = load_state(tmp_path / "row.safetensors")
    again = model.generate(first.tokens[1:2, -1:], 7, temperature=0, state=row)
    assert torch.equal(again.tokens[0], whole.tokens[1, 5:])


def test_a_server_admits_and_retires_sequences_in_place(model: XLSTM) -> None:
    """Five rows, up to three at work, each at a place of its own in its text; all get the tokens
    that they get alone, and no state is ever moved."""
    texts = [draw(n) for n in (3, 7, 1, 5, 4, 2)]
    wanted = [model.generate([text], 9, temperature=0).tokens[0].tolist() for text in texts]
    pool = model.init_state(5)
    places = [t.data_ptr() for s in pool for t in s if t is not None]
    waiting, running, done = list(range(len(texts))), {}, {}
    while waiting or running:
        free = [row for row in (4, 0, 3, 1, 2) if row not in running][: 3 - len(running)]
        if arrivals := [waiting.pop(0) for _ in free[: len(waiting)]]:
            logits, new = prefill(model, [texts[n] for n in arrivals])
            put(pool, free[: len(arrivals)], new)
            for row, n, token in zip(free, arrivals, sample(logits, 0), strict=False):
                running[row] = (n, [int(token)])
        with torch.no_grad():
            last = torch.tensor([tokens[-1] for _, tokens in running.values()])
            logits, _ = model.step(last, pool, inplace=True, slots=torch.tensor(list(running)))
        for row, token in zip(list(running), sample(logits, 0), strict=True):
            n, tokens = running[row]
            tokens.append(int(token))
            if len(tokens) == 9 - n % 3:  # some retire earlier than others
                done[n] = running.pop(row)[1]
    assert [done[n] for n in range(6)] == [wanted[n][: 9 - n % 3] for n in range(6)]
    assert [t.data_ptr() for s in pool for t in s if t is not None] == places


def test_one_prefix_goes_to_several_slots(model: XLSTM) -> None:
    _, prefix = prefill(model, draw(1, 6))
    pool = model.init_state(4, dtype=torch.bfloat16)
    put(pool, torch.tensor([3, 1]), prefix)
    for layer, one in zip(pool, prefix, strict=True):
        assert torch.equal(layer.C[[1, 3]], one.C.bfloat16().expand(2, -1, -1, -1))
        assert not layer.C[[0, 2]].any()
        assert layer.m is None or torch.equal(layer.m[[1, 3]], one.m.expand(2, -1))


def test_a_long_prompt_is_read_in_pieces(model: XLSTM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, prefix = draw(2, 41), prefill(model, draw(2, 3))[1]
    logits, state = prefill(model, prompts, prefix)
    monkeypatch.setattr("tfla.xlstm.generate.PIECE", 20)
    again, after = prefill(model, prompts, prefix)
    torch.testing.assert_close(again, logits, rtol=1e-10, atol=1e-10)
    for a, b in zip(state, after, strict=True):
        torch.testing.assert_close(a.C, b.C, rtol=1e-10, atol=1e-10)


def test_generation_leaves_no_graph(model: XLSTM) -> None:
    out = model.generate(draw(1, 3), 2)
    assert not any(t.requires_grad for s in out.state for t in s if t is not None)
    assert torch.is_grad_enabled()
    logits, _ = model(draw(1, 3), out.state)
    logits.sum().backward()


# ---------------------------------------------------------------- on the device

SAMPLINGS = [{"temperature": 0}, {"seed": 3}, {"top_k": 5, "seed": 3}, {"top_p": 0.8, "seed": 3}]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("stop", [None, [1, 2]])
def test_a_step_asks_the_device_for_nothing(model: XLSTM, sampling: dict, stop: object) -> None:
    """Tensors without values raise when a value is asked for: so a CUDA graph can hold a step."""
    options = {**sampling, "stop": stop}
    stream = model.stream(draw(2, 4), 9, **options)
    where = {name: getattr(stream, name).data_ptr() for name in ("last", "lengths", "finished")}
    next(stream), next(stream)
    assert where == {name: getattr(stream, name).data_ptr() for name in where}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        stream.last, stream.lengths = torch.zeros(2, 2, dtype=torch.int64)
        stream.finished = torch.zeros(2, dtype=torch.bool)
        stream.state = model.init_state(2)
        stream._sampling = (*stream._sampling[:3], None)
        stream._step()
        with pytest.raises(DataDependentOutputException):
            stream.last.tolist()


def test_of_equal_logits_the_lower_ids_are_kept() -> None:
    """Those of a 16-bit model are often equal, and torch.topk keeps any of them on a GPU."""
    logits = torch.zeros(1, 50)
    logits[0, 7] = 1.0
    drawn = {sample(logits, top_k=3).item() for _ in range(200)}
    assert drawn == {7, 0, 1}


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, {"top_k": 3}], ids=str)
def test_a_recorded_step_writes_what_one_by_one_writes(
    gate: str, sampling: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = XLSTMConfig(500, 64, 2, 2, input_gate=gate)
    model, prompts = XLSTM(config).to("cuda", torch.bfloat16), [[1, 2, 3], [4]]

    def run(stop: int | None) -> Stream:
        torch.manual_seed(0)
        stream = model.stream(prompts, 40, stop=stop, **sampling)
        stream.tokens = torch.stack(list(stream), 1)
        return stream

    free = run(None)
    for stop in (None, int(free.tokens[0, 20])):
        recorded = run(stop)
        with monkeypatch.context() as patch:
            patch.setattr("tfla.xlstm.generate.RECORD", 10**9)
            plain = run(stop)
        assert recorded._graph is not None and plain._graph is None
        assert torch.equal(recorded.tokens, plain.tokens)
        assert torch.equal(recorded.lengths, plain.lengths) and equal(recorded.state, plain.state)


# ---------------------------------------------------------------- stopping


def test_each_row_stops_for_itself(model: XLSTM) -> None:
    prompts = [draw(n) for n in (3, 8, 5, 4)]
    free = model.generate(prompts, 20, temperature=0).tokens
    stops = [int(free[0, 2]), int(free[1, 9])]
    out = model.generate(prompts, 20, temperature=0, stop=stops)
    for row in range(4):
        hits = [t for t in range(20) if int(free[row, t]) in stops]
        length = hits[0] + 1 if hits else 20
        assert out.lengths[row] == length
        assert torch.equal(out.tokens[row, :length], free[row, :length])
        assert (out.tokens[row, length:] == out.tokens[row, length - 1]).all()
    assert out.tokens.shape[1] == out.lengths.max()
    assert len(out.lengths.unique()) > 1, "rows that stop together test nothing"


def test_the_state_of_a_stopped_row_stands_still(model: XLSTM) -> None:
    """It has read all but the stop token; the row goes on from there as from a text of its own."""
    prompts = [draw(n) for n in (3, 8, 5, 4)]
    stop = int(model.generate(prompts, 20, temperature=0).tokens[0, 2])
    out = model.generate(prompts, 20, temperature=0, stop=stop)
    more = model.generate(out.tokens[:, -1:], 5, temperature=0, state=out.state)
    texts = [
        torch.cat((p, t[:n])) for p, t, n in zip(prompts, out.tokens, out.lengths, strict=True)
    ]
    assert torch.equal(more.tokens, model.generate(texts, 5, temperature=0).tokens)


def test_generation_ends_when_all_rows_have_stopped(model: XLSTM) -> None:
    prompt = draw(1, 4)
    first = int(model.generate(prompt, 1, temperature=0).tokens)
    out = model.generate(prompt, 50, temperature=0, stop=first)
    assert out.tokens.tolist() == [[first]] and out.lengths.tolist() == [1]


# ---------------------------------------------------------------- sampling


def test_a_seed_reproduces_and_leaves_the_global_generator_alone(model: XLSTM) -> None:
    prompts, before = draw(2, 3), torch.get_rng_state()
    first = model.generate(prompts, 30, seed=5).tokens
    assert torch.equal(model.generate(prompts, 30, seed=5).tokens, first)
    assert not torch.equal(model.generate(prompts, 30, seed=6).tokens, first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    one = model.generate(prompts, 30).tokens
    torch.manual_seed(7)
    assert torch.equal(model.generate(prompts, 30).tokens, one)


LOGITS = torch.tensor([2.0, -1.0, 0.5, 2.0, 1.0, -3.0])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 3.0, "top_k": 3}, [0, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.75}, [0, 3]),  # 0.376 twice
        ({"top_p": 0.76}, [0, 3, 4]),  # and 0.138
        ({"top_p": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 4, "top_p": 0.84}, [0, 3, 4]),  # 0.383 twice and 0.141 of the four
    ],
    ids=str,
)
def test_samples_follow_the_distribution_cut_to_its_top(options: dict, kept: list[int]) -> None:
    draws = 40_000
    logits = LOGITS.expand(draws, -1)
    ids = sample(logits, **options, generator=torch.Generator().manual_seed(0))
    p = (LOGITS[kept].double() / options.get("temperature", 1.0)).softmax(0)
    counts = torch.bincount(ids, minlength=6).double()
    assert counts[[j for j in range(6) if j not in kept]].sum() == 0
    # Pearson's chi-squared; a right sampler exceeds degrees of freedom + 25 once in 10,000 seeds.
    chi = ((counts[kept] - draws * p).square() / (draws * p)).sum()
    assert chi < len(kept) - 1 + 25


def test_ties_do_not_widen_the_top() -> None:
    ids = sample(torch.zeros(2000, 50), top_k=3, generator=torch.Generator().manual_seed(0))
    assert len(ids.unique()) == 3
    ids = sample(torch.zeros(2000, 50), top_p=0.099, generator=torch.Generator().manual_seed(0))
    assert len(ids.unique()) == 5


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-20}]
)
def test_the_narrowest_choice_is_the_most_likely_token(options: dict) -> None:
    logits = torch.randn(64, 100)
    assert torch.equal(sample(logits, **options), logits.argmax(-1))


def test_rows_and_steps_draw_independently() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([sample(torch.zeros(100, 50), generator=generator) for _ in range(20)])
    same_row = (ids[1:] == ids[:-1]).double().mean()
    same_step = (ids[:, 1:] == ids[:, :-1]).double().mean()
    assert same_row < 0.05 and same_step < 0.05  # 0.02 when independent


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        (torch.tensor([1, 2]), {}, ValueError, r"prompts must be \(B, T\).*prompts\[None\]"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, ValueError, r"got \(2, 0\)"),
        ([[1, 2], []], {}, ValueError, r"prompts\[1\] must be 1-d with at least one token"),
        ([], {}, ValueError, "at least one prompt"),
        (torch.rand(1, 3), {}, TypeError, "integer token ids; got torch.float32"),
        ([[0, VOCAB]], {}, ValueError, "ids from 0 to 18; got ids from 0 to 19"),
        ([[-1]], {}, ValueError, "got ids from -1 to -1"),
        ([[1]], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1; got 0"),
        ([[1]], {"temperature": -1.0}, ValueError, "temperature must be finite and at least 0"),
        ([[1]], {"temperature": float("nan")}, ValueError, "temperature .* got nan"),
        ([[1]], {"state_dtype": torch.float16}, ValueError, "state_dtype must be None or torch.bf"),
        ([[1]], {"top_k": 0}, ValueError, "top_k must be at least 1"),
        ([[1]], {"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
        ([[1]], {"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\]"),
        ([[1]], {"stop": [3, VOCAB]}, ValueError, r"stop must hold ids from 0 to 18; got \[19\]"),
        ([[1]], {"state": ()}, ValueError, "state must be 2 tfla.State, one a layer; got 0"),
    ],
)
def test_wrong_arguments_are_named(
    prompts: object, options: dict, error: type[Exception], words: str
) -> None:
    model = XLSTM(XLSTMConfig(VOCAB, 16, 2, 2))
    with pytest.raises(error, match=words):
        Stream(model, prompts, **{"max_new_tokens": 3, **options})  # type: ignore[arg-type]


def test_a_state_of_another_number_of_rows_is_refused(model: XLSTM) -> None:
    _, state = prefill(model, draw(2, 3))
    with pytest.raises(ValueError, match="initial_state"):
        model.generate(draw(3, 3), 1, state=state)


def test_a_damaged_or_foreign_state_file_is_named(model: XLSTM, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    save_state(model.init_state(1), path)
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"state\.safetensors is not a whole safetensors file"):
        load_state(path)
    save_file({"embedding.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"state\.safetensors does not hold a state"):
        load_state(path)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_state(tmp_path / "none.safetensors")


# ---------------------------------------------------------------- integers of any make

EIGHT = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
MAKES = {f"numpy {kind.__name__}": kind for kind in EIGHT}
MAKES |= {
    f"torch {str(kind).removeprefix('torch.')}": lambda n, kind=kind: torch.tensor(n, dtype=kind)
    for kind in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16)
}
MAKES |= {"numpy array": np.array, "python": int}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_integers_of_any_make_are_taken(make: Any) -> None:
    torch.manual_seed(0)
    model = XLSTM(XLSTMConfig(VOCAB, 16, 2, 2))
    prompts = [[1, 2, 3], [4]]
    free = model.generate(prompts, 12, seed=3, top_k=4)
    hit = int(free.tokens[0, 2])
    plain = model.generate(prompts, 12, seed=3, top_k=4, stop=hit)
    assert plain.lengths[0] < 12
    for stop in (make(hit), [make(hit)], (make(hit), hit), {hit}, iter([make(hit)])):
        out = model.generate(prompts, make(12), seed=make(3), top_k=make(4), stop=stop)
        assert torch.equal(out.tokens, plain.tokens) and torch.equal(out.lengths, plain.lengths)
    other = [[make(1), make(2), make(3)], (make(4),)]
    assert torch.equal(model.generate(other, 12, seed=3, top_k=4, stop=hit).tokens, plain.tokens)
    state = model.init_state(make(3))
    assert state[0].C.shape[0] == 3
    assert equal(take(state, [make(1), make(2)]), model.init_state(2))


@pytest.mark.parametrize(
    "rows",
    [
        lambda ids: torch.tensor(ids),
        lambda ids: torch.tensor(ids, dtype=torch.int16),
        np.array,
        lambda ids: np.array(ids, np.uint8),
        tuple,
        list,
        bytes,
        bytearray,
        lambda ids: range(ids[0], ids[-1] + 1),
        lambda ids: torch.tensor([ids, ids]).T[:, 1],
    ],
)
def test_rows_of_integers_are_prompts_stops_and_rows(rows: Any) -> None:
    torch.manual_seed(0)
    model = XLSTM(XLSTMConfig(VOCAB, 16, 2, 2))
    ids = [3, 4, 5]
    plain = model.generate([ids, ids], 9, temperature=0, stop=ids)
    stop = ids if isinstance(rows(ids), (bytes, bytearray)) else rows(ids)
    out = model.generate([rows(ids), rows(ids)], 9, temperature=0, stop=stop)
    assert torch.equal(out.tokens, plain.tokens)
    pool, new = model.init_state(7), prefill(model, [[1], [2], [3]])[1]
    put(pool, rows(ids), new)
    assert equal(take(pool, rows(ids)), new)
    assert equal(take(pool, [0, 1, 2, 6]), model.init_state(4))


def test_an_array_is_a_batch_of_prompts() -> None:
    model = XLSTM(XLSTMConfig(VOCAB, 16, 2, 2))
    ids = [[1, 2, 3], [4, 5, 6]]
    plain = model.generate(torch.tensor(ids), 5, temperature=0).tokens
    for kind in (np.int64, np.uint8, np.uint64):
        assert torch.equal(model.generate(np.array(ids, kind), 5, temperature=0).tokens, plain)
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.uint16):
        tokens = torch.tensor(ids, dtype=dtype)
        assert torch.equal(model.generate(tokens, 5, temperature=0).tokens, plain)


NO_INTEGERS = [
    0.5, 2.0, True, "1", b"1", 1j, [[1]], [0.5], [True], ["1"], [None], np.float32(2),
    np.bool_(True), np.array([0.5]), np.array([True]), np.array([[1]]), torch.tensor(0.5),
    torch.tensor(True), torch.tensor([0.5]), torch.tensor([True]), torch.tensor([[1]]), {1: 2},
    object(),
]  # fmt: skip


@pytest.mark.parametrize("value", NO_INTEGERS, ids=range(len(NO_INTEGERS)))
@pytest.mark.parametrize("name", ["stop", "max_new_tokens", "seed", "top_k", "rows", "batch_size"])
def test_what_is_no_integer_is_an_error_that_names_the_argument(name: str, value: Any) -> None:
    model = XLSTM(XLSTMConfig(VOCAB, 16, 1, 2))
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must"):
        if name == "rows":
            take(model.init_state(3), value)
        elif name == "batch_size":
            model.init_state(value)
        else:
            model.generate([[1]], **{"max_new_tokens": 3, name: value})


@pytest.mark.parametrize(
    "prompts",
    [
        b"def ",
        "def ",
        bytearray(b"x"),
        [1, 2, 3],
        (1, 2),
        3,
        3.5,
        True,
        None,
        {1: [2]},
        [0.5],
        ["def "],
        [[1.0, 2.0]],
        [[True]],
        [["a"]],
        [[1], None],
        [[1], 2],
        [[[1]]],
        [torch.rand(2)],
        [torch.tensor([True])],
        [torch.tensor([[1]])],
        [torch.tensor(1)],
        [np.array([0.5])],
        np.array([[0.5]]),
        np.array([1, 2]),
        np.array(["a"]),
        torch.tensor([[True]]),
        torch.tensor([[1j]]),
        iter([[1]]),
        object(),
        [{1: 2}],
        [2**70],
        [[2**70]],
    ],
    ids=range(33),
)
def test_prompts_of_another_kind_are_an_error_that_names_them(prompts: Any) -> None:
    model = XLSTM(XLSTMConfig(VOCAB, 16, 1, 2))
    with pytest.raises((TypeError, ValueError), match=r"prompts(\[\d\])? must"):
        model.generate(prompts, 3)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [0.5], torch.rand(2), np.bool_(1), {}])
def test_what_is_no_number_is_an_error_that_names_the_argument(name: str, value: Any) -> None:
    if (name, value) == ("top_p", None):
        return  # all tokens
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        sample(torch.zeros(1, 5), **{name: value})


@pytest.mark.parametrize("make", [float, np.float32, np.float64, torch.tensor, np.float16])
def test_numbers_of_any_make_are_taken(make: Any) -> None:
    logits = torch.randn(4, 9)
    draws = [
        sample(logits, t, 3, p, torch.Generator().manual_seed(1))
        for t, p in ((0.5, 0.75), (make(0.5), make(0.75)))
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", -1),
        ("stop", VOCAB),
        ("stop", 2**70),
        ("stop", [0, -5]),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("top_k", -1),
        ("top_k", 0),
        ("max_new_tokens", -1),
    ],
)
def test_integers_out_of_range_are_named(name: str, value: Any) -> None:
    model = XLSTM(XLSTMConfig(VOCAB, 16, 1, 2))
    with pytest.raises(ValueError, match=f"^{name} must"):
        model.generate([[1]], **{"max_new_tokens": 3, name: value})


@pytest.mark.parametrize(("name", "value"), [("seed", 2**64), ("max_new_tokens", 2**63)])
def test_an_integer_too_large_is_told_the_largest(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be from -?[0-9]+ to {value - 1}; got"):
        XLSTM(XLSTMConfig(VOCAB, 16, 1, 2)).generate([[1]], **{"max_new_tokens": 3, name: value})


# ---------------------------------------------------------------- rows of a state


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([-1], r"rows must be from 0 to 3; got \[-1\]"),
        ([4], "rows must be from 0 to 3"),
        (torch.tensor([1, 9]), r"got \[9\]"),
        ([1, 1], r"rows must be distinct; got \[1, 1\]"),
        (slice(0, 2), "rows must hold integers"),
    ],
)
def test_rows_that_are_none_of_the_state_are_named(model: XLSTM, rows: Any, words: str) -> None:
    pool, new = model.init_state(4), prefill(model, draw(2, 3))[1]
    with pytest.raises((TypeError, ValueError), match=words):
        put(pool, rows, new)
    assert equal(pool, model.init_state(4))


def test_rows_of_a_state_move_within_it(model: XLSTM) -> None:
    pool = prefill(model, draw(4, 3))[1]
    before = take(pool, [0, 1, 2])
    view: Any = tuple(tfla.State(*(None if t is None else t[:3] for t in s)) for s in pool)
    put(pool, [1, 2, 3], view)
    assert equal(take(pool, [1, 2, 3]), before)


def bare(states: Any) -> Any:
    return tuple(tfla.State(s.C, None, None) for s in states)


def full(states: Any) -> Any:
    return tuple(tfla.State(s.C, s.C[..., 0].clone(), s.C[..., 0, 0].clone()) for s in states)


def last_bare(states: Any) -> Any:
    return (
        (*states[:-1], bare(states)[-1])
        if states[0].n is not None
        else (*states[:-1], full(states)[-1])
    )


def narrow(states: Any) -> Any:
    return (*states[:-1], states[-1]._replace(C=states[-1].C[..., :1]))


def three(states: Any) -> Any:
    return take(states, [0, 1, 1])


OF_ANOTHER_KIND = [
    lambda s: bare(s) if s[0].n is not None else full(s),
    last_bare,
    narrow,
    three,
    lambda s: s[:-1],
    lambda s: (*s, s[0]),
    lambda s: [tuple(x) for x in s],
    lambda s: s[0],
    lambda s: None,
]


@pytest.mark.parametrize("spoil", OF_ANOTHER_KIND)
def test_a_state_of_another_kind_is_refused_before_anything_is_written(
    model: XLSTM, spoil: Any
) -> None:
    """C of the new sequence with n and m of the old one would be no state at all."""
    pool, new = model.init_state(4), prefill(model, draw(2, 3))[1]
    with pytest.raises((TypeError, ValueError), match="^new"):
        put(pool, [2, 0], spoil(new))
    assert equal(pool, model.init_state(4))


def test_a_state_replaces_only_a_state(model: XLSTM, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    for n in (1, 2):
        save_state(model.init_state(n), path)
        assert load_state(path)[0].C.shape[0] == n
    for content in (b"years of work", None):
        if content is None:
            save_file({"weight": torch.zeros(2)}, path)
        else:
            path.write_bytes(content)
        mine = path.read_bytes()
        with pytest.raises(FileExistsError, match=r"state\.safetensors is not a state"):
            save_state(model.init_state(1), path)
        assert path.read_bytes() == mine and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- limits of sampling


@pytest.mark.parametrize("temperature", [1e-8, 1e-37, 2e-38, 1e-38, 1e-40, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_p": 1e-46}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_temperature_near_0_takes_the_likeliest(
    temperature: float, cut: dict, dtype: torch.dtype
) -> None:
    logits = torch.stack([torch.randperm(17) for _ in range(8)]).to(dtype) - 9
    assert torch.equal(sample(logits, temperature, **cut), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_a_large_temperature_is_uniform_over_what_is_allowed(temperature: float) -> None:
    logits = torch.tensor([[5.0, -float("inf"), -3.0]]).expand(3000, -1)
    counts = sample(logits, temperature).bincount(minlength=3)
    assert counts[1] == 0 and abs(int(counts[0]) - 1500) < 150


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("stop", [None, 1])
def test_logits_that_are_no_numbers_are_an_error(sampling: dict, bad: float, stop: Any) -> None:
    model = XLSTM(XLSTMConfig(VOCAB, 16, 1, 2, logit_soft_cap=None))
    with torch.no_grad():
        model.head.weight[5] = bad
    with pytest.raises(FloatingPointError, match=r"logits are not finite in rows \[0, 1\] of 2"):
        model.generate(draw(2, 3), 5, stop=stop, **sampling)


def test_a_row_that_breaks_on_the_way_is_named() -> None:
    """Before its token is given out; the others have been."""
    model = XLSTM(XLSTMConfig(VOCAB, 16, 1, 2))
    stream = model.stream(draw(3, 4), 9, seed=0)
    next(stream), next(stream)
    stream.state[0].C[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"rows \[1\] of 3"):
        next(stream)
    assert list(stream) == []
