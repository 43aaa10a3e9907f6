"""tfla.integrations.mlstm_kernels in the real packages mlstm_kernels and xlstm."""

import copy
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tfla
from tfla.integrations import mlstm_kernels as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others warn about when they are imported is their affair
    why = "needs mlstm_kernels and xlstm, of the extra peers"
    pytest.importorskip("mlstm_kernels", reason=why, exc_type=ImportError)
    pytest.importorskip("xlstm.xlstm_large.model", reason=why, exc_type=ImportError)
    from mlstm_kernels.torch import (
        backend_module,
        get_mlstm_kernel,
        get_mlstm_sequence_kernel,
        get_mlstm_step_kernel,
    )
    from mlstm_kernels.torch.chunkwise import registry
    from mlstm_kernels.torch.parallel import registry as registry_parallel
    from mlstm_kernels.torch.recurrent import registry_sequence, registry_step
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

pytestmark = pytest.mark.peers
REGISTRIES = {
    "chunkwise": registry,
    "parallel": registry_parallel,
    "sequence": registry_sequence,
    "step": registry_step,
}
THEIRS = {kind: dict(table) for kind, table in REGISTRIES.items()}  # as they come
NAMES = ("native_autograd", "native_custbw", "triton_xl_chunk", "triton_limit_chunk")
SIGING = ("chunkwise--triton_xl_chunk_siging", "parallel--native_siging_custbw")
B, H, T, K, V = 2, 3, 64, 8, 12


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    ours.install()
    yield
    ours.uninstall()


def draw(gate: str = "exp", T: int = T, grad: bool = False) -> list[Tensor]:
    """q, k, v, i, f and a state c, n, m in fp64."""
    shapes = [(T, K), (T, K), (T, V), (T,), (T,), (K, V), (K,), (1,)]
    x = [torch.randn(B, H, *shape, dtype=torch.float64) for shape in shapes]
    x[4] += 2
    if gate == "sigmoid":
        x.pop()
    return [y.requires_grad_(grad) for y in x]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def same(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    assert max(relative(x, y) for x, y in zip(a, b, strict=True)) < tolerance


# ------------------------------------------------------------------------------- the registries


def test_install_and_uninstall_leave_nothing_behind() -> None:
    ours.uninstall()
    tables = [*REGISTRIES.values(), vars(backend_module)]
    before = [dict(table) for table in tables]
    ours.uninstall()
    assert [dict(table) for table in tables] == before
    ours.install()
    ours.install()
    ours.uninstall()
    assert [dict(table) for table in tables] == before


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_name_of_theirs_is_served(kind: str) -> None:
    """And none of tfla's is new to them, but where they lack Triton."""
    assert dict(REGISTRIES[kind]) == ours.KERNELS[kind]
    assert not THEIRS[kind].keys() - ours.KERNELS[kind].keys()


def test_what_another_has_put_there_since_stays() -> None:
    registry_step["native"] = print
    try:
        ours.uninstall()
        assert registry_step["native"] is print
        assert registry_step["triton"] is THEIRS["step"]["triton"]
    finally:
        registry_step["native"] = THEIRS["step"]["native"]


def test_threads_install_once() -> None:
    ours.uninstall()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ours.install(), range(32)))
    ours.uninstall()
    assert {kind: dict(table) for kind, table in REGISTRIES.items()} == THEIRS


def test_names_that_are_missing_without_triton_are_there_while_installed() -> None:
    ours.uninstall()
    kept = registry.pop("triton_xl_chunk", None)
    try:
        ours.install()
        assert get_mlstm_kernel("chunkwise--triton_xl_chunk") is ours.chunkwise_exp
        ours.uninstall()
        assert "triton_xl_chunk" not in registry
    finally:
        if kept is not None:
            registry["triton_xl_chunk"] = kept


# ------------------------------------------------------------------------------- the functions


