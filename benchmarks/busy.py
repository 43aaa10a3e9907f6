"""What `tfla` gets of a busy machine: python benchmarks/busy.py (under 3 minutes)

Tokens a second of training steps and of generation, of the default model of `tfla train`, beside 0,
1 and 3 other programs that compute all the time. Each column is a process of its own and they take
turns, so that whatever else the machine does meets all of them:

    torch      as many threads as torch takes by itself, waiting as OpenMP does by itself
    1 thread   torch set to one thread
    tfla       as the command computes: tfla/threads.py

Medians over the turns. In the first turn beside other neighbours `tfla` still finds its threads.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

NEIGHBOURS = (0, 1, 3)
WAYS = ("torch", "1 thread", "tfla")
WORK = ("train", "generate")
BATCH, CONTEXT, VOCABULARY = 8, 256, 257


def work(what: str, way: str) -> None:
    """A process that computes for as many seconds as each line of its input says, and answers with
    its tokens a second and the threads that it had at the end."""
    from tfla import threads

    if way == "tfla":
        threads.limit_spinning()
    import torch

    from tfla.xlstm import XLSTM, XLSTMConfig
    from tfla.xlstm.train import mean_nats

    torch.manual_seed(0)
    config = XLSTMConfig(vocab_size=VOCABULARY, hidden_size=128, num_layers=2, num_heads=1)
    model = XLSTM(config)
    count = {"torch": torch.get_num_threads(), "1 thread": 1}
    if way in count:
        chosen = threads.Threads(count[way])
    elif what == "train":
        chosen = threads.Threads.adaptive()
    else:
        chosen = threads.Threads(threads.for_generation(config.num_parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    windows = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))

    def train() -> int:
        mean_nats(model, windows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return BATCH * CONTEXT

    def generate() -> int:
        return sum(1 for _ in model.stream(windows[:1, :16], 32, seed=0))

    once = {"train": train, "generate": generate}[what]
    once()
    print("ready", flush=True)
    for line in sys.stdin:
        began, tokens = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < float(line):
            with chosen.step():
                tokens += once()
        print(tokens / passed, torch.get_num_threads(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn of training")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    from tfla import threads

    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"{threads.cores()} cores; load before the start: {load}, which should be near 0")
    environment = {k: v for k, v in os.environ.items() if k not in threads.OPENMP}
    workers = {}
    running = []
    try:
        for what in WORK:
            for way in WAYS:
                workers[what, way] = subprocess.Popen(
                    [sys.executable, __file__, "--work", what, way],
                    env=environment,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
        for worker in workers.values():
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        print("| other programs | " + " | ".join(f"{what}, {way}" for what, way in workers) + " |")
        print("|---:|" + "---:|" * len(workers))
        for neighbours in NEIGHBOURS:
            while len(running) < neighbours:
                running.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            found: dict[tuple[str, str], list[tuple[float, str]]] = {key: [] for key in workers}
            for _ in range(args.turns):
                for key, worker in workers.items():
                    seconds = args.seconds / (1 if key[0] == "train" else 3)
                    assert worker.stdin is not None and worker.stdout is not None
                    print(seconds, file=worker.stdin, flush=True)
                    speed, count = worker.stdout.readline().split()
                    found[key].append((float(speed), count))
            cells = [
                f"{statistics.median(speed for speed, _ in turns):,.0f} ({turns[-1][1]})"
                for turns in found.values()
            ]
            print(f"| {neighbours} | " + " | ".join(cells) + " |", flush=True)
        print("tokens a second (threads at the end)")
    finally:
        for process in (*running, *workers.values()):
            process.kill()


if __name__ == "__main__":
    main()
