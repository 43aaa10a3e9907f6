"""Training on many processes, under torchrun: a mesh of (data, context), and shards of the model.

    data       each rank of it trains on its own rows of a batch
    context    each rank of it reads its own part of every row; see ``tfla.mlstm``, `group`

Parameters, gradients and moments are sharded over all ranks (FSDP2); in bf16 runs the matrices of
a block travel in bf16 and come back summed in fp32, everything else, the gates among it, stays in
fp32. Every rank reads the windows that are its own from the corpus, which all must see, as they
must see --out. Rank 0 talks; each rank writes and reads its own part of a checkpoint, through
torch.distributed.checkpoint, whoever wrote it: any number of them goes on, one process too. The
model and the loop know nothing of all this.

Whoever waits for a rank that is gone gives up after MINUTES; a rank that was killed is noticed at
once by most of the others, and by torchrun, which ends them all.
"""

import functools
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.utils.checkpoint import checkpoint as recompute

from tfla import _compat
from tfla.signals import Interrupted
from tfla.xlstm import checkpoint, files
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.data import open_corpus
from tfla.xlstm.model import XLSTM
from tfla.xlstm.run import Run
from tfla.xlstm.train import (
    MOMENTS,
    Placement,
    Record,
    TrainState,
    autocast,
    check_moments,
    initial,
)

MINUTES = 10
LAST_WORDS = 2.0  # seconds in which rank 0, when it lives, says that another one is lost
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def join(given: Mapping[str, str], problem: str | None = None, minutes: float = MINUTES) -> None:
    """Meet the other ranks, before any group or mesh is made, and compare with rank 0's options.

    given: this rank's options, as they are named on the command line. problem: why this rank cannot
    go on. Where a rank has a problem or other options, rank 0 raises RunError and the others end
    silently; where rank 0 is gone, too.
    """
    limit = timedelta(minutes=minutes)
    store, rank, world = _rendezvous(limit)
    own = json.dumps([problem, dict(given)])
    try:
        if rank:
            store.set(f"tfla/given/{rank}", own)
            store.wait(["tfla/verdict"], limit)
            verdict = store.get("tfla/verdict").decode()
        else:
            verdict = problem or ""
            for other in range(1, world):
                if not verdict:
                    key = f"tfla/given/{other}"
                    store.wait([key], limit)
                    verdict = _difference(given, other, json.loads(store.get(key)))
            store.set("tfla/verdict", verdict.encode("utf-8", "replace").decode())
    except (RuntimeError, ValueError) as error:  # torch's errors of a store
        if rank:
            raise SystemExit(2) from None
        raise RunError(
            f"not all of the {world} processes of this run came within {minutes:g} minutes "
            f"({_line(error)}); start them with torchrun, all with the same options"
        ) from error
    if verdict:
        raise SystemExit(2) if rank else RunError(verdict)


