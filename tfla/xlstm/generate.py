"""Generation: one call reads the prompts, then one step a token; the state is carried on.

A step with its sampling works on tensors that stay where they are and asks the device for nothing:
on a GPU it is recorded once as a CUDA graph and replayed, on a CPU it is called. Only `stop` makes
the host wait, for one bit a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import tfla
from tfla.linear import is_hooked
from tfla.spec import BackendName
from tfla.xlstm import files
from tfla.xlstm.arguments import integer, integers, is_whole, number, row_of, tensor_of

if TYPE_CHECKING:
    from tfla.xlstm.model import XLSTM

Prompts = Tensor | Sequence[Tensor | Sequence[int]]
States = tuple[tfla.State, ...]

PIECE = 2**17  # tokens read at once: longer prompts go in pieces, in the memory of one
RECORD = 8  # tokens still to come that make up for recording a CUDA graph


class Generation(NamedTuple):
    """What ``XLSTM.generate`` returns.

    Attributes:
        tokens: (B, n) int64, the new ones only. A row that samples a stop token repeats it to the
            end.
        lengths: (B,) int64, the number of new tokens of each row, its stop token included.
        state: one ``tfla.State`` a layer, which has read all but the last token of each row. So
            ``model.generate(out.tokens[:, -1:], more, state=out.state)`` goes on where this ended.
    """

    tokens: Tensor
    lengths: Tensor
    state: States


def generate(model: XLSTM, prompts: Prompts, max_new_tokens: int, **options: object) -> Generation:
    """Continue a batch of prompts until all have met a stop token, or by `max_new_tokens`.

    Arguments and errors: as for ``Stream``.

    Example:
        >>> import torch
        >>> from tfla.xlstm import XLSTM, XLSTMConfig
        >>> model = XLSTM(XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2))
        >>> out = model.generate([[1, 2, 3], [4]], 10, top_p=0.9, seed=0, stop=0)
        >>> texts = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths)]
    """
    stream = Stream(model, prompts, max_new_tokens, **options)  # type: ignore[arg-type]
    tokens = torch.stack(list(stream), 1)
    return Generation(tokens, stream.lengths, stream.state)


class Stream:
    """An iterator over new tokens, (B,) int64 at a time. The prompts are read when it is made.

    Args:
        model: the XLSTM.
        prompts: (B, T) token ids, or a list of B 1-d tensors (or lists of ints) of different
            lengths, which are read packed in one call.
        max_new_tokens: at least 1. Integers, here and below, may be Python's, NumPy's, or tensors.
        temperature, top_k, top_p: see ``sample``.
        seed: an int; or a torch.Generator on the model's device, to go on with its numbers; or None
            for torch's global one. A draw depends on its row in the batch.
        stop: a token id or several, a 1-d tensor of them too. A row that samples one is finished:
            it repeats the token, and its state stands still.
        state: what has been read before the prompts, B rows, or one row for all (a prefix read once
            and continued B times). It is not changed.
        state_dtype: of C and n while tokens are drawn; None: as they are computed, in fp32 (fp64);
            torch.bfloat16: half the bytes, which is what a step of a large batch waits for.
        backend: None, "reference" or "triton", for every call of the model.

    Attributes:
        last: (B,) int64, the newest tokens.
        finished: (B,) bool, the rows that have met a stop token.
        lengths: (B,) int64, the tokens of each row so far, its stop token included.
        state: one ``tfla.State`` a layer, which has read all but `last`. Like the others it is
            overwritten by the next token; ``take`` copies from it, to keep a branch.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        FloatingPointError: the model's logits are NaN or infinite, so there is nothing to sample
            from. On a GPU, where a look costs a wait, it is raised after the prompts, where `stop`
            waits anyway, and at the end.

    Example:
        >>> import torch
        >>> from tfla.xlstm import XLSTM, XLSTMConfig
        >>> model = XLSTM(XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2))
        >>> text = bytearray()
        >>> for token in model.stream([b"def "], 10, temperature=0.8, seed=0):
        ...     text.append(token.item())
    """

    @torch.no_grad()
    def __init__(
        self,
        model: XLSTM,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | torch.Generator | None = None,
        stop: int | Iterable[int] | None = None,
        state: Sequence[tfla.State] | None = None,
        state_dtype: torch.dtype | None = None,
        backend: BackendName | None = None,
    ) -> None:
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"state_dtype must be None or torch.bfloat16; got {state_dtype}.")
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 1, 2**63 - 1)
        temperature, top_k, top_p = _check_sampling(temperature, top_k, top_p)
        device = model.embedding.weight.device
        generator = _generator(seed, device)
        stops = [] if stop is None else integers("stop", stop)
        if beyond := [id for id in stops if not 0 <= id < model.config.vocab_size]:
            raise ValueError(
                f"stop must hold ids from 0 to {model.config.vocab_size - 1}; got {beyond}."
            )
        self._model, self._backend, self._left = model, backend, max_new_tokens
        self._sampling = (temperature, top_k, top_p, generator)
        self._stop = torch.tensor(stops, device=device) if stops else None
        self._logits: Tensor | None
        self._logits, self.state = prefill(model, prompts, state, backend)
        if state_dtype is not None:
            self.state = tuple(_cast(s, state_dtype) for s in self.state)
        B = self._logits.shape[0]
        self.last = torch.zeros(B, dtype=torch.int64, device=device)
        self.lengths = torch.zeros_like(self.last)
        self.finished = torch.zeros_like(self.last, dtype=torch.bool)
        self._broken = torch.zeros_like(self.finished)  # rows whose logits were no numbers
        self._note(self._logits)
        self._look()
        self._stepped = False
        # A hook runs when its module is called, not when a graph is replayed.
        self._called = any(is_hooked(module) for module in model.modules())
        self._graph: torch.cuda.CUDAGraph | None = None

    def __iter__(self) -> Stream:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self._left == 0 or (self._stop is not None and bool(self.finished.all())):
            raise StopIteration
        if self._logits is not None:  # of the prompts
            self._take(self._logits)
            self._logits = None
        elif (graph := self._recorded()) is not None:
            graph.replay()
        else:
            self._step()
            self._stepped = True
        self._left -= 1
        if self._stop is not None or self._left == 0 or self.last.device.type == "cpu":
            self._look()
        return self.last.clone()

    def _step(self) -> None:
        """Read `last` and sample what follows it."""
        active = None if self._stop is None else ~self.finished
        logits, self.state = self._model.step(
            self.last, self.state, inplace=True, active=active, backend=self._backend
        )
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        """Sample from (B, vocab), into the tensors that the next step starts from."""
        self._note(logits)
        token = sample(logits, *self._sampling)
        if self._stop is None:
            self.lengths.add_(1)
        else:
            token = torch.where(self.finished, self.last, token)
            self.lengths.add_(~self.finished)
            self.finished.logical_or_((token[:, None] == self._stop).any(-1))
        self.last.copy_(token)

    def _note(self, logits: Tensor) -> None:
        """Mark the rows whose largest logit is NaN or infinite, but for those that are finished."""
        self._broken.logical_or_(~torch.isfinite(logits.amax(-1)) & ~self.finished)

    def _look(self) -> None:
        """FloatingPointError when a row is marked; this waits for the device."""
        if bool(self._broken.any()):
            rows = self._broken.nonzero().flatten().tolist()
            self._left = 0
            raise FloatingPointError(
                f"the model's logits are not finite in rows {rows[:8]} of {len(self._broken)}; its "
                "weights or the state that it was given hold NaN or infinite numbers."
            )

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, on a GPU: recorded once a step has run, which leaves no kernel to be
        compiled, if enough tokens are to come."""
        device = self.last.device
        worth = self._stepped and self._left >= RECORD and not self._called
        if self._graph is None and device.type == "cuda" and worth:
            graph = torch.cuda.CUDAGraph()
            if (generator := self._sampling[-1]) is not None:
                graph.register_generator_state(generator)
            stream = torch.cuda.Stream(device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step()
            self._graph = graph
        return self._graph


@torch.no_grad()
def prefill(
    model: XLSTM,
    prompts: Prompts,
    state: Sequence[tfla.State] | None = None,
    backend: BackendName | None = None,
) -> tuple[Tensor, States]:
    """Read prompts in one call, without gradients.

    Args:
        model: the XLSTM.
        prompts: (B, T) token ids, or a list of B 1-d ones of different lengths, which are packed:
            there is no padding.
        state: what has been read before, B rows or one row for all; None: nothing. It is not
            changed.
        backend: None, "reference" or "triton", for ``tfla.mlstm``.

    Returns:
        logits: (B, vocab) fp32 (fp64 in an fp64 model) after the last token of each prompt; and the
        state there, one ``tfla.State`` of B rows a layer.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Example:
        >>> from tfla.xlstm import XLSTM, XLSTMConfig, prefill, sample
        >>> model = XLSTM(XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2))
        >>> logits, state = prefill(model, [[1, 2, 3], [4, 5]])
        >>> logits, state = model.step(sample(logits), state)
        >>> logits.shape
        torch.Size([2, 256])
    """
    device = model.embedding.weight.device
    tokens, lengths = _tokens(prompts, model.config.vocab_size)
    tokens = tokens.to(device, torch.int64)
    B = tokens.shape[0] if lengths is None else len(lengths)
    if state is not None:
        _check_states("state", state)
    full = torch.promote_types(model.embedding.weight.dtype, torch.float32)
    after = None if state is None else tuple(_spread(_cast(s, full), B) for s in state)
    options: dict[str, Any] = {"output_final_state": True, "backend": backend}
    if lengths is None:
        for piece in tokens.split(max(1, PIECE // B), 1):
            x, after = model.hidden(piece, after, **options)
        return model.logits(x[:, -1]), after  # type: ignore[return-value]
    ends = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(device)
    x, after = model.hidden(tokens, after, cu_seqlens=ends, **options)
    return model.logits(x[0, ends[1:] - 1]), after


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id per row, from softmax(logits / temperature) cut to its most likely part.

    Args:
        logits: (B, vocab), any floating dtype.
        temperature: 0 or more; 0 takes the most likely token, as does what 1 / temperature in fp32
            would overflow for (below 1.2e-38).
        top_k: keep the k most likely tokens (all of them when k exceeds the vocabulary).
        top_p: in (0, 1]; of these keep the fewest most likely whose probabilities sum to at least
            top_p (nucleus sampling, arXiv 1904.09751).
        generator: source of randomness on the device of logits; None: torch's global one.

    Returns:
        (B,) int64. Only tensor operations: no host synchronisation, capturable in a CUDA graph.
        For logits that are NaN the result means nothing.

    Raises:
        TypeError, ValueError: temperature, top_k or top_p is no number or is out of range.

    The draw is an exponential race: with E_j independent and exponential, argmax_j p_j / E_j is
    distributed as p.

    Example:
        >>> import torch
        >>> from tfla.xlstm import sample
        >>> sample(torch.tensor([[0.0, 5.0, 1.0]]), temperature=0)
        tensor([1])
    """
    temperature, top_k, top_p = _check_sampling(temperature, top_k, top_p)
    limits = torch.finfo(torch.float32)
    if temperature < limits.tiny:  # its inverse would be infinite, and 0 * inf is NaN
        return logits.argmax(-1)
    temperature = min(temperature, limits.max)
    logits = logits.float()
    kept, ids = logits, None
    # Of logits that are equal, as those of a 16-bit model often are, the lower id comes first.
    if top_k is not None:
        size = logits.shape[-1]
        order = logits.double() - torch.arange(size, device=logits.device) * 2.0**-40
        ids = order.topk(min(top_k, size)).indices
        kept = logits.gather(-1, ids)
    elif top_p is not None:
        kept, ids = logits.sort(descending=True, stable=True)
    p = ((kept - kept.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    race = torch.empty_like(p).exponential_(generator=generator)
    choice = (p / race.clamp_min_(torch.finfo(p.dtype).tiny)).argmax(-1, keepdim=True)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


def take(state: Sequence[tfla.State], rows: Tensor | Sequence[int]) -> States:
    """Copy some rows of a state: a branch, which stays as it is while the state goes on.

    Args:
        state: of a model, one ``tfla.State`` of N rows a layer.
        rows: (n,) integers from 0 to N - 1, a tensor or a sequence; repeated ones are copied again.

    Returns:
        One ``tfla.State`` of n rows a layer.

    Raises:
        TypeError, ValueError: `rows` are no integers, or are not rows of the state.

    Example:
        >>> from tfla.xlstm import XLSTM, XLSTMConfig, take
        >>> model = XLSTM(XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2))
        >>> take(model.init_state(8), [5, 5, 0])[0].C.shape
        torch.Size([3, 2, 16, 32])
    """
    _check_states("state", state)
    at = _rows(rows, state)
    return tuple(
        tfla.State(*(None if t is None else t[at] for t in one))  # type: ignore[arg-type]
        for one in state
    )


def put(state: Sequence[tfla.State], rows: Tensor | Sequence[int], new: States) -> None:
    """Overwrite some rows of a state in place; the other rows are neither moved nor read.

    A server admits sequences to its slots by this.

    Args:
        state: of a model, one ``tfla.State`` of N rows a layer; it is changed.
        rows: (n,) distinct integers from 0 to N - 1, a tensor or a sequence.
        new: the state of n sequences, or of one that is written to all n rows.

    Raises:
        TypeError, ValueError: before anything is written, when `rows` are not distinct rows of the
            state (tensors on a GPU are not read), or `new` has other layers or shapes.

    Example:
        >>> from tfla.xlstm import XLSTM, XLSTMConfig, prefill, put
        >>> model = XLSTM(XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2))
        >>> state = model.init_state(8)
        >>> put(state, [5, 0], prefill(model, [[1, 2, 3], [4]])[1])
    """
    _check_states("state", state)
    _check_states("new", new)
    at = _rows(rows, state)
    if len(new) != len(state):
        raise ValueError(f"new must have the {len(state)} layers of state; got {len(new)}.")
    if at.device.type == "cpu" and len(at.unique()) < len(at):
        raise ValueError(f"rows must be distinct; got {at.tolist()}.")
    for layer, (one, other) in enumerate(zip(state, new, strict=True)):
        for name, old, value in zip(one._fields, one, other, strict=True):
            if (old is None) != (value is None):
                kind = "no " if old is None else ""
                raise ValueError(
                    f"new[{layer}] must be of the kind of state[{layer}], which has {kind}{name}; "
                    f"got {'a tensor' if old is None else 'None'}."
                )
            if old is None or value is None:
                continue
            wanted = [(n, *old.shape[1:]) for n in dict.fromkeys((len(at), 1))]
            if tuple(value.shape) not in wanted:
                raise ValueError(
                    f"new[{layer}].{name} must be {' or '.join(map(str, wanted))}; got "
                    f"{tuple(value.shape)}."
                )
    for one, other in zip(state, new, strict=True):
        for old, value in zip(one, other, strict=True):
            if old is not None and value is not None:
                old[at] = value.to(old.device, old.dtype, copy=True)  # it may be a view of old


def save_state(state: Sequence[tfla.State], path: str | Path) -> None:
    """Write the state of a model to a safetensors file, which appears whole or not at all.

    Args:
        state: one ``tfla.State`` a layer. Layer 0 becomes the tensors "0.C", "0.n" and "0.m", in
            their dtypes.
        path: the file; another saved state there is replaced.

    Raises:
        FileExistsError: there is a file at `path` that is no saved state. It is left as it is.
        TypeError: `state` is no sequence of ``tfla.State``.

    Example:
        >>> from tfla.xlstm import XLSTM, XLSTMConfig, load_state, save_state
        >>> model = XLSTM(XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2))
        >>> save_state(model.init_state(1), "prefix.safetensors")         # doctest: +SKIP
        >>> state = load_state("prefix.safetensors")                      # doctest: +SKIP
    """
    from safetensors.torch import save_file

    _check_states("state", state)
    named = {
        f"{layer}.{name}": tensor.detach().cpu().contiguous()
        for layer, one in enumerate(state)
        for name, tensor in zip(one._fields, one, strict=True)
        if tensor is not None
    }
    try:
        with files.atomic_file(Path(path), _is_state) as half:
            save_file(named, half)
    except files.RunError as error:
        raise FileExistsError(
            f"{path} is not a state that was saved, so it is left as it is; name another file."
        ) from error


def load_state(path: str | Path, device: torch.device | str = "cpu") -> States:
    """Read a state that ``save_state`` has written.

    Args:
        path: the file.
        device: where to put the tensors.

    Returns:
        One ``tfla.State`` a layer, in the dtypes that were saved.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is damaged, or holds something other than a state.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        named = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); save the state again."
        ) from error
    layers = [
        tfla.State(named.pop(f"{n}.C"), named.pop(f"{n}.n", None), named.pop(f"{n}.m", None))
        for n in range(len(named))
        if f"{n}.C" in named
    ]
    whole = all(s.C.dim() == 4 and (s.n is None) == (s.m is None) for s in layers)
    whole = whole and all(s.n is None or (s.n.dim(), s.m.dim()) == (3, 2) for s in layers)  # type: ignore[union-attr]
    if named or not layers or not whole:
        raise ValueError(
            f"{path} does not hold a state: its tensors should be 0.C, 0.n, 0.m, 1.C and so on."
        )
    return tuple(layers)


