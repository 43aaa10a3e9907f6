"""A transformers xLSTM computes with tfla."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tfla import _compat
from tfla.integrations import head_first, inference


def patch(model: nn.Module, *, state_dtype: torch.dtype = torch.float32) -> nn.Module:
    """Let an xLSTM of transformers compute with tfla, with or without the package xlstm installed.

    From then on, in training and in generation:

    * Prompts of any length pass through ``tfla.mlstm``, new tokens through its decode step.
      Gradients are those of the function. Without gradients there are few operations around them.
    * On a GPU all tokens behind a prompt but the first are one CUDA graph each, unless a hook or an
      adapter is to be called.
    * The cache keeps m in fp32 and can be reordered, which beam search needs.
    * A token that ``attention_mask`` masks changes nothing for the others.

    ``config.eps``, ``chunk_size``, ``mode`` and the names of kernels have no effect, with one
    exception: "siging" in ``chunkwise_kernel`` is a sigmoid input gate.
    docs/migrate/transformers.md compares the two; ``unpatch`` undoes it.

    Args:
        model: an xLSTMForCausalLM or xLSTMModel, or a module that contains one. It is changed in
            place; its weights, its configuration and what ``save_pretrained`` writes are not. A
            second call changes only `state_dtype`.
        state_dtype: torch.float32 or torch.bfloat16, of C and n in the cache (fp64 in an fp64
            model).

    Returns:
        The model.

    Raises:
        TypeError: there is no xLSTM in `model`.
        ValueError: another `state_dtype`.

    Example:
        >>> from tfla.integrations.transformers import patch
        >>> model = patch(xLSTMForCausalLM.from_pretrained("NX-AI/xLSTM-7b"))  # doctest: +SKIP
    """
    if state_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16; got {state_dtype}.")
    for stack in _stacks(model):
        before = [hook for hook in _compat.pre_forward_hooks(stack) if _owner(hook)]
        if before:
            _owner(before[0]).state_dtype = state_dtype
            continue
        patched = _Patch(state_dtype, _cache_name(stack))
        patched.hooks = (
            stack.register_forward_pre_hook(patched.enter, with_kwargs=True),
            stack.register_forward_hook(patched.leave, always_call=True),
        )
        for layer, block in enumerate(stack.blocks):
            patched.serve(layer, block)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Let a patched model compute as transformers has it again; one that is not patched is left.

    A cache that was filled before is of use to it too. TypeError: there is no xLSTM in it.
    """
    for stack in _stacks(model):
        for hook in _compat.pre_forward_hooks(stack):
            if patched := _owner(hook):
                patched.remove(stack)
    return model


def _stacks(model: nn.Module) -> list[Any]:
    found = [module for module in model.modules() if type(module).__name__ == "xLSTMModel"]
    if not found:
        raise TypeError(
            f"model must be or contain an xLSTMModel of transformers; got {type(model).__name__}."
        )
    return found


