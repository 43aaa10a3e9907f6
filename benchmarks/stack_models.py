"""The models that benchmarks/stacks.py times: three stacks with one face, and the same weights."""

import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from guarded import guard
from torch import Tensor, nn

from tfla.integrations.weights import names_in_checkpoint
from tfla.xlstm import XLSTM, Stream, XLSTMConfig, prefill

STACKS = OURS, HUGGING, XLSTM_LARGE, INSTALLED = "tfla", "transformers", "xlstm", "xlstm on tfla"


class Ours:
    def __init__(self, model: XLSTM, state_dtype: torch.dtype | None = None) -> None:
        self.model, self.state_dtype = model, state_dtype

    def prefill(self, tokens: Tensor) -> Tensor:
        return prefill(self.model, tokens)[0]

    def decode(self, prompts: Tensor) -> Callable[[], Tensor]:
        stream = Stream(self.model, prompts, 1000, temperature=0, state_dtype=self.state_dtype)
        next(stream)
        return lambda: next(stream)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]


Call = Callable[..., tuple[Tensor, Any]]


class Theirs:
    """`call` is their model from tokens and a cache to logits of all tokens and the cache."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call = model, call

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.call(tokens)[0][:, -1]

    def decode(self, prompts: Tensor) -> Callable[[], Tensor]:
        logits, cache = self.call(prompts)
        last = logits[:, -1:].argmax(-1)
        del logits

        def step() -> Tensor:
            nonlocal last, cache
            logits, cache = self.call(last, cache)
            last = logits[:, -1:].argmax(-1)
            return last[:, 0]

        return step

    def logits(self, tokens: Tensor) -> Tensor:
        return self.call(tokens, use_cache=False)[0]


def transformers_call(model: nn.Module) -> Call:
    words = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in words else "cache_params"  # from 5.24, and before

    def call(tokens: Tensor, cache: Any = None, use_cache: bool = True) -> tuple[Tensor, Any]:
        out = model(tokens, use_cache=use_cache, **{name: cache})
        return out.logits, out.get(name)

    return call


def xlstm_call(model: nn.Module) -> Call:
    return lambda tokens, state=None, use_cache=True: model(tokens, state)


Stack = Ours | Theirs
Build = tuple[XLSTMConfig, torch.dtype, torch.device, bool]  # the last: to be trained


def variants(stack: str, build: Build) -> Iterator[tuple[str, Stack]]:
    """The rows of a stack: name, and what runs. They share a model where they can."""
    config, _, device, train = build
    if stack == OURS:
        ours = placed(lambda: XLSTM(config), build)
        yield stack, Ours(ours)
        if not train:
            yield "tfla, bf16 states", Ours(ours, torch.bfloat16)
        return
    on_tfla = stack == INSTALLED
    if device.type == "cuda":
        guard()
    kernels = "triton" if device.type == "cuda" or on_tfla else "native"
    chunkwise = "triton_xl_chunk" if kernels == "triton" else "native_autograd"
    d, layers, mode = config.hidden_size, config.num_layers, "train" if train else "inference"
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "num_heads": config.num_heads,
        "embedding_dim": d,
        "num_blocks": layers,
        "ffn_proj_factor": config.ffn_factor,
        "mode": mode,
        "chunk_size": 128,
        "sequence_kernel": f"native_sequence__{kernels}",
        "step_kernel": kernels,
        "chunkwise_kernel": f"chunkwise--{chunkwise}",
        "return_last_states": True,
    }
    if stack == HUGGING:
        from transformers import xLSTMConfig, xLSTMForCausalLM

        from tfla.integrations.transformers import patch

        fields |= {"hidden_size": d, "num_hidden_layers": layers}
        theirs = placed(lambda: xLSTMForCausalLM(xLSTMConfig(**fields)), build)
        yield stack, Theirs(theirs, transformers_call(theirs))
        yield "transformers on tfla", Theirs(patch(theirs), transformers_call(theirs))
        return
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    from tfla.integrations import mlstm_kernels

    if on_tfla:
        mlstm_kernels.install()
    try:
        large = placed(lambda: xLSTMLarge(xLSTMLargeConfig(**fields)), build)
        yield stack, Theirs(large, xlstm_call(large))
    finally:
        mlstm_kernels.uninstall()


@torch.no_grad()
def placed(make: Callable[[], nn.Module], build: Build) -> Any:
    """A model made on the device in its dtype, no other copy at any time; the same values by the
    name that a parameter has in transformers."""
    config, dtype, device, train = build
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device).train(train)
    ours = names_in_checkpoint(config) if isinstance(model, XLSTM) else {}
    for key, parameter in model.named_parameters():
        key = "backbone.embeddings.weight" if key == "embedding.weight" and not ours else key
        parts = ours.get(key, [(key, len(parameter))])
        pieces = parameter.split([rows for _, rows in parts])
        for (name, _), piece in zip(parts, pieces, strict=True):
            draw(name, piece, config)
    return model


def draw(name: str, x: Tensor, config: XLSTMConfig) -> None:
    """Widths as the model is initialised with, but gates that differ and that do something."""
    d = config.hidden_size
    out = name.endswith(("out_proj.weight", "proj_down.weight"))
    std = 2 / (config.num_layers * d**0.5) if out else (2 / (5 * d)) ** 0.5
    mean = 0.0
    if x.dim() == 1:
        std, mean = (0.1, 1.0) if "norm" in name else (1.0, 4.0 if "fgate" in name else 0.0)
    x.normal_(mean, std, generator=torch.Generator(x.device).manual_seed(zlib.crc32(name.encode())))