def _tokens(prompts: Any, vocab_size: int) -> tuple[Tensor, list[int] | None]:
    """Token ids (B, T) and None; or, for a list, (1, sum of T) and the length of each prompt."""
    form = "prompts must be (B, T) token ids or a list of prompts, each 1-d"
    if isinstance(prompts, (str, bytes, bytearray)):
        raise TypeError(f"{form}; got a single {type(prompts).__name__}. One prompt is [prompts].")
    if not isinstance(prompts, Tensor) and hasattr(prompts, "__array__"):
        prompts = tensor_of("prompts", prompts)
    if isinstance(prompts, Tensor):
        if not is_whole(prompts):
            raise TypeError(f"prompts must be integer token ids; got {prompts.dtype}.")
        tokens, lengths = prompts.to(torch.int64), None
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(
                "prompts must be (B, T), B and T at least 1, or a list of 1-d tensors; got "
                f"{tuple(tokens.shape)}. One prompt is prompts[None]."
            )
    else:
        if not isinstance(prompts, Sequence):
            raise TypeError(f"{form}; got {type(prompts).__name__}.")
        given, rows = list(prompts), []
        for index, one in enumerate(given):
            name = f"prompts[{index}]"
            if not isinstance(one, Tensor) and not hasattr(one, "__len__"):
                raise TypeError(f"{form}; got {one!r} as {name}. One prompt is [prompts].")
            row = row_of(name, one)
            if row.numel() == 0:
                raise ValueError(f"{name} must be 1-d with at least one token; got {one!r}.")
            rows.append(row)
        if not rows:
            raise ValueError("prompts must hold at least one prompt; got an empty list.")
        tokens, lengths = torch.cat([row.to(rows[0].device) for row in rows])[None], None
        if len(rows) > 1:
            lengths = [row.numel() for row in rows]
    if tokens.device.type == "cpu":  # elsewhere the look would cost a synchronisation
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"prompts must hold ids from 0 to {vocab_size - 1}; got ids from {low} to {high}."
            )
    return tokens, lengths


