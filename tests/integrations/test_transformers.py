"""tfla.integrations.transformers.patch, on the real package, with and without xlstm installed."""

import copy
import importlib.util
import io
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import VOCAB, make, relative, tokens, transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tfla.integrations import head_first, inference, load_xlstm
from tfla.integrations.transformers import _cache_name, patch

pytestmark = pytest.mark.peers
EXTERNAL = transformers.models.xlstm.modeling_xlstm.external_xlstm


def exact(**fields: Any) -> nn.Module:
    """In fp64 throughout and without eps, so that nothing but rounding separates the two."""
    fields = {"eps": 0.0, "norm_reduction_force_float32": False, **fields}
    model = make(torch.float64, **fields)
    for module in model.modules():
        if hasattr(module, "force_float32_reductions"):
            module.force_float32_reductions = False
        if hasattr(module, "_inference_fn"):  # in which states are fp32 whatever the model is
            functions = [module._inference_fn]
            functions += [f for f in functions[0].keywords.values() if isinstance(f, partial)]
            for function in functions:
                if "dtype_state" in function.keywords:
                    function.keywords["dtype_state"] = torch.float64
    return model


CACHE = _cache_name(make().backbone)


def go_on(module: nn.Module, *args: Any, cache: Any, **options: Any) -> tuple[Any, Any]:
    """What a module returns, and the cache in it, which has had two names."""
    result = module(*args, **{CACHE: cache}, **options)
    return result, getattr(result, CACHE)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, patch(copy.deepcopy(model))


def hidden(model: nn.Module, *args: Any, **options: Any) -> Tensor:
    """In the dtype of the model; its logits are always fp32."""
    return model.backbone(*args, **options).last_hidden_state


