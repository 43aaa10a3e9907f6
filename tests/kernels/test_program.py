"""The call is a Program: what one promises, how one is played on tensors, and that whatever is
played from the cache gives the bits of one that is made anew, in the interpreter; with tensors as
it wants them, and with addresses as compiled kernels do.
"""

import contextlib
import ctypes
import gc
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    from builds import DEVICES, call

    import tfla
    from tfla.kernels import planning, program, runtime
    from tfla.kernels.program import Program
    from tfla.programs import programs

    def test_programs_in_the_interpreter(interpret: Callable[[str], None]) -> None:
        interpret(__file__)

    CALLS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((1, 8192, 1, 128, 256), {}),
        ((1, 20000, 4, 128, 256), {"state": True}),
        ((1, 20000, 4, 64, 64), {"packed": 5}),
        ((1, 20000, 4, 64, 64), {"packed": 5, "state": True}),
        ((2, 500, 2, 256, 512), {"state": True, "dtype": torch.float32, "precision": "ieee"}),
        ((1, 30000, 2, 300, 520), {"dtype": torch.float32, "precision": "tf32"}),
        ((3, 70, 2, 48, 80), {"dtype": torch.float16}),
        ((2, 0, 2, 16, 16), {"state": True}),
    ]
    calls = pytest.mark.parametrize(("shape", "options"), CALLS, ids=str)
    gates = pytest.mark.parametrize("gate", ["exp", "sigmoid"])
    devices = pytest.mark.parametrize("device", [90, 80, 86], ids=str)

    def passes(shape: tuple[int, ...], device: int, **options: Any) -> list[Program]:
        found = programs(call(*shape, **options), DEVICES["cuda", device])
        assert found.backward is not None
        return [found.forward, found.backward]

    @calls
    @gates
    @devices
    def test_launches_read_what_was_written_and_update_nothing_of_the_callers(
        shape: tuple[int, ...], options: dict[str, Any], gate: str, device: int
    ) -> None:
        """And take whole buffers, in the order: read, updated in place, written."""
        for p in passes(shape, device, gate=gate, **options):
            known = set(p.inputs)
            for launch in p.launches:
                reads, updates, writes = (
                    {n for n in side if n is not None and 0 not in p.buffers[n].shape}
                    for side in (launch.reads, launch.updates, launch.writes)
                )
                assert reads | updates <= known, launch
                assert not writes & known, launch
                assert not updates & set(p.inputs)
                for n in updates:
                    spare = p.buffers[n].role in ("workspace", "saved")
                    # The caller's own are updated where nothing else would do: where tokens belong
                    # to no sequence, and a state that slices of a contraction make row by row.
                    assert spare or launch.label == "clear" or launch.parameters.numbers["first_a"]
                    assert not spare or p.buffers[n].elements == 1 + _size(p.buffers[n].shape)
                known |= writes
                names = [name for side in launch.parameters for name in side]
                assert names == launch.kernel.arg_names
            if shape[1]:
                assert {n for n in p.outputs if 0 not in p.buffers[n].shape} <= known

    def _size(shape: Sequence[int]) -> int:
        return torch.Size(shape).numel()

    @calls
    @gates
    def test_buffers_that_live_at_the_same_time_have_memory_of_their_own(
        shape: tuple[int, ...], options: dict[str, Any], gate: str
    ) -> None:
        for p in passes(shape, 90, gate=gate, **options):
            uses = p.workspace
            offsets, size = program.fit(uses)
            assert not set(uses) & {*p.inputs, *p.outputs}
            for a, b in itertools.combinations(uses, 2):
                (bytes_a, first_a, last_a), (bytes_b, first_b, last_b) = uses[a], uses[b]
                if last_a < first_b or last_b < first_a:
                    continue
                low, high = sorted([(offsets[a], bytes_a), (offsets[b], bytes_b)])
                assert low[0] + low[1] <= high[0] or not bytes_a or not bytes_b
            assert all(offsets[n] + uses[n][0] <= size for n in uses)

    def test_what_passes_lies_where_something_else_has_passed() -> None:
        uses = {1: (1000, 0, 1), 2: (600, 1, 2), 3: (700, 2, 3), 4: (300, 3, 3), 5: (0, 0, 3)}
        offsets, size = program.fit(uses)
        assert size == 1024 + 1024  # 1 beside 2, then 3 and 4 in the place of 1 and 2
        assert offsets[1] == offsets[3] and all(at % 512 == 0 for at in offsets.values())

    @calls
    @gates
    @pytest.mark.parametrize("device", [90, 80, 86, 100], ids=str)
    def test_the_size_of_what_is_saved_is_that_of_its_parts(
        shape: tuple[int, ...], options: dict[str, Any], gate: str, device: int
    ) -> None:
        """Which an operator's shapes in a graph are made of."""
        spec = call(*shape, gate=gate, **options)
        with planning.planned_for(DEVICES["cuda", device]):
            x = operands(spec)
            made: Any = torch.ops.tfla.forward(*x, *spec.options)[-1]
            saved = [b for b in passes(shape, device, gate=gate, **options)[0].buffers]
        parts = [b for b in saved if b.role == "saved"]
        assert made.numel() == sum(program.padded(_size(b.shape) + 1) for b in parts)

    def operands(spec: Any) -> list[Tensor | None]:
        """Without memory."""
        B, T, H, K, V, N = (getattr(spec, name) for name in ("B", "T", "H", "K", "V", "N"))

        def new(*size: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=of, device="meta")

        x = [new(B, T, H, D, of=spec.dtype) for D in (K, K, V)] + [new(B, T, H) for _ in "if"]
        C = new(N, H, K, V) if spec.initial_state else None
        n, m = (new(N, H, K), new(N, H)) if spec.normalize and C is not None else (None, None)
        return [*x, C, n, m, new(N + 1, of=torch.int32) if spec.packed else None]

    # ------------------------------------------------------------ played on tensors

    class Log:
        """In the place of kernels: notes how each is called."""

        def __init__(self) -> None:
            self.calls: list[tuple[int, int, list[int]]] = []

        def launch(self, *args: Any) -> Any:
            """Of the first time."""
            given = [x for x in args[4] if x is not None]
            self.calls.append((7, 0, [x.data_ptr() for x in given]))

            def run(stream: int, scratch: int, addresses: list[int]) -> None:
                self.calls.append((stream, scratch, addresses))

            run.scratch = 128  # type: ignore[attr-defined]
            return run

        def taken(self) -> list[tuple[int, int, list[int]]]:
            found, self.calls = self.calls, []
            return found

    @contextlib.contextmanager
    def watched() -> Iterator[Log]:
        """Calls on CPU tensors, planned as for a Hopper, that launch nothing."""
        log = Log()
        with contextlib.ExitStack() as stack:
            for name, value in (
                ("runtime._launch", log.launch),
                ("runtime._passes", {}),
                ("runtime._stream", lambda index: 7),
                ("planning._devices", {torch.device("cpu"): DEVICES["cuda", 90]}),
                ("planning._plans", {}),
            ):
                stack.enter_context(mock.patch(f"tfla.kernels.{name}", value))
            stack.enter_context(mock.patch("tfla.checks.why_not_triton", lambda q: None))
            yield log

    def run(shape: tuple[int, ...], gate: str, more: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """A call and its gradients; all its tensors."""
        B, T, H, K, V = shape
        N = 3 if "packed" in more else B

        def new(*size: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=of, requires_grad=True)

        q, k, v = (new(B, T, H, D, of=dtype) for D in (K, K, V))
        x = {"q": q, "k": k, "v": v, "i": new(B, T, H), "f": new(B, T, H)}
        cu_seqlens = torch.tensor([0, 5, 5, T]) if "packed" in more else None
        state = {}
        if "states" in more:
            state = {"C": new(N, H, K, V)}
            state |= {"n": new(N, H, K), "m": new(N, H)} if gate == "exp" else {}
        start = tfla.State(**{"n": None, "m": None} | state) if state else None
        h, end = tfla.mlstm(
            **x,
            input_gate=gate,  # type: ignore[arg-type]
            initial_state=start,
            output_final_state=bool(state),
            cu_seqlens=cu_seqlens,
            backend="triton",
        )
        outs = {"h": h} | ({} if end is None else {"C_T": end.C})
        cotangents = {f"d{name}": torch.ones_like(y) for name, y in outs.items()}
        leaves = x | state
        grads = torch.autograd.grad(
            list(outs.values()), list(leaves.values()), [*cotangents.values()]
        )
        named = zip(leaves, grads, strict=True)
        outs |= {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        return leaves | outs | cotangents | {f"d{name}": g for name, g in named}

    SHAPES = [(1, 8192, 1, 128, 256), (2, 200, 4, 128, 256), (1, 500, 2, 256, 512)]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("more", ["", "packed", "states", "packed, states"])
    @gates
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_a_program_is_played_with_the_addresses_of_the_call(
        shape: tuple[int, ...], gate: str, more: str, dtype: torch.dtype
    ) -> None:
        shape = (1, *shape[1:]) if "packed" in more else shape
        with watched() as log:
            run(shape, gate, more, dtype)
            first = log.taken()
            x = run(shape, gate, more, dtype)
            again = log.taken()
            both = [found for found in runtime._passes.values()]
        assert len(both) == 2 and len(first) == len(again) > 3
        launches = [(f.players[0], x) for f in both for x in f.programs[0].launches]
        bases: dict[int, int] = {}
        for (player, launch), (stream, scratch, addresses) in zip(launches, again, strict=True):
            assert stream == 7
            buffers = [n for n in launch.buffers if n is not None]
            assert len(buffers) == len(addresses)
            for n, address in zip(buffers, addresses, strict=True):
                buffer, part = player.program.buffers[n], player.parts[n]
                if buffer.role == "input" or buffer.role == "output" and buffer.name in x:
                    assert address == x[_tensor_of(buffer.name)].data_ptr() or buffer.name == "h"
                elif n in player.program.workspace:  # one allocation, scratch memory behind it
                    base = address - part.offset
                    assert bases.setdefault(id(player), base) == base
                    assert address + buffer.bytes <= base + player.size == scratch

    def _tensor_of(name: str) -> str:
        return {"dC": "dC_T"}.get(name, name)

    def test_another_layout_has_another_program() -> None:
        def one(*shape: int, **change: Any) -> None:
            x = [torch.zeros(*shape, D) for D in (16, 16, 16)] + [torch.zeros(shape)] * 2
            x = change.pop("of", lambda x: x)(x)
            tfla.mlstm(*x, backend="triton", **change)  # type: ignore[arg-type]

        changes: list[dict[str, Any]] = [
            {},
            {"scale": 0.5},
            {"normalize": False},
            {"output_final_state": True},
            {"cu_seqlens": torch.tensor([0, 40])},
            {"cu_seqlens": torch.tensor([0, 40], dtype=torch.int32)},
            {"cu_seqlens": torch.tensor([0, 9, 40, 9])[::2]},
            {"of": lambda x: [*x[:3], x[3].half(), x[4]]},
            {"of": lambda x: [*x[:3], torch.zeros(81)[1:].view(1, 40, 2), x[4]]},
            {"of": lambda x: [*x[:3], x[3].expand(1, 40, 2), torch.zeros(1).expand(1, 40, 2)]},
            {"of": lambda x: [torch.zeros(1, 2, 40, 16).transpose(1, 2), *x[1:]]},
        ]
        with watched():
            for turn in range(3):
                for n, change in enumerate(changes):
                    one(1, 40, 2, **change)
                    assert len(runtime._passes) == (len(changes) if turn else n + 1)

    def test_a_call_that_fails_is_made_anew() -> None:
        with watched() as log, mock.patch("tfla.kernels.gate_gradients", side_effect=ValueError):
            with pytest.raises(ValueError):
                run((1, 40, 1, 16, 16), "exp", "", torch.bfloat16)
            assert len(runtime._passes) == 1
            log.taken()
        with watched() as log:
            run((1, 40, 1, 16, 16), "exp", "", torch.bfloat16)
            assert len(runtime._passes) == 2 and log.taken()

    def test_a_program_keeps_no_tensor_alive() -> None:
        with watched():
            for _ in range(3):
                x = run((1, 40, 1, 16, 48), "exp", "states", torch.bfloat16)
                held = [weakref.ref(t) for t in x.values()]
                del x
                gc.collect()
                assert not any(ref() is not None for ref in held)

    def test_the_cache_is_bounded() -> None:
        with watched():
            full: Any = {(n,): None for n in range(2000)}
            runtime._passes.update(full)
            run((1, 40, 1, 16, 16), "exp", "", torch.bfloat16)
            assert len(runtime._passes) == 2

    @gates
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_graph_holds_for_every_length(gate: str, packed: bool) -> None:
        """Thirty of them in two frames, one for the first and one for all others: no size of what
        is saved, which a plan depends on, holds a graph to a range."""
        from torch._dynamo.testing import CompileCounterWithBackend

        def fn(*x: Tensor | None) -> Tensor:
            normalize = gate == "exp"
            options = (0.5, gate, True, normalize, False, True, "triton", "ieee")
            start = None, None, None
            return torch.ops.tfla.forward(*x[:5], *start, x[5], *options)[0].sin()

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(fn, backend=counter, fullgraph=True)
        g = torch.Generator().manual_seed(0)
        lengths = [int(2 + 10 ** (4.8 * torch.rand(1, generator=g).item())) for _ in range(30)]
        assert min(lengths) < 16 and max(lengths) > 16384  # plans of all kinds
        with planning.planned_for(DEVICES["cuda", 90]):
            for T in lengths:
                shapes = [(1, T, 4, D) for D in (64, 64, 128)]
                x = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes]
                x += [torch.empty(1, T, 4, device="meta") for _ in "if"]
                leaves = [t.requires_grad_() for t in x]
                cu = torch.empty(2 + T % 40, dtype=torch.int32, device="meta") if packed else None
                compiled(*leaves, cu).sum().backward()
                assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)
        assert counter.frame_count <= 3