def _spread(state: tfla.State, B: int) -> tfla.State:
    """A state of one row as one of B rows, without copying; any other as it is."""
    if state.C.shape[0] != 1:
        return state
    return tfla.State(*(None if t is None else t.expand(B, *t.shape[1:]) for t in state))  # type: ignore[arg-type]


def _cast(state: tfla.State, dtype: torch.dtype) -> tfla.State:
    """C and n in another dtype; m as it is."""
    return tfla.State(state.C.to(dtype), None if state.n is None else state.n.to(dtype), state.m)


def _check_states(name: str, states: Any) -> None:
    """TypeError unless these are states, one a layer."""
    if not isinstance(states, Sequence) or isinstance(states, (str, bytes, tfla.State)):
        raise TypeError(f"{name} must be a tfla.State for each layer; got {type(states).__name__}.")
    for layer, one in enumerate(states):
        if not isinstance(one, tfla.State) or not isinstance(one.C, Tensor) or one.C.dim() != 4:
            kind = "another State" if isinstance(one, tfla.State) else type(one).__name__
            raise TypeError(
                f"{name}[{layer}] must be a tfla.State with C (N, H, K, V); got {kind}."
            )


def _rows(rows: Any, state: Sequence[tfla.State]) -> Tensor:
    """Numbers of rows as a tensor (n,); they are looked at where the host has them."""
    at = row_of("rows", rows)
    count = min((one.C.shape[0] for one in state), default=0)
    if at.device.type == "cpu" and (beyond := at[(at < 0) | (at >= count)]).numel():
        raise ValueError(f"rows must be from 0 to {count - 1}; got {beyond.tolist()}.")
    return at