def _rendezvous(limit: timedelta) -> tuple[Any, int, int]:
    """The store, this rank, and how many there are; RunError unless torchrun has said."""
    global _met
    try:
        if _met is None:
            _met = next(dist.rendezvous("env://", timeout=limit))
    except (ValueError, RuntimeError) as error:
        raise RunError(
            f"the processes of this run do not find each other ({_line(error)}); start them "
            "with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from error
    return _met


_met: tuple[Any, int, int] | None = None  # the store has one server, of which one port is


def _difference(given: Mapping[str, str], other: int, said: Any) -> str:
    """What rank `other` was told otherwise than rank 0, or its problem; "" is neither."""
    problem, options = said
    if problem:
        return f"rank {other}: {problem}"
    for name in sorted(given.keys() | options.keys()):
        if given.get(name) != options.get(name):
            option = name if name in ("paths", "version") else f"--{name.replace('_', '-')}"
            return (
                f"{option} is {given.get(name)} on rank 0 and {options.get(name)} on rank {other}; "
                "start all processes with the same options"
            )
    return ""


class Ranks(Placement):
    """This process as one of those that torchrun started.

    context_ranks: processes that share a sequence. recompute: keep only the inputs of blocks for
    the backward pass, and compute the rest again. compile: a block, between the hooks that gather
    its matrices. RunError: no rendezvous, or numbers that do not fit.
    """

    drawn_on: torch.device | str = "cpu"  # the same numbers as in a run of one process

    def __init__(
        self,
        device: torch.device | str,
        context_ranks: int = 1,
        recompute: bool = False,
        compile: bool = False,
        minutes: float = MINUTES,
    ) -> None:
        global _met
        self.store: Any = None  # of this job, where this object made its process group
        device = torch.device(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        super().__init__(device, compile)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            if not dist.is_initialized():
                limit = timedelta(minutes=minutes)
                (store, rank, world), _met = _rendezvous(limit), None
                # torchrun may give a restarted job the store of the one before (2.13): ranks would
                # look for each other where dead ones were.
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                self.store = store = dist.PrefixStore(f"attempt {attempt}", store)
                dist.init_process_group(
                    backend, timeout=limit, world_size=world, rank=rank, store=store
                )
        except (ValueError, RuntimeError) as error:
            raise RunError(
                f"the processes of this run do not find each other ({_line(error)}); start them "
                "with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            ) from error
        rank, world = dist.get_rank(), dist.get_world_size()
        self.main, self.recompute, self.minutes = rank == 0, recompute, minutes
        if context_ranks < 1 or world % context_ranks:
            self.refuse(
                f"--context-ranks is {context_ranks}; it must be a divisor of {world} ranks"
            )
        self.rows, self.row = world // context_ranks, rank // context_ranks
        self.part = (rank % context_ranks, context_ranks)
        kind = device.type
        self.ranks = dist.init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        mesh = dist.init_device_mesh(
            kind, (self.rows, context_ranks), mesh_dim_names=("data", "context")
        )
        self.context = mesh.get_group("context") if context_ranks > 1 else None
        self.files = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
        self.writing: Any = None  # the future of a checkpoint

    def refuse(self, message: str | None) -> None:
        """RunError on rank 0, a silent end elsewhere, if there is a message on any rank."""
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, message)
        found = next(filter(None, said), None)
        if found is not None:
            raise RunError(found) if self.main else SystemExit(2)

    def share(self, make: Callable[[], Run]) -> Run:
        """The run that rank 0 makes, on all ranks."""
        message: str | None = None
        made: list[Any] = [None]
        run: Any = None
        if self.main:
            try:
                run = make()
                saved = run.saved and (run.saved.path, run.saved.meta)
                same = run.config, run.options, run.position, run.init, run.weights
                made = [(run.folder, run.corpus.fingerprint, saved, same)]
            except (RunError, OSError) as error:
                message = str(error)
        self.refuse(message)
        dist.broadcast_object_list(made)
        folder, fingerprint, saved, (config, options, position, init, weights) = made[0]
        if run is None:
            try:
                corpus = open_corpus(folder / "data", fingerprint)
                found = saved and checkpoint.opened(*saved)
                run = Run(folder, corpus, config, options, found, position, (), init, weights)
            except (RunError, OSError) as error:
                message = f"rank {dist.get_rank()}: {error}"
        if options.batch % self.rows:
            message = (
                f"--batch is {options.batch}; it must be a multiple of the {self.rows} data ranks"
            )
        elif options.context % self.part[1]:
            message = f"--context is {options.context}; it must be a multiple of --context-ranks"
        try:
            self.refuse(message)
        except BaseException:
            if run is not None and run.lock is not None:  # rank 0 has it, for all
                run.lock.release()
            raise
        return run

    @contextmanager
    def together(self) -> Iterator[None]:
        """Rank 0 says in one line what ended the run, a lost rank too; the others end silently.
        Where rank 0 is the one that is lost, another says so."""
        try:
            yield
        except RunError as error:
            raise error if self.main else SystemExit(2) from None
        except RuntimeError as error:
            words = ("gloo", "NCCL", "onnection", "imed out", "Broken pipe")
            lost = isinstance(error, dist.DistError) or any(w in str(error) for w in words)
            if not lost:
                raise
            if not self._speaks():
                os._exit(1)  # communicators of a job that is dead may wait for ever
            raise RunError(
                f"a process of this run has ended, or did not answer for {self.minutes:g} minutes "
                f"({_line(error)}); go on from the last checkpoint with --resume"
            ) from error
        dist.destroy_process_group()

    def _speaks(self) -> bool:
        """Whether this rank is to say that one is lost: rank 0, or the first of the others that
        hears nothing of it for LAST_WORDS seconds."""
        try:
            with suppress(Interrupted):  # torchrun ends all of them once it has noticed
                until = time.monotonic() + (0.0 if self.main else LAST_WORDS)
                while time.monotonic() < until and not self.store.check(["tfla/said"]):
                    time.sleep(0.05)
            return self.store.add("tfla/said", 1) == 1
        except (RuntimeError, AttributeError):  # the store went with rank 0, or is another's
            return self.main or dist.get_rank() == 1

    def build(self, config: XLSTMConfig, precision: str, weights: Path | None = None) -> nn.Module:
        tied = config.tie_embeddings  # what is shared must be made as it is
        if self.main or tied:
            model = initial(config, weights, self.drawn_on)
        else:
            with torch.device("meta"):
                model = XLSTM(config)
        whole: Any = {n: p.detach() for n, p in model.named_parameters()} if self.main else {}
        with autocast(precision, self.device):
            low = torch.is_autocast_enabled(self.device.type)
        policy = MixedPrecisionPolicy(
            torch.bfloat16 if low else None, torch.float32 if low else None, None, False
        )
        # Matrices that were gathered stay until their gradients are there, unless memory is short.
        shard = functools.partial(
            fully_shard, mesh=self.ranks, reshard_after_forward=self.recompute, mp_policy=policy
        )
        blocks: Any = model.blocks
        for block in blocks:
            if self.compile:  # one graph, which all blocks share; hooks stay outside
                block.forward = torch.compile(block.forward)
            if self.recompute:
                block.forward = functools.partial(
                    recompute,
                    block.forward,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    early_stop=False,
                )
            layer, ffn = block.mlstm, block.ffn
            matrices = {m.weight for m in (layer.qkvo, layer.out, ffn.up, ffn.down)}
            shard(block, ignored_params=set(block.parameters()) - matrices)
            if self.context is not None:
                block.register_forward_pre_hook(self._join, with_kwargs=True)
        for block, behind in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([behind])
        if not tied:
            shard(model.head)
        few = {p for p in model.parameters() if not isinstance(p, DTensor)}  # norms and gates
        fully_shard(model, mesh=self.ranks, ignored_params=few - {model.embedding.weight})
        register_fsdp_forward_method(model, "hidden")
        if tied:
            return model.to(self.device)
        model.to_empty(device=self.device)
        set_model_state_dict(model, whole, options=SPREAD)
        return model

    def _join(self, module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        """What is learnt from is split; what is evaluated, every rank reads in whole."""
        return args, options | {"group": self.context} if torch.is_grad_enabled() else options

    def elapsed(self, seconds: float) -> float:
        clock = torch.tensor(seconds, dtype=torch.float64, device="cpu")
        dist.broadcast(clock, 0)
        return clock.item()

    def largest(self, values: list[int]) -> list[int]:
        shared = torch.tensor(values, device="cpu")
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def own(self, x: Any) -> Tensor:
        return x.detach().to_local() if hasattr(x, "to_local") else x

    @torch.no_grad()
    def clip(self, state: TrainState, loss: Tensor, largest: float) -> Tensor:
        """Two collectives: gradients of what every rank holds, with the loss; the norm's square."""
        shards, copies = [loss.new_zeros(1)], [loss]
        for name, x in state.own.items():
            p: Any = state.parameters[name]
            x.grad = self.own(p.grad)
            (copies if p is x else shards).append(x.grad)
        mean = torch.cat([x.flatten() for x in copies]) / dist.get_world_size()
        dist.all_reduce(mean)
        parts = mean.split([x.numel() for x in copies])
        means = [part.view_as(x) for part, x in zip(parts, copies, strict=True)]
        _compat.copy_each(copies[1:], means[1:])
        square = nn.utils.get_total_norm(shards).square()
        dist.all_reduce(square)
        norm = (square + mean[1:].square().sum()).sqrt()
        nn.utils.clip_grads_with_norm_(state.own.values(), largest, norm)
        return torch.stack([mean[0], norm])

    def save(self, run: Path, meta: Record, state: TrainState, texts: dict[str, str]) -> None:
        """Each rank writes what it holds, from a copy and while training goes on; then rank 0 makes
        a checkpoint of the files."""
        self.finish()
        tensors: dict[str, Tensor] = {n: p.detach() for n, p in state.parameters.items()}
        for key, x in state.moments().items():
            like: Any = state.parameters.get(key.rpartition("/")[0])
            if isinstance(like, DTensor) and x.dim():
                whole: Any = {"shape": like.shape, "stride": like.stride(), "run_check": False}
                x = DTensor.from_local(x, like.device_mesh, like.placements, **whole)
            tensors[key] = x
        save = functools.partial(checkpoint.save, run, meta, {}, texts)
        shards = run / "checkpoints" / f".shards-{meta['step']:08d}.tmp"
        self.writing = dcp.async_save(
            tensors,
            storage_writer=_Shards(shards, state.parameters, save),
            process_group=self.files,
        )

    def finish(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            try:
                writing.result()
            except dcp.CheckpointException as error:
                rank, (cause, _) = next(iter(error.failures.items()))
                raise RunError(f"rank {rank} wrote no checkpoint: {cause}") from error

    def load(self, saved: checkpoint.Checkpoint, state: TrainState) -> None:
        """Each rank reads what it holds, whoever wrote it, from the files that are listed."""
        wanted: dict[str, Any] = {n: p.detach() for n, p in state.parameters.items()}
        own = {name: (p.shape, p.dtype) for name, p in wanted.items()}
        moments: dict[str, Any] = {}
        message, reader = None, _Listed(saved)
        try:
            kept = reader.described()
            weights = {name: x for name, x in kept.items() if name in reader.weights}
            others = {name: x for name, x in kept.items() if name not in reader.weights}
            floating: Any = {name: (shape, None) for name, (shape, _) in own.items()}
            checkpoint.check_tensors(saved.path, floating, weights)
            check_moments(saved, own, others)
            for key, (size, dtype) in others.items():
                like: Any = state.parameters.get(key.rpartition("/")[0])
                whole = like is None or like.shape != size
                empty = torch.empty(size if whole else (), dtype=dtype, device="cpu")
                moments[key] = empty if whole else torch.zeros_like(like)
        except RunError as error:
            message = str(error)
        self.refuse(message)
        dcp.load(wanted | moments, storage_reader=reader, process_group=self.files)
        mine = ((name, self.own(x)) for name, x in wanted.items())
        checkpoint.warn_unless_finite(saved.path, mine)
        try:
            state.restore_moments(saved, {name: self.own(x) for name, x in moments.items()})
        except RunError as error:
            message = str(error)
        self.refuse(message)


class _ListedFiles(FileSystem):
    """The file system as far as a checkpoint lists it."""

    def __init__(self, parts: list[Path]) -> None:
        self.parts = parts

    def ls(self, path: Any) -> list[str]:
        return [str(part) for part in self.parts]


class _Listed(HuggingFaceStorageReader):
    """Reads the files that a checkpoint lists, and no other that lies beside them."""

    def __init__(self, saved: checkpoint.Checkpoint) -> None:
        super().__init__(str(saved.path))
        self.saved, self.weights = saved, set[str]()
        self.fs = _ListedFiles([])

    def described(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor in whole. RunError unless its shards are rows, one below
        the other, without gaps."""
        found: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for name in ("model", "optimizer"):
            self.fs = _ListedFiles(self.saved.parts(name))
            try:
                tensors: Any = super().read_metadata().state_dict_metadata
            except Exception as error:  # of safetensors, of JSON, of what is missing in it
                raise RunError(f"{self.saved.path}: {name} cannot be read: {error}") from error
            for key, x in tensors.items():
                rows = 0
                for chunk in sorted(x.chunks, key=lambda chunk: tuple(chunk.offsets)):
                    begin = (rows, *(0 for _ in x.size[1:])) if x.size else ()
                    if tuple(chunk.offsets) != begin or chunk.sizes[1:] != x.size[1:]:
                        raise RunError(f"{self.saved.path}: the shards of {key} leave gaps")
                    rows += chunk.sizes[0] if x.size else 0
                if key in found:
                    raise RunError(f"{self.saved.path} holds {key} twice")
                found[key] = x.size, x.properties.dtype
            if name == "model":
                self.weights = set(tensors)
        self.fs = _ListedFiles([*self.saved.parts("model"), *self.saved.parts("optimizer")])
        return found


class _Shards(HuggingFaceStorageWriter):
    """Files of `folder` that all ranks write, model-00000.safetensors and so on; `save` is called
    on rank 0 with their seals once all are there."""

    def __init__(self, folder: Path, names: Iterable[str], save: Callable[..., object]) -> None:
        where = {"random/cpu": 2, "random/cuda": 2}
        for name in names:
            where |= {name: 1} | {f"{name}/{moment}": 2 for moment in MOMENTS}
        super().__init__(str(folder), where, save_distributed=True)
        self.folder, self.save = folder, save

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan  # the folder is made once, for all ranks

    def prepare_global_plan(self, plans: Any) -> Any:
        files.partial_folder(self.folder)  # on rank 0; nobody writes before
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        seals, written = {}, super().write_data(plan, planner).wait()
        for file in sorted({result.storage_data.relative_path for result in written}):
            # A file's name is shard-00001-model-00002-of-00002.safetensors.
            shard, index = map(int, re.findall(r"\d+", file)[:2])
            path = self.folder / f"{('model', 'optimizer')[index - 1]}-{shard - 1:05d}.safetensors"
            (self.folder / file).rename(path)
            seals[path] = checkpoint.seal(path)
        done: Future[Any] = Future()
        done.set_result(seals)
        return done

    def finish(self, metadata: Any, results: list[Any]) -> None:
        self.save(shards={path: seal for seals in results for path, seal in seals.items()})
        files.remove_partial(self.folder)


def _line(error: BaseException) -> str:
    words = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\] *", "", words)[:120].rstrip(".")