@pytest.mark.parametrize("name", [f"chunkwise--{n}" for n in NAMES] + ["parallel--native_custbw"])
@pytest.mark.parametrize("start", [False, True])
def test_exp_is_their_native_function_and_its_exact_gradients(name: str, start: bool) -> None:
    """native_autograd is theirs by autograd; without eps, the same function in plain operations."""
    x = draw(grad=True)
    state = dict(zip(("c_initial", "n_initial", "m_initial"), x[5:], strict=True)) if start else {}
    options = {"return_last_states": True, "eps": 0.0, "chunk_size": 16, **state}
    out = []
    for function in (get_mlstm_kernel(name), THEIRS["chunkwise"]["native_autograd"]):
        h, (c, n, m) = function(*x[:5], **options)
        c, n = c * m[..., None].exp(), n * m.exp()  # the same state in the gauge 0
        loss = h.pow(3).sum() + c.square().sum() + n.square().sum()
        tensors = x[:7] if start else x[:5]
        out.append([h, c, n, *torch.autograd.grad(loss, tensors)])
    same(*out, tolerance=1e-8)
    assert torch.equal(get_mlstm_kernel(name)(*x[:5]), ours.chunkwise_exp(*x[:5]))


@pytest.mark.parametrize("name", SIGING)
@pytest.mark.parametrize("normalize", [False, True])
def test_siging_is_their_native_function_and_its_exact_gradients(
    normalize: bool, name: str
) -> None:
    x = draw(grad=True)[:5]
    out = []
    for function in (get_mlstm_kernel(name), THEIRS["parallel"]["native_siging_autograd"]):
        h = function(*x, normalize=normalize, eps=0.0)
        out.append([h, *torch.autograd.grad(h.pow(3).sum(), x)])
    same(*out, tolerance=1e-8)


@pytest.mark.parametrize("normalize", [False, True])
def test_siging_states_join_two_parts_into_one(normalize: bool) -> None:
    x = draw()[:5]
    options = {"normalize": normalize, "return_last_states": True}
    whole, (c, n) = ours.chunkwise_siging(*x, **options)
    first, states = ours.chunkwise_siging(*(y[:, :, :20] for y in x), **options)
    second, (d, o) = ours.chunkwise_siging(*(y[:, :, 20:] for y in x), *states, **options)
    same((torch.cat([first, second], 2), d), (whole, c))
    if normalize:
        f = torch.sigmoid(x[4])
        weight = torch.sigmoid(x[3]) * f.flip(2).cumprod(2).flip(2) / f  # of each token at the end
        want = torch.einsum("bhtk,bht->bhk", x[1], weight)
        same((n, o), (want, want))