def _generator(seed: Any, device: torch.device) -> torch.Generator | None:
    """Where a stream's random numbers come from; None: torch's global generator."""
    if seed is None:
        return None
    if isinstance(seed, torch.Generator):
        if seed.device.type != device.type:
            raise ValueError(
                f"seed must be a generator on {device}, where the model is; got one on "
                f"{seed.device}."
            )
        return seed
    try:
        value = integer("seed", seed, -(2**63), 2**64 - 1)
    except TypeError:
        raise TypeError(
            f"seed must be an integer, a torch.Generator or None; got {seed!r}."
        ) from None
    return torch.Generator(device).manual_seed(value)


def _is_state(path: Path) -> bool:
    """Whether `path` is a file that ``save_state`` wrote."""
    try:
        load_state(path)
    except (ValueError, OSError):
        return False
    return True


def _check_sampling(
    temperature: Any, top_k: Any, top_p: Any
) -> tuple[float, int | None, float | None]:
    """The three as Python's numbers, or an error that names the one that is out of range."""
    temperature = number("temperature", temperature)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and at least 0; got {temperature}.")
    if top_k is not None:
        try:
            top_k = integer("top_k", top_k, 1, 2**63 - 1)
        except ValueError:
            raise ValueError(
                f"top_k must be at least 1, or None to keep all tokens; got {top_k}."
            ) from None
    if top_p is not None:
        top_p = number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], or None to keep all tokens; got {top_p}.")
    return temperature, top_k, top_p