class _Call:
    """One call of a patched stack: its mask, and how far each layer has read it.

    Args:
        patch: of the stack.
        mask: (B, T) False for tokens that do not count; None: all do.
        outer: the call within which it is made, None: there is no other.
        graph: what reads a single token in place of the blocks, if it can; None: nothing does.
    """

    def __init__(
        self,
        patch: _Patch,
        mask: Tensor | None,
        outer: _Call | None,
        graph: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        self.patch, self.mask, self.outer, self.graph = patch, mask, outer, graph
        self.read: dict[int, int] = {}
        self.is_through = False  # has the graph been through all blocks?

    def kept(self, layer: int, T: int) -> Tensor | None:
        """The mask of the T tokens that a layer reads now; long prompts come to it in pieces."""
        if self.mask is None or self.mask.shape[1] == T:
            return self.mask
        start = self.read.get(layer, 0)
        self.read[layer] = start + T
        return self.mask[:, start : start + T]


class _Thread(threading.local):
    """What belongs to a thread. Threads share a model, and with it all that hangs on it, so a call
    is kept here and never there. (Of a ContextVar torch.compile makes no graph.)"""

    call: _Call | None = None


_thread = _Thread()


class _Patch:
    """What is known of a patched stack: nothing of a call, which other threads make as well."""

    def __init__(self, state_dtype: torch.dtype, cache_name: str) -> None:
        self.state_dtype = state_dtype
        self.cache_name = cache_name
        self.cache_type = _cache_type()
        self.hooks: tuple[RemovableHandle, ...] = ()
        self.steps: list[inference.BlockInference | None] = []  # of each block
        self.originals: list[tuple[Any, Any]] = []  # the functions of each block's backend
        self.whole: inference.StackInference | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has other blocks, at other addresses."""
        return {**vars(self), "whole": None}

    # -- around the stack

    def enter(self, stack: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Before the stack's forward: take the mask, and see to it that the cache is exact."""
        cache = self.cache_name
        names = ("input_ids", "inputs_embeds", cache, "use_cache")
        given = dict(zip(names, args, strict=False)) | given
        if "cache_params" in given:
            given[cache] = given.pop("cache_params")
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        x = ids if ids is not None else embedded
        if x is None:
            _thread.call = _Call(self, None, _thread.call)
            return (), given  # the stack says what is missing
        mask = _mask(given.get("attention_mask"), *x.shape[:2])
        if mask is not None and not torch.is_grad_enabled() and _is_readable(mask) and mask.all():
            mask = None  # reading it once costs less than closing the gates of every layer
        config = stack.config
        use_cache = given.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        if stack.training and getattr(stack, "gradient_checkpointing", False):
            # What a block is computed from again must not be overwritten in between.
            use_cache = given["use_cache"] = given.get(cache) is not None
            for block in stack.blocks:
                func = getattr(block, "_gradient_checkpointing_func", None)
                if func is not None and not isinstance(func, _Again):
                    block._gradient_checkpointing_func = _Again(func)
        cut = not stack.training and x.shape[1] > config.max_inference_chunksize
        weight = stack.get_input_embeddings().weight
        dtype = weight.dtype if embedded is None else embedded.dtype
        if given.get(cache) is None and (use_cache or cut):
            # Made in the dtype of C and n, of which m may need another.
            given[cache] = self.cache_type(
                config, x.shape[0], dtype=self.dtypes(dtype)[0], device=x.device
            )
        graph = None
        if given.get(cache) is not None:
            given[cache] = self.widen(given[cache], dtype)
            hidden = given.get("output_hidden_states")
            hidden = config.output_hidden_states if hidden is None else hidden
            if x.shape[1] == 1 and mask is None and hidden is False:
                graph = partial(self.graph, stack, given[cache])
        _thread.call = _Call(self, mask, _thread.call, graph)
        return (), given

    def leave(self, stack: nn.Module, args: Any, output: Any) -> None:
        """After the stack's forward, or what it has raised."""
        if _thread.call is not None and _thread.call.patch is self:
            _thread.call = _thread.call.outer

    def widen(self, cache: Any, dtype: torch.dtype) -> Any:
        """A cache that transformers made in the model's dtype as one of ours."""
        cache = self.cache_type.adopt(cache)
        if isinstance(cache, self.cache_type):
            cache.widen(*self.dtypes(dtype))
        return cache

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Of C and n, and of m, in the cache of a model of this dtype."""
        full = torch.promote_types(dtype, torch.float32)
        return full if full == torch.float64 else self.state_dtype, full

    # -- in the layers

    def serve(self, layer: int, block: Any) -> None:
        """Put tfla behind the functions that a block's backend calls, in training and inference,
        and behind the block itself where there are no gradients."""
        backend = block.mlstm_layer.mlstm_backend
        sigmoid = "siging" in backend.config.chunkwise_kernel
        memory = inference.Memory(
            "sigmoid" if sigmoid else "exp",
            not sigmoid or getattr(backend.config, "normalize_siging", True),
        )
        self.originals.append((backend._train_fn, backend._inference_fn))
        backend._train_fn = backend._inference_fn = partial(self.run, layer=layer, memory=memory)
        step = inference.BlockInference.of(block, memory)
        self.steps.append(step)
        if step is not None:
            block.forward = partial(self.block, step=step, layer=layer)

    def remove(self, stack: Any) -> None:
        """Undo it, but for what another has put in the place of something since."""
        for hook in self.hooks:
            hook.remove()
        for block, step, functions in zip(stack.blocks, self.steps, self.originals, strict=False):
            if step is not None and inference.is_forward_of(block, step):
                del block.forward
            backend = block.mlstm_layer.mlstm_backend
            for name, function in zip(("_train_fn", "_inference_fn"), functions, strict=True):
                if getattr(getattr(backend, name), "func", None) == self.run:
                    setattr(backend, name, function)

    def block(
        self, x: Tensor, state: Any = None, *, step: inference.BlockInference, layer: int
    ) -> Any:
        """One block: without gradients in few operations, anything else as transformers has it."""
        call = _thread.call
        if call is not None and call.patch is self:
            if call.is_through:
                return x, state
            if layer == 0 and call.graph is not None and step.serves(x):
                y = call.graph(x)
                if y is not None:
                    call.is_through = True
                    return y, state
        if not step.serves(x):
            return type(step.block).forward(step.block, x, state)
        return step(x, state, self.kept(layer, x.shape[1]))

    def graph(self, stack: Any, cache: Any, x: Tensor) -> Tensor | None:
        """A token behind all blocks, by a CUDA graph; None where it is to be read by each."""
        if not inference.can_record(x) or not isinstance(cache, self.cache_type):
            return None
        whole = self.whole
        if whole is None or not whole.is_current(stack.blocks):
            whole = self.whole = inference.StackInference(stack.blocks, self.steps)
        if not whole.recordable:
            return None
        if cache.graph is None:
            cache.graph = inference.TokenGraph()
        token: inference.TokenGraph = cache.graph
        return token(x, whole, cache.rnn_state.values())

    def kept(self, layer: int, T: int) -> Tensor | None:
        """The mask of the T tokens that a layer reads now."""
        call = _thread.call
        return None if call is None or call.patch is not self else call.kept(layer, T)

    def run(
        self,
        *,
        layer: int,
        memory: inference.Memory,
        return_last_states: bool = True,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, head_first.States | None]:
        """One layer: h and the states, which are None where nobody has asked for them.
        transformers names its tensors query, igate, ...; mlstm_kernels q, i, ..."""
        q, k, v, i, f = (given[a] if a in given else given[b] for a, b in _NAMES)
        # Whoever calls this unpacks a pair, whatever the configuration says; with a cache there is
        # a state to be written into it.
        wanted = return_last_states or c_initial is not None
        states: Any = None if c_initial is None else (c_initial, n_initial, m_initial)
        keep = self.kept(layer, q.shape[2])
        return memory(q, k, v, i, f, states, keep, output_states=wanted)


class _Again:
    """A checkpointing function whose second computation, in whatever thread, belongs to the call of
    the first."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func

    def __call__(self, block: Callable[..., Any], *args: Any, **options: Any) -> Any:
        call = _thread.call

        def within_call(*x: Any, **y: Any) -> Any:
            before, _thread.call = _thread.call, call
            try:
                return block(*x, **y)
            finally:
                _thread.call = before

        return self.func(within_call, *args, **options)


_NAMES = (("query", "q"), ("key", "k"), ("value", "v"), ("igate", "i"), ("fgate", "f"))


def _cache_name(stack: Any) -> str:
    """What the stack calls its cache: "cache", up to transformers 5.23 "cache_params"."""
    return "cache" if "cache" in inspect.signature(stack.forward).parameters else "cache_params"


def _owner(hook: Any) -> Any:
    """The patch that a hook belongs to, or None."""
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, _Patch) else None


def _mask(mask: Tensor | None, B: int, T: int) -> Tensor | None:
    """(B, T) True for tokens that count. A longer mask ends with that of these tokens."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(
            f"attention_mask must be ({B}, {T}), 1 for tokens and 0 for padding, or longer when "
            f"its first part has been read before; got {tuple(mask.shape)}."
        )
    return mask[:, mask.shape[1] - T :].to(torch.bool)


def _is_readable(mask: Tensor) -> bool:
    """May the host look at its values?"""
    if torch.compiler.is_compiling() or mask.is_meta:
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _cache_type() -> Any:
    """Our cache, whose module needs transformers, which whoever has an xLSTM of it has."""
    return importlib.import_module("tfla.integrations.xlstm_cache").Cache
