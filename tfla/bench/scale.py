"""What many GPUs cost each other: a model of the exchange of states, the shards and the memory.

It knows three numbers of a machine and takes a step to reach REACHED of the matmul peak (measured,
as WAIT: two H100, docs/performance/scale.md). ``cost`` tells a step by these alone; ``step_of``
tells it from the time of the same step on one GPU, which says more where that can be measured:

    a collective that brings S bytes to a GPU     WAIT + ranks HOP + S / link seconds
    shards         a step gathers the bf16 matrices twice and sends back fp32 gradients once:
                   8 bytes a parameter into each GPU, beside the arithmetic of the layers before
    exchange       4 H (K V + K + 3) bytes of every other rank, once a layer and direction, for any
                   number of tokens; forward nothing runs beside it
    a split call   SPLIT + SPLIT_TOKEN a token and head, once a layer: what a group adds to a call
                   forward, computed again and backward, besides the exchange
    memory         16 bytes a parameter over all ranks (weights, gradients, two moments), the inputs
                   of all blocks in fp32 (recomputation), one block at work, logits, gathered states
"""

from __future__ import annotations

from typing import NamedTuple

from tfla.bench.roofline import FP32, Machine
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.train import PIECE

HOST = 8  # GPUs that NVLink connects
LINK = {"inside": 450e9, "between": 400e9}  # bytes a second, into a GPU, into a host of 8 NICs
WAIT, HOP = 120e-6, 2e-6  # seconds: a call, and one more rank in the ring
REACHED = 0.42  # of the matmul peak: 1.3B, sharded over two H100, compiled
# Fitted to the three figures of two H200 (docs/results/gpu-scale.json); two H100 agree within 1%.
EXPOSED = 0.58  # share of the collectives of shards that nothing hides
SPLIT, SPLIT_TOKEN = 3.3e-3, 10.6e-9  # seconds
AT_WORK = 105  # bytes a channel and token of the block that is computed


class Cost(NamedTuple):
    """Of a step on `gpus` ranks; times in seconds, of one GPU."""

    gpus: int
    compute: float  # arithmetic of a step, with recomputation
    shards: float  # time of the collectives of FSDP
    exchange_bytes: int  # into a GPU, a layer and direction, all ranks sharing one sequence
    exchange: float  # its time
    layer: float  # arithmetic of a layer's forward pass, which waits for one exchange
    memory: float  # bytes, states gathered of all ranks among them


def collective(size: float, ranks: int) -> float:
    """Seconds until every rank has `size` bytes that lay spread over all."""
    return WAIT + ranks * HOP + size / LINK["inside" if ranks <= HOST else "between"]


def shards_of(config: XLSTMConfig, gpus: int, recompute: bool) -> float:
    """Seconds of the collectives of FSDP in a step: bf16 matrices once, or with recomputation
    twice, and fp32 gradients."""
    block, layers = config.num_parameters() / config.num_layers, config.num_layers
    gathers = 2 if recompute else 1
    return layers * (gathers * collective(2 * block, gpus) + collective(4 * block, gpus))


def states_of(config: XLSTMConfig) -> int:
    """Bytes that a rank sends of a layer, in one direction."""
    return FP32 * config.num_heads * (config.K * config.V + config.K + 3)


def step_of(
    alone: float, config: XLSTMConfig, gpus: int, tokens: int, context_ranks: int = 1
) -> float:
    """Seconds of a step on `gpus` ranks with `tokens` on each, of which `context_ranks` share a
    sequence (then blocks are computed again), where one GPU takes `alone` seconds for as many
    tokens by itself."""
    split = context_ranks > 1
    seconds = alone + EXPOSED * shards_of(config, gpus, recompute=split)
    if split:
        exchange = collective((context_ranks - 1) * states_of(config), context_ranks)
        call = SPLIT + SPLIT_TOKEN * tokens * config.num_heads
        seconds += config.num_layers * (3 * exchange + call)
    return seconds


def cost(config: XLSTMConfig, gpus: int, tokens: int, machine: Machine) -> Cost:
    """Of a step with `tokens` on each GPU, bf16."""
    rate = REACHED * machine.flops_per_s["bfloat16"]
    forward = config.flops_per_token() * tokens / rate
    compute = config.flops_per_token(training=True) * tokens / rate + forward
    parameters, layers = config.num_parameters(), config.num_layers
    block = parameters / layers
    shards, own = shards_of(config, gpus, recompute=True), states_of(config)
    held = 16 * parameters / gpus + 3 * 2 * block
    held += config.hidden_size * tokens * (FP32 * layers + AT_WORK)
    held += 3 * FP32 * config.vocab_size * min(tokens, PIECE) + 2 * gpus * own
    into = (gpus - 1) * own
    return Cost(gpus, compute, shards, into, collective(into, gpus), forward / layers, held)


COLUMNS = [
    "GPUs",
    "shards\nms",
    "of\nstep",
    "exchange\nMB",
    "exchange\nms",
    "of\nlayer",
    "GB a\nGPU",
    "tokens",
]


def cells(costs: list[Cost], tokens: int) -> list[list[str]]:
    """Rows of a table."""
    return [
        [
            f"{c.gpus:,}",
            f"{c.shards * 1e3:.1f}",
            f"{c.shards / c.compute:.1%}",
            f"{c.exchange_bytes / 1e6:,.1f}",
            f"{c.exchange * 1e3:.2f}",
            f"{c.exchange / c.layer:.1%}",
            f"{c.memory / 1e9:.1f}",
            f"{c.gpus * tokens:,}",
        ]
        for c in costs
    ]