def left_padded(lengths: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Texts; the batch of them, padded with a token that occurs in them too; its mask."""
    texts = [tokens(1, 40)[:, :n] for n in lengths]
    T = max(lengths)
    batch = torch.cat([nn.functional.pad(x, (T - x.shape[1], 0), value=11) for x in texts])
    mask = torch.stack([torch.arange(T) >= T - n for n in lengths]).long()
    return texts, batch, mask


def test_the_rest_of_this_file_holds_without_xlstm(root: Path) -> None:
    """Then transformers computes with code of its own, which the patch enters by other names."""
    if not EXTERNAL:
        pytest.skip("this is the run without xlstm")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=root,
        env={**os.environ, "TFLA_TEST_WITHOUT_XLSTM": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "this is the run without xlstm" in done.stdout


# ------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("T", [1, 13, 64, 131])
@pytest.mark.parametrize("mode", ["single", "fused"])
def test_outputs_are_those_of_transformers_to_the_last_digits(T: int, mode: str) -> None:
    theirs, ours = pair(exact(weight_mode=mode))
    x = tokens(2, T)
    with torch.no_grad():
        assert relative(hidden(ours, x), hidden(theirs, x)) < 1e-12


def test_it_is_tfla_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch that does nothing would pass most other tests."""
    seen = []
    for name in ("sequence", "step"):
        function = getattr(head_first, name)
        monkeypatch.setattr(
            head_first,
            name,
            lambda *a, function=function, name=name, **k: seen.append(name) or function(*a, **k),
        )
    theirs, ours = pair(make())
    theirs.generate(tokens(1, 70), max_new_tokens=3, do_sample=False)
    assert seen == []
    ours.generate(tokens(1, 70), max_new_tokens=3, do_sample=False)
    assert seen == ["sequence"] * 2 + ["step"] * 4


def test_greedy_generation_is_token_for_token_the_same() -> None:
    theirs, ours = pair(make())
    x = tokens(3, 70)
    wanted = theirs.generate(x, max_new_tokens=40, do_sample=False)
    assert wanted[:, 70:].unique().numel() > 10
    assert torch.equal(ours.generate(x, max_new_tokens=40, do_sample=False), wanted)


def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once() -> None:
    """Beyond max_inference_chunksize transformers cuts it; the mask is cut with it."""
    texts, batch, mask = left_padded([40, 9, 30])
    whole, cut = patch(exact()), patch(exact(max_inference_chunksize=16))
    with torch.no_grad():
        for use_cache in (True, False):
            a = hidden(whole, batch, attention_mask=mask)
            b = hidden(cut, batch, attention_mask=mask, use_cache=use_cache)
            assert relative(b, a) < 1e-12
            alone = hidden(cut, texts[1], use_cache=use_cache)
            assert relative(b[1:2, -9:], alone) < 1e-12


# ------------------------------------------------------------------------------- the cache


def read(model: nn.Module, x: Tensor, piece: int) -> tuple[Tensor, Any]:
    """Hidden states when x is read `piece` tokens at a time, and the cache."""
    cache, out = None, []
    with torch.no_grad():
        for part in x.split(piece, 1):
            result, cache = go_on(model.backbone, part, cache=cache, use_cache=True)
            out.append(result.last_hidden_state)
    return torch.cat(out, 1), cache


def test_tokens_one_by_one_are_the_prompt() -> None:
    model, x = patch(exact()), tokens(2, 50)
    whole, _ = read(model, x, 50)
    for piece in (1, 7):
        assert relative(read(model, x, piece)[0], whole) < 1e-11


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_the_cache_of_a_bf16_model_keeps_m_in_fp32(state_dtype: torch.dtype) -> None:
    model = patch(make(torch.bfloat16), state_dtype=state_dtype)
    given = transformers.models.xlstm.modeling_xlstm.xLSTMCache(
        model.config, 1, dtype=torch.bfloat16
    )
    for cache in (None, given):
        with torch.no_grad():
            for T in (20, 1):
                _, cache = go_on(model, tokens(1, T), cache=cache, use_cache=True)
        for c, n, m in cache.rnn_state.values():
            assert (c.dtype, n.dtype, m.dtype) == (state_dtype, state_dtype, torch.float32)
            assert m.any()


def test_a_bf16_model_does_not_drift() -> None:
    """256 tokens one by one are as far from the model in fp64 as all at once, and less than half as
    far as with gates in bf16. m falls by less than bf16 can tell."""
    model = make(torch.bfloat16, num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_preact.bias" in name and "ogate" not in name:
                parameter.fill_(5.0 if "fgate" in name else 8.0)
    x = tokens(1, 256)
    truth = read(patch(copy.deepcopy(model).double()), x, 256)[0][:, 128:]

    def off(stack: nn.Module, piece: int) -> float:
        y = read(stack, x, piece)[0][:, 128:].double()
        return ((y - truth).norm() / truth.norm()).item()

    theirs, ours = pair(model)
    tokens_off, prompt_off = off(ours, 1), off(ours, 256)
    assert prompt_off < 0.012 and abs(tokens_off - prompt_off) < 0.1 * prompt_off
    assert off(theirs, 1) > 3 * tokens_off and off(theirs, 256) > 2 * prompt_off  # what is avoided


# ------------------------------------------------------------------------------- single tokens


class Counted(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module) -> int:
    """Of torch, for one token behind a prompt, as generate() passes it: with a mask."""
    with torch.no_grad():
        _, cache = go_on(model, tokens(1, 20), cache=None, use_cache=True)
        with Counted() as count:
            mask = torch.ones(1, 21, dtype=torch.long)
            go_on(model, tokens(1, 1), cache=cache, use_cache=True, attention_mask=mask)
    return count.seen


@pytest.mark.parametrize("mode", ["single", "fused"])
def test_a_token_takes_half_the_operations(mode: str) -> None:
    """A step waits for the host, which calls them one by one."""
    theirs, ours = pair(make(num_hidden_layers=4, weight_mode=mode))
    assert operations(ours) < operations(theirs) / 2


@pytest.mark.parametrize("mode", ["single", "fused"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_reads_a_token_as_transformers_has_it(
    mode: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with and without its short way, also for rows whose token is masked."""
    model = patch(exact(weight_mode=mode))
    x, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 4:7] = 0 if masked else 1
    out = []
    for short in (True, False):
        if not short:
            monkeypatch.setattr(inference.BlockInference, "serves", lambda *_: False)
        cache, y = None, []
        with torch.no_grad():
            for t in range(9):
                part = {"attention_mask": mask[:, : t + 1], "use_cache": True}
                result, cache = go_on(model.backbone, x[:, t : t + 1], cache=cache, **part)
                y.append(result.last_hidden_state)
        out.append(torch.cat(y, 1))
    assert relative(out[0], out[1]) < 1e-11


def test_hidden_states_of_blocks_are_collected_from_single_tokens_too() -> None:
    out = []
    for model in pair(make()):
        with torch.no_grad():
            _, cache = go_on(model, tokens(2, 9), cache=None, use_cache=True)
            options = {"use_cache": True, "output_hidden_states": True}
            out.append(go_on(model, tokens(2, 1), cache=cache, **options)[0].hidden_states)
    theirs, ours = out
    assert len(ours) == len(theirs) == 3
    assert all(relative(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["single", "fused"])
@pytest.mark.parametrize("piece", [1, 30])
def test_on_a_gpu_the_short_way_is_no_further_from_the_truth(
    piece: int, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it goes through fused kernels; the truth is the same model in fp64."""
    model = patch(exact(weight_mode=mode).to(dtype)).cuda()
    wide = patch(copy.deepcopy(model).double())
    x = tokens(3, 30).cuda()
    truth = read(wide, x, piece)[0]
    short = read(model, x, piece)[0]
    monkeypatch.setattr(inference.BlockInference, "serves", lambda *_: False)
    long = read(model, x, piece)[0]
    off = [((y.double() - truth).norm() / truth.norm()).item() for y in (short, long)]
    assert off[0] <= 2 * off[1]


def test_a_graph_holds_a_patched_model() -> None:
    """A prompt and a token, without a break."""
    model, x = patch(make()), tokens(2, 20)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        out, cache = go_on(compiled, x, cache=None, use_cache=True)
        assert torch.equal(out.logits, model(x).logits)
        other = copy.deepcopy(cache)
        one, _ = go_on(compiled, x[:, :1], cache=cache, use_cache=True)
        two, _ = go_on(model, x[:, :1], cache=other, use_cache=True)
    assert torch.equal(one.logits, two.logits)


@pytest.mark.parametrize("name", ["norm_mlstm", "mlstm_layer.multihead_norm", "ffn", "mlstm_layer"])
def test_what_hangs_on_a_module_acts_on_single_tokens_too(name: str) -> None:
    model, x = patch(make()), tokens(1, 6)
    whole, _ = read(model, x, 6)
    seen = []
    module = model.backbone.blocks[1].get_submodule(name)
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    again, _ = read(model, x, 1)
    handle.remove()
    assert len(seen) == 6
    assert relative(again, whole) < 1e-4


def test_a_forward_that_another_has_given_a_block_stays() -> None:
    """As accelerate does it to a model that is spread over devices."""
    model, x = make(), tokens(1, 5)
    block, seen = model.backbone.blocks[0], []
    before = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return before(*args, **kwargs)

    block.forward = forward
    patch(model)
    assert block.forward is forward
    assert relative(read(model, x, 1)[0], read(model, x, 5)[0]) < 1e-4
    assert len(seen) == 6


def test_beam_search_finds_what_it_finds_without_a_cache() -> None:
    """Which transformers' own cache cannot be reordered for."""
    model, x = patch(make(pad_token_id=11)), tokens(2, 12)
    options = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False, "length_penalty": 0.0}
    with_cache = model.generate(x, **options)
    assert torch.equal(with_cache, model.generate(x, use_cache=False, **options))
    greedy = model.generate(x, max_new_tokens=12, do_sample=False)
    assert not torch.equal(with_cache, greedy)


def test_assisted_generation_is_refused_in_one_sentence() -> None:
    """A memory cannot go back to what it was before a token that is rejected."""
    model = patch(make())
    options = {"max_new_tokens": 5, "do_sample": False}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(tokens(1, 9), prompt_lookup_num_tokens=3, **options)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(tokens(1, 9), assistant_model=patch(make()), **options)


# ------------------------------------------------------------------------------- the mask


def test_left_padding_leaves_no_trace() -> None:
    texts, batch, mask = left_padded([40, 9, 1, 30])
    theirs, ours = pair(exact())
    with torch.no_grad():
        y = hidden(ours, batch, attention_mask=mask)
        padded = hidden(theirs, batch, attention_mask=mask)
        for n, text in enumerate(texts):
            T = text.shape[1]
            assert relative(y[n : n + 1, -T:], hidden(ours, text)) < 1e-12
            if T < 40:  # what is avoided
                assert relative(padded[n : n + 1, -T:], hidden(ours, text)) > 1e-3


def test_right_padding_leaves_the_state_alone() -> None:
    text = tokens(1, 20)
    model = patch(exact())
    batch = nn.functional.pad(text, (0, 9), value=11)
    mask = (torch.arange(29) < 20).long()[None]
    with torch.no_grad():
        _, a = go_on(model.backbone, text, cache=None, use_cache=True)
        _, b = go_on(model.backbone, batch, cache=None, attention_mask=mask, use_cache=True)
    for x, y in zip(a.rnn_state.values(), b.rnn_state.values(), strict=True):
        assert relative(y[0] * y[2][..., None].exp(), x[0] * x[2][..., None].exp()) < 1e-12


def test_a_left_padded_batch_generates_what_each_text_does_alone() -> None:
    texts, batch, mask = left_padded([40, 9, 30])
    model = patch(make(pad_token_id=11))
    together = model.generate(batch, attention_mask=mask, max_new_tokens=25, do_sample=False)
    for n, text in enumerate(texts):
        alone = model.generate(text, max_new_tokens=25, do_sample=False)
        assert torch.equal(together[n, 40:], alone[0, text.shape[1] :])


@pytest.mark.parametrize("shape", [(2, 10), (3, 9), (3, 1, 10, 10)])
def test_a_mask_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    model = patch(make())
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 10\)"):
        model(tokens(3, 10), attention_mask=torch.ones(shape))
    x = tokens(3, 10)
    with torch.no_grad():  # and nothing of it is left behind
        assert torch.equal(model(x).logits, patch(make())(x).logits)


# ------------------------------------------------------------------------------- training


def gradients(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    y = hidden(model, x, **options)
    keep = options.get("attention_mask", torch.ones(x.shape))[..., None].bool()
    return list(
        torch.autograd.grad(y.masked_fill(~keep, 0).pow(3).sum(), list(model.backbone.parameters()))
    )


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-9) -> None:
    assert max(relative(x, y) for x, y in zip(a, b, strict=True)) < tolerance


def test_gradients_are_those_of_the_function(tmp_path: Path) -> None:
    """Theirs by autograd through plain operations, which is exact, where the package does that."""
    theirs, ours = pair(exact().train())
    x = tokens(2, 64)
    same(gradients(ours, x, use_cache=False), gradients(theirs, x, use_cache=False), 1e-8)
    same(gradients(ours, x), gradients(ours, x, use_cache=False))


def test_training_with_the_cache_on_and_over_segments() -> None:
    """As from_pretrained leaves it; with xlstm installed transformers itself cannot."""
    model, x = patch(exact().train()), tokens(2, 30)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(hidden(model, x).pow(3).sum(), parameters, allow_unused=True)
    first, cache = go_on(model.backbone, x[:, :12], cache=None)
    second, _ = go_on(model.backbone, x[:, 12:], cache=cache)
    loss = first.last_hidden_state.pow(3).sum() + second.last_hidden_state.pow(3).sum()
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    same([g for g in parts if g is not None], [g for g in whole if g is not None])


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("mode", ["train", "train_with_padding", "inference"])
def test_every_mode_of_the_configuration_trains_and_generates(mode: str, states: bool) -> None:
    """Of which transformers refuses or breaks most. The mode says nothing of the function."""
    if mode == "train_with_padding" and states:
        pytest.skip("refused by transformers when the model is built, or is called")
    usual = patch(exact().train())
    model = patch(exact(mode=mode, return_last_states=states).train())
    x = tokens(2, 13)
    for options in ({}, {"use_cache": False}):
        same(gradients(model, x, **options), gradients(usual, x, **options))
    model.eval()
    wanted = usual.eval().generate(x, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(x, max_new_tokens=5, do_sample=False), wanted)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_mask(reentrant: bool) -> None:
    _, batch, mask = left_padded([40, 9, 30])
    model = patch(exact().train())
    plain = gradients(model, batch, attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    y = hidden(model, batch, attention_mask=mask)
    hidden(model, tokens(2, 5))  # another batch before the gradients of the first
    loss = y.masked_fill(~mask[..., None].bool(), 0).pow(3).sum()
    model.zero_grad()
    loss.backward()
    same([p.grad for p in model.backbone.parameters()], plain)


# ------------------------------------------------------------------------------- as a model


def test_a_patched_model_is_copied_saved_and_patched_again(tmp_path: Path) -> None:
    theirs, ours = pair(make())
    x = tokens(2, 20)
    with torch.no_grad():
        wanted = ours(x).logits
        stream = io.BytesIO()
        torch.save(ours, stream)
        stream.seek(0)
        for again in (copy.deepcopy(ours), torch.load(stream, weights_only=False), patch(ours)):
            assert torch.equal(again(x).logits, wanted)
    assert len(ours.backbone._forward_pre_hooks) == len(theirs.backbone._forward_pre_hooks) + 1
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.config.to_dict() == theirs.config.to_dict()
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        assert relative(load_xlstm(tmp_path)(x)[0], wanted) < 1e-4


def test_embeddings_instead_of_tokens() -> None:
    model, x = patch(exact()), tokens(2, 20)
    with torch.no_grad():
        e = model.backbone.embeddings(x)
        assert torch.equal(hidden(model, inputs_embeds=e), hidden(model, x))
    with pytest.raises(ValueError, match="exactly one"):
        model.backbone()


@pytest.mark.skipif(not EXTERNAL, reason="transformers' own code has no sigmoid gate")
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="they need Triton for its name")
def test_the_sigmoid_gate_of_xlstm() -> None:
    """Its Triton kernel is the only one they have, and it has no step."""
    model = patch(exact(chunkwise_kernel="chunkwise--triton_xl_chunk_siging"))
    x = tokens(2, 30)
    assert relative(read(model, x, 1)[0], read(model, x, 30)[0]) < 1e-11
    assert relative(read(model, x, 30)[0], read(patch(exact()), x, 30)[0]) > 1e-3


def test_what_is_no_xlstm_is_refused() -> None:
    with pytest.raises(TypeError, match="xLSTMModel.*Linear"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="state_dtype"):
        patch(make(), state_dtype=torch.float16)
    assert VOCAB == make().config.vocab_size


# Which the other name of it, new in 5.23, would not need.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("train", [False, True])
def test_threads_that_share_a_model_keep_their_own_padding(train: bool) -> None:
    """Values, and gradients through checkpoints, whose second computation may be in any thread."""
    model = patch(make())
    model.train(train)
    if train:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 33)
    masks = [torch.ones_like(ids) for _ in range(3)]
    for n, mask in enumerate(masks):
        mask[0, : 7 * n] = 0
    weight = model.backbone.blocks[0].mlstm_layer.q.weight

    def answer(mask: Tensor) -> Tensor:
        with torch.set_grad_enabled(train):
            logits = model(ids, attention_mask=mask).logits
            return torch.autograd.grad(logits.sum(), weight)[0] if train else logits

    right = [answer(mask) for mask in masks]
    assert not torch.equal(right[0], right[1]) and not torch.equal(right[1], right[2])
    wrong: list[int] = []

    def work(n: int) -> None:
        try:
            for _ in range(3 if train else 8):
                if not torch.equal(answer(masks[n]), right[n]):
                    wrong.append(n)
        except Exception:
            wrong.append(n)
            raise

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_what_a_call_raises_leaves_no_mask_behind() -> None:
    model, ids = patch(make()).eval(), tokens(2, 9)
    right = model(ids).logits
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    handle = model.backbone.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, attention_mask=mask)
    handle.remove()
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=mask[:, :5])
    assert torch.equal(model(ids).logits, right)