else:
    import checks
    from test_interpreter import planned, pytestmark  # noqa: F401

    import tfla
    from tfla import kernels
    from tfla.kernels import gates, normalizer, runtime, weights

    one_thread = checks.one_thread

    class Watched:
        """A kernel that is compiled, as far as the host can see: it takes addresses."""

        def __init__(self, kernel: Any) -> None:
            self.kernel, self.arg_names, self.__name__ = kernel, kernel.arg_names, kernel.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                self.kernel[grid](*args, **options)
                tensors = {n: x.dtype for n, x in enumerate(args) if isinstance(x, Tensor)}
                kept = [None if n in tensors else x for n, x in enumerate(args)]

                def run(stream: int, scratch: int, addresses: Sequence[int]) -> None:
                    assert stream == 7
                    found = kept.copy()
                    for (n, dtype), address in zip(tensors.items(), addresses, strict=True):
                        assert address
                        found[n] = at(address, dtype)
                    self.kernel[grid](*found, **options)

                run.scratch = 0  # type: ignore[attr-defined]
                target = SimpleNamespace(backend="cuda")
                return SimpleNamespace(run=run, metadata=SimpleNamespace(target=target))

            return call

    def at(address: int, dtype: torch.dtype) -> Tensor:
        memory = (ctypes.c_char * dtype.itemsize).from_address(address)
        return torch.frombuffer(memory, dtype=dtype)

    @contextlib.contextmanager
    def cached(addresses: bool = False, **fields: object) -> Iterator[dict[Any, Any]]:
        """An empty cache of passes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(planned(**fields))  # type: ignore[arg-type]
            if addresses:
                stack.enter_context(mock.patch.object(runtime, "_stream", lambda index: 7))
                stack.enter_context(mock.patch.object(runtime, "_compiled", {}))
                packed = mock.patch.object(
                    runtime, "pack_launch", lambda compiled, *_: compiled.run
                )
                stack.enter_context(packed)
                for module in (kernels, gates, normalizer, weights):
                    for name, kernel in list(vars(module).items()):
                        if name.endswith("_kernel"):
                            stack.enter_context(mock.patch.object(module, name, Watched(kernel)))
            yield stack.enter_context(mock.patch.object(runtime, "_passes", {}))

    def problem(
        seed: int,
        T: int = 40,
        B: int = 1,
        H: int = 1,
        K: int = 12,
        V: int = 20,
        N: int = 0,
        dtype: torch.dtype = torch.float32,
        gate_dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """q, k, v, i, f, dh, and with N the state and its cotangent (C, n, m, dC, dn)."""
        g = torch.Generator().manual_seed(seed)

        def new(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=g).to(of)

        tokens = [new(B, T, H, D, of=dtype) for D in (K, K, V)]
        tokens += [new(B, T, H, of=gate_dtype), new(B, T, H, of=gate_dtype) + 2]
        tokens.append(new(B, T, H, V, of=dtype))
        if N:
            tokens += [new(N, H, K, V), new(N, H, K), new(N, H), new(N, H, K, V), new(N, H, K)]
        return tokens

    def results(x: list[Tensor], gate: str = "exp", **options: Any) -> list[Tensor]:
        """h, the final state and all gradients."""
        leaves = [t.detach().requires_grad_() for t in x[:5]]
        state, cotangents = None, [x[5]]
        if len(x) > 6:
            start = [t.detach().requires_grad_() for t in x[6 : 9 if gate == "exp" else 7]]
            leaves += start
            cotangents += x[9 : 11 if gate == "exp" else 10]
            state = tfla.State(*start) if gate == "exp" else tfla.State(*start, None, None)
        h, end = tfla.mlstm(
            *leaves[:5],
            input_gate=gate,
            initial_state=state,
            backend="triton",
            output_final_state=state is not None,
            **options,
        )
        out = [h] if end is None else [h, *(t for t in end[:2] if t is not None)]
        grads = torch.autograd.grad(out, leaves, cotangents)
        return [*out, *([] if end is None or end.m is None else [end.m]), *grads]

    def fresh(x: list[Tensor], gate: str = "exp", **options: Any) -> list[Tensor]:
        """By Programs that are made anew."""
        with mock.patch.object(runtime, "_passes", {}):
            return results(x, gate, **options)

    def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)

    OFFSETS = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
    SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "plain": ({"B": 2}, {}, {}),
        "segments, states": ({"N": 1}, {}, {"segment": 32}),
        "packed": ({}, {"cu_seqlens": OFFSETS}, {}),
        "packed, segments, states": ({"N": 3}, {"cu_seqlens": OFFSETS}, {"segment": 32}),
        "split": ({"K": 20, "V": 20}, {}, {"tile": {"block_a": 16}}),
        "split, segments, states": (
            {"K": 20, "V": 20, "N": 1},
            {},
            {"tile": {"block_a": 16}, "segment": 32},
        ),
        "half": ({"dtype": torch.float16, "gate_dtype": torch.float16}, {}, {}),
    }

    TENSORS = ("packed", "packed, segments, states")
    WAYS = [(shape, True) for shape in SHAPES] + [(shape, False) for shape in TENSORS]

    @pytest.mark.parametrize("gate", ["exp", "sigmoid"])
    @pytest.mark.parametrize(("shape", "addresses"), WAYS)
    def test_a_call_from_the_cache_is_a_fresh_one_bit_for_bit(
        shape: str, gate: str, addresses: bool
    ) -> None:
        sizes, options, fields = SHAPES[shape]
        with cached(addresses, **fields) as passes, checks.poisoned_buffers():
            x, y = (problem(seed, **sizes) for seed in (0, 1))
            results(x, gate, **options)
            assert len(passes) == 2
            assert all((f.players[0].steps is not None) == addresses for f in passes.values())
            same(results(y, gate, **options), fresh(y, gate, **options))
            assert len(passes) == 2

    def test_a_contraction_in_slices_is_a_whole_one() -> None:
        """With a state, kept ones and pieces: offsets of a slice reach all that has a row of it."""
        sizes, options, fields = SHAPES["split, segments, states"]
        x = problem(0, **sizes)
        with cached(**fields):
            slices = results(x, **options)
        with cached(segment=32):
            whole = results(x, **options)
        for a, b in zip(slices, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)

    def test_a_call_without_gradients_keeps_nothing_for_them() -> None:
        with cached() as passes:
            x = problem(0)
            with torch.inference_mode():
                tfla.mlstm(*x[:5], backend="triton")
            (found,) = passes.values()
            (program,) = found.programs
            assert [program.buffers[n].role for n in program.outputs] == ["output"]

    def test_a_loss_of_a_sum_has_other_strides() -> None:
        """dh is copied, as kernels know no strides of its last axis."""
        with cached() as passes:
            x = problem(0)
            x[5] = torch.full((), 0.5).expand(x[5].shape)
            dense = results([*x[:5], x[5].contiguous()])
            same(results(x), dense)
            assert [len(found.copies) for found in passes.values()] == [0, 0, 1]

    @pytest.mark.parametrize("addresses", [False, True], ids=["tensors", "addresses"])
    def test_inputs_may_share_memory_or_not(addresses: bool) -> None:
        with cached(addresses) as passes:
            for turn in range(3):
                x = problem(turn, K=16, V=16)
                if turn == 1:
                    x[1] = x[2] = x[0]
                    x[3] = x[4]
                same(results(x), fresh(x))
            assert len(passes) == 2