@pytest.mark.parametrize("name", ["triton", "native"])
def test_sequence_and_step_are_their_native_ones(name: str) -> None:
    q, k, v, i, f, c, n, m = draw(T=9)
    options = {"eps": 0.0, "dtype_state": torch.float64}
    state = {"c_initial": c, "n_initial": n, "m_initial": m}
    wanted, native = f"native_sequence__{name}", THEIRS["sequence"]["native_sequence__native"]
    mine, theirs = (
        function(q, k, v, i, f, **state, **options, return_last_states=True)
        for function in (get_mlstm_sequence_kernel(wanted), native)
    )
    same((mine[0], *mine[1]), (theirs[0], *theirs[1]))
    token = [x[:, :, 0] for x in (q, k, v)] + [i[:, :, :1], f[:, :, :1], c, n, m]
    before = [x.clone() for x in token]
    mine = get_mlstm_step_kernel(name)(*token, **options)
    theirs = THEIRS["step"]["native"](*token, **options)
    same((mine[0], *mine[1]), (theirs[0], *theirs[1]))
    assert all(torch.equal(a, b) for a, b in zip(token, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_gives_states_in_the_dtype_asked_for_but_m_in_fp32(dtype: torch.dtype) -> None:
    q, k, v, i, f, c, n, m = (x.to(torch.bfloat16) for x in draw(T=1))
    token = [x[:, :, 0] for x in (q, k, v)] + [i, f]
    state = [c.to(dtype), n.to(dtype), m.float()]
    h, after = ours.step(*token, *state, dtype_state=dtype)
    assert [x.dtype for x in (h, *after)] == [torch.bfloat16, dtype, dtype, torch.float32]
    want, exact = ours.step(*(x.double() for x in (*token, *state)))
    assert relative(h.double(), want) < 0.05
    assert relative(after[0].double(), exact[0]) < 0.01


def test_tensors_come_in_and_go_out_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of laying out head-first tensors: as such, and as views of token-first ones."""
    seen: list[Tensor] = []
    real = tfla.mlstm

    def watch(*tensors: Tensor, **options: Any) -> Any:
        seen.extend(tensors)
        out = real(*tensors, **options)
        seen.append(out[0])
        return out

    monkeypatch.setattr(tfla, "mlstm", watch)
    for turn in (False, True):
        x = [y.transpose(1, 2).contiguous().transpose(1, 2) if turn else y for y in draw()[:5]]
        h = registry["triton_xl_chunk"](*x)
        *inner, inner_h = seen
        assert [a.data_ptr() for a in inner] == [a.data_ptr() for a in x]
        assert h.data_ptr() == inner_h.data_ptr()
        seen.clear()


def test_autocast_computes_in_the_dtype_that_they_name() -> None:
    x = [y.float() for y in draw()[:5]]
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert ours.chunkwise_exp(*x, autocast_kernel_dtype=dtype).dtype == dtype
    assert ours.chunkwise_exp(*x, autocast_kernel_dtype=torch.bfloat16).dtype == torch.float32


def test_states_must_come_together() -> None:
    x = draw()
    with pytest.raises(ValueError, match="c_initial, n_initial and m_initial"):
        ours.chunkwise_exp(*x[:6])


# ------------------------------------------------------------------------------- the differences


def test_difference_they_hold_the_normaliser_constant_in_gradients() -> None:
    """For a plain loss dq is then far off; behind a norm that undoes the scale of h it is not."""
    x = draw(grad=True)[:5]

    def dq(function: Any, normed: bool) -> Tensor:
        h = function(*x, eps=0.0, chunk_size=16)
        h = nn.functional.normalize(h, dim=-1) if normed else h
        return torch.autograd.grad((h * torch.arange(V)).pow(3).sum(), x[0])[0]

    exact, constant = (THEIRS["chunkwise"][f"native_{kind}"] for kind in ("autograd", "custbw"))
    assert relative(dq(ours.chunkwise_exp, False), dq(exact, False)) < 1e-9
    assert relative(dq(constant, False), dq(exact, False)) > 0.1
    assert relative(dq(constant, True), dq(exact, True)) < 1e-9


def test_difference_they_add_eps_to_the_denominator() -> None:
    """Two tokens that hardly match, input gates of 12: the denominator is exp(-12) = 6e-6, and an
    eps of 1e-6 takes a seventh of h away."""
    q, k, v, i, f = (x[:, :, :2] for x in draw()[:5])
    q, i, f = q * 1e-9, torch.full_like(i, 12), torch.full_like(f, 30)
    native = THEIRS["chunkwise"]["native_autograd"]
    plain, with_eps = (native(q, k, v, i, f, chunk_size=2, eps=eps) for eps in (0.0, 1e-6))
    floor = torch.tensor(-12.0, dtype=torch.float64).exp()
    same([with_eps], [plain * floor / (floor + 1e-6)], 1e-6)
    for eps in (0.0, 1e-6):
        same([ours.chunkwise_exp(q, k, v, i, f, eps=eps)], [plain], 1e-6)


# ------------------------------------------------------------------------------- xLSTMLarge


def native(**fields: Any) -> nn.Module:
    """xlstm's model on the plain functions of mlstm_kernels."""
    ours.uninstall()
    model = large(plain=True, **fields)
    ours.install()
    return model


def large(gate: str = "exp", plain: bool = False, **fields: Any) -> nn.Module:
    """xlstm's model as its users make it, with the names of Triton kernels or of plain ones."""
    kernel = {"exp": "triton_xl_chunk", "sigmoid": "triton_xl_chunk_siging"}[gate]
    kernels = {
        "chunkwise_kernel": f"chunkwise--{'native_autograd' if plain else kernel}",
        "sequence_kernel": "native_sequence__native" if plain else "native_sequence__triton",
        "step_kernel": "native" if plain else "triton",
    }
    size = {"embedding_dim": 64, "num_heads": 2, "num_blocks": 2, "vocab_size": 31}
    torch.manual_seed(0)
    model = xLSTMLarge(xLSTMLargeConfig(**{**size, **kernels, "chunk_size": 16, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_preact" in name and "ogate" not in name:
                parameter.normal_(std=0.3 if "weight" in name else 1.0)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(2))


def test_the_defaults_of_its_configuration_are_served() -> None:
    """No kernel is named: those are what a model of theirs computes with."""
    config = xLSTMLargeConfig(embedding_dim=64, num_heads=2, num_blocks=1, vocab_size=31)
    backend = xLSTMLarge(config).backbone.blocks[0].mlstm_layer.mlstm_backend
    assert backend.chunkwise_kernel_fn is ours.chunkwise_exp
    assert backend.sequence_kernel_fn is ours.sequence
    assert backend.step_kernel_fn is ours.step


@pytest.mark.parametrize("plain", [False, True])
def test_it_generates_the_same_tokens(plain: bool) -> None:
    """With the names of Triton kernels and with those of plain ones."""
    options = {"mode": "inference", "return_last_states": True}
    x = tokens(8, 45)  # no multiple of the chunk size
    a, _ = large(plain=plain, **options).generate(x, max_length=30)
    # In their inference mode a model computes through the function that install() replaces, too.
    theirs = native(**options)
    ours.uninstall()
    b, _ = theirs.generate(x, max_length=30)
    assert b.unique().numel() > 5
    assert torch.equal(a, b)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_tokens_one_by_one_are_the_prompt(gate: str) -> None:
    """With the sigmoid gate, too, for which they have no step."""
    model = large(gate, mode="inference", return_last_states=True)
    x = tokens(2, 25)
    with torch.no_grad():
        whole, _ = model(x)
        state, out = None, []
        for t in range(25):
            logits, state = model(x[:, t : t + 1], state)
            out.append(logits)
    assert relative(torch.cat(out, 1), whole) < 1e-4


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_it_trains_unchanged(gate: str) -> None:
    """Until it knows a text by heart; its native kernel takes the same way."""
    x = tokens(2, 33)

    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        out = []
        for _ in range(50):
            logits = model(x[:, :-1])
            logits = logits[0] if isinstance(logits, tuple) else logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out

    mine = losses(large(gate, mode="train", return_last_states=True))
    assert mine[-1] < 0.1 < 3 < mine[0]
    if gate == "exp":
        theirs = losses(native(mode="train", return_last_states=True))
        torch.testing.assert_close(mine[:10], theirs[:10], rtol=1e-3, atol=1e-3)


def test_gradients_flow_through_its_states() -> None:
    """It writes the new state over the one that was used; that must not reach the graph."""
    model = large(mode="train", return_last_states=True).double()
    x, parameters = tokens(2, 32), list(model.parameters())
    whole = torch.autograd.grad(model(x)[0].pow(3).sum(), parameters)
    first, state = model(x[:, :16])
    second, _ = model(x[:, 16:], {n: tuple(s.clone() for s in layer) for n, layer in state.items()})
    parts = torch.autograd.grad(first.pow(3).sum() + second.pow(3).sum(), parameters)
    same(parts, whole, 1e-8)


def test_a_model_that_was_built_before_goes_its_own_way_while_installed() -> None:
    ours.uninstall()
    model = large(plain=True, mode="inference", return_last_states=True)
    x = tokens(2, 21)
    with torch.no_grad():
        before = model(x)[0]
        ours.install()
        assert torch.equal(model(x)[0], before)


def test_training_with_padding_pads_nothing() -> None:
    """Their wrapper fills up to whole chunks; tfla is called with the tokens as they are."""
    config = backend_module.mLSTMBackendConfig(
        chunkwise_kernel="chunkwise--native_autograd",
        mode="train_with_padding",
        return_last_states=False,
        chunk_size=16,
    )
    x = draw(T=21)[:5]
    assert torch.equal(backend_module.mLSTMBackend(config)(*x), ours.chunkwise_exp(*x))


@pytest.mark.parametrize("name", ["parallel--native_autograd", "parallel--native_siging_autograd"])
def test_a_parallel_name_infers(name: str) -> None:
    """Theirs take no states, so that a backend of theirs cannot."""
    config = backend_module.mLSTMBackendConfig(
        chunkwise_kernel=name, mode="inference", return_last_states=False
    )
    backend = backend_module.mLSTMBackend(config)
    x = [y.float() for y in draw(T=21)[:5]]
    h, state = backend(*(y[:, :, :9] for y in x))
    g, _ = backend(*(y[:, :, 9:] for y in x), *state)
    whole = THEIRS["parallel"][name.removeprefix("parallel--")](*x)
    same([torch.cat([h, g], 2)], [whole], 1e-3)


def test_a_model_keeps_what_it_was_built_with_and_is_copied() -> None:
    model = large(mode="inference", return_last_states=True)
    ours.uninstall()
    x = tokens(2, 21)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x)[0], model(x)[0])


# ------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton_xl_chunk", "triton_limit_chunk", "native_autograd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_h_is_no_further_from_the_truth_than_theirs(name: str, dtype: torch.dtype) -> None:
    """The truth is their plain function in fp64. Theirs multiply fp32 in TF32; ours in IEEE."""
    B, H, T, K, V = 2, 4, 256, 64, 128
    shapes = [(T, K), (T, K), (T, V), (T,), (T,)]
    x = [torch.randn(B, H, *shape, device="cuda") for shape in shapes]
    x[4] += 3
    x = [y.to(dtype) for y in x]
    truth = THEIRS["chunkwise"]["native_autograd"](*(y.double() for y in x), eps=0.0)
    options = {"chunk_size": 64, "autocast_kernel_dtype": dtype}
    both = (registry[name], THEIRS["chunkwise"][name])
    off = [relative(f(*x, **options).double(), truth) for f in both]
    assert off[0] <= 2 * off[1]


@pytest.mark.gpu
def test_on_a_gpu_a_backend_of_theirs_goes_on_token_by_token() -> None:
    """As TiRex-2 configures it for GPUs: bf16, states in fp32."""
    config = backend_module.mLSTMBackendConfig(
        chunkwise_kernel="chunkwise--triton_limit_chunk",
        sequence_kernel="native_sequence__triton",
        step_kernel="triton",
        mode="inference",
    )
    backend = backend_module.mLSTMBackend(config)
    B, H, T, K, V = 2, 4, 70, 64, 64
    shapes = [(T, K), (T, K), (T, V), (T,), (T,)]
    x = [torch.randn(B, H, *shape, device="cuda").bfloat16() for shape in shapes]
    with torch.no_grad():
        whole, _ = backend(*x)
        h, state = backend(*(y[:, :, :60] for y in x))
        out = [h]
        for t in range(60, T):
            h, state = backend(*(y[:, :, t : t + 1] for y in x), *state)
            out.append(h)
    assert {s.dtype for s in state} == {torch.float32}
    assert relative(torch.cat(out, 2).float(), whole.float()) < 0.02
