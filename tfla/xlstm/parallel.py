"""Training on many processes, under torchrun: a mesh of (data, context), and shards of the model.

    data       each rank of it trains on its own rows of a batch
    context    each rank of it reads its own part of every row; see ``tfla.mlstm``, `group`

Parameters, gradients and moments are sharded over all ranks (FSDP2); in bf16 runs the matrices of
a block travel in bf16 and come back summed in fp32, everything else, the gates among it, stays in
fp32. Every rank reads the windows that are its own from the corpus, which all must see, as they
must see --out. Rank 0 talks and writes: checkpoints are those of one process, whatever the number
of ranks, so any number of them goes on. The model and the loop know nothing of all this.

Whoever waits for a rank that is gone gives up after MINUTES; a rank that was killed is noticed at
once by most of the others, and by torchrun, which ends them all.
"""

import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as recompute

from tfla.xlstm import checkpoint
from tfla.xlstm.checkpoint import RunError
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.data import open_corpus
from tfla.xlstm.model import XLSTM
from tfla.xlstm.run import Run
from tfla.xlstm.train import Placement, Record, TrainState, autocast

MINUTES = 10
SPREAD = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Ranks(Placement):
    """This process as one of those that torchrun started.

    context_ranks: processes that share a sequence. recompute: keep only the inputs of blocks for
    the backward pass, and compute the rest again. RunError: no rendezvous, or numbers that do not
    fit.
    """

    drawn_on: torch.device | str = "cpu"  # the same numbers as in a run of one process

    def __init__(
        self, device: torch.device | str, context_ranks: int = 1, recompute: bool = False,
        minutes: float = MINUTES,
    ) -> None:  # fmt: skip
        device = torch.device(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        super().__init__(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            if not dist.is_initialized():
                limit = timedelta(minutes=minutes)
                store, rank, world = next(dist.rendezvous("env://", timeout=limit))
                # torchrun may give a restarted job the store of the one before (2.13): ranks would
                # look for each other where dead ones were.
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"attempt {attempt}", store)
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
            self.refuse(f"--context-ranks is {context_ranks}, wanted a divisor of {world} ranks")
        self.rows, self.row = world // context_ranks, rank // context_ranks
        self.part = (rank % context_ranks, context_ranks)
        kind = device.type
        self.ranks = dist.init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        mesh = dist.init_device_mesh(
            kind, (self.rows, context_ranks), mesh_dim_names=("data", "context")
        )
        self.context = mesh.get_group("context") if context_ranks > 1 else None
        self.split = True
        self.writing: threading.Thread | None = None
        self.failed: list[BaseException] = []

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
                made = [(run.folder, run.corpus.fingerprint, run.config, run.options, saved)]
            except (RunError, OSError) as error:
                message = str(error)
        self.refuse(message)
        dist.broadcast_object_list(made)
        folder, fingerprint, config, options, saved = made[0]
        if run is None:
            try:
                corpus = open_corpus(folder / "data", fingerprint)
                found = saved and checkpoint.Checkpoint(*saved)
                run = Run(folder, corpus, config, options, found)
            except (RunError, OSError) as error:
                message = f"rank {dist.get_rank()}: {error}"
        if options.batch % self.rows:
            message = f"--batch is {options.batch}, wanted a multiple of the {self.rows} data ranks"
        elif options.context % self.part[1]:
            message = f"--context is {options.context}, wanted a multiple of --context-ranks"
        self.refuse(message)
        return run

    @contextmanager
    def together(self) -> Iterator[None]:
        """Rank 0 says in one line what ended the run, a lost rank too; the others end silently."""
        try:
            yield
        except RunError as error:
            raise error if self.main else SystemExit(2) from None
        except RuntimeError as error:
            words = ("gloo", "NCCL", "onnection", "imed out", "Broken pipe")
            lost = isinstance(error, dist.DistError) or any(w in str(error) for w in words)
            if not lost:
                raise
            if not self.main:
                os._exit(1)  # communicators of a job that is dead may wait for ever
            raise RunError(
                f"a process of this run has ended, or did not answer for {self.minutes:g} minutes "
                f"({_line(error)}); go on from the last checkpoint with --resume"
            ) from error
        dist.destroy_process_group()

    def build(self, config: XLSTMConfig, precision: str) -> nn.Module:
        tied = config.tie_embeddings  # what is shared must be made as it is
        with torch.device(self.drawn_on if self.main or tied else "meta"):
            model = XLSTM(config)
        whole: Any = {n: p.detach() for n, p in model.named_parameters()} if self.main else {}
        with autocast(precision, self.device):
            low = torch.is_autocast_enabled(self.device.type)
        policy = MixedPrecisionPolicy(
            torch.bfloat16 if low else None, torch.float32 if low else None, None, False
        )
        shard = functools.partial(fully_shard, mesh=self.ranks)
        blocks: Any = model.blocks
        for block in blocks:
            layer, ffn = block.mlstm, block.ffn
            shard([layer.qkvo, layer.out, ffn.up, ffn.down], mp_policy=policy)
            if self.context is not None:
                layer.register_forward_pre_hook(self._join, with_kwargs=True)
            if self.recompute:
                block.forward = functools.partial(
                    recompute, block.forward, use_reentrant=False, preserve_rng_state=False,
                    early_stop=False,
                )  # fmt: skip
        if not tied:
            shard(model.head, mp_policy=policy)
        shard(model)  # the rest: embedding, norms, gates
        register_fsdp_forward_method(model, "hidden")
        if tied:
            return model.to(self.device)
        model.to_empty(device=self.device)
        dcp.set_model_state_dict(model, whole, options=SPREAD)
        return model

    def _join(self, module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        return args, options | {"group": self.context} if self.split else options

    @contextmanager
    def whole(self) -> Iterator[None]:
        self.split = False
        try:
            yield
        finally:
            self.split = True

    def elapsed(self, seconds: float) -> float:
        clock = torch.tensor(seconds, dtype=torch.float64)
        dist.broadcast(clock, 0)
        return clock.item()

    def mean(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value / dist.get_world_size()

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
        norm = super().clip(parameters, largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def save(self, run: Path, meta: Record, state: TrainState, texts: dict[str, str]) -> None:
        """Gathers on rank 0, which writes while training goes on."""
        self.finish()
        tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        named: Any = {"model": dict(state.model.named_parameters()), "optimizer": state.moments()}
        for file, group in named.items():
            for name, x in group.items():
                x = x.full_tensor() if isinstance(x, DTensor) else x
                if self.main:  # a copy, whatever the device: training goes on
                    tensors[file][name] = x.detach().to("cpu", copy=True)
        if not self.main:
            return

        def write() -> None:
            try:
                checkpoint.save(run, meta, tensors, texts)
            except BaseException as error:
                self.failed.append(error)

        self.writing = threading.Thread(target=write)
        self.writing.start()

    def finish(self) -> None:
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        if self.failed:
            raise self.failed.pop()

    def load(self, saved: checkpoint.Checkpoint, state: TrainState) -> None:
        """Rank 0 reads and hands out shards."""
        whole: Any = saved.tensors("model") if self.main else {}
        if whole and "head.weight" not in whole:  # tied
            whole["head.weight"] = whole["embedding.weight"]
        dcp.set_model_state_dict(state.model, whole, options=SPREAD)
        named = dict(state.model.named_parameters())
        moments = saved.tensors("optimizer") if self.main else {}
        shapes: list[Any] = [{name: (x.shape, x.dtype) for name, x in moments.items()}]
        dist.broadcast_object_list(shapes)
        for name, (shape, dtype) in shapes[0].items():
            like: Any = named.get(name.rpartition("/")[0])
            at = "cpu" if name.startswith("random/") else self.device
            x = moments[name].to(at) if self.main else torch.empty(shape, dtype=dtype, device=at)
            if isinstance(like, DTensor) and x.shape == like.shape:
                x = distribute_tensor(x, like.device_mesh, like.placements)
            else:
                dist.broadcast(x, 0)
            moments[name] = x
        state.restore_moments(moments)


def _line(error: BaseException) -> str:
    words = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\] *", "", words)[:120].rstrip(".")
