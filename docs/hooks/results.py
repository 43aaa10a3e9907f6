"""The pages of results, made from the JSONs in docs/results: no number on them is typed by hand."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
PASSES = {"forward": "forward", "forward+backward": "with backward"}
# What a measurement is of: if one of these has changed since, its page says so.
KERNELS = ["tfla/kernels", "tfla/plan.py", "tfla/algorithm.py"]
SOURCES = {
    "bench-cpu": ["tfla/reference", "tfla/algorithm.py"],
    "language": ["tfla/reference", "tfla/xlstm/model.py", "tfla/bench/language_study.py"],
    "transfer": ["tfla/reference", "tfla/algorithm.py"],
    "transfer-bias": ["tfla/reference", "tfla/xlstm/model.py"],
    "gpu-model": [*KERNELS, "tfla/xlstm/model.py", "tfla/xlstm/generate.py"],
    "gpu-stacks": [*KERNELS, "tfla/xlstm/model.py", "tfla/integrations"],
    "gpu-scale": [*KERNELS, "tfla/parallel.py", "tfla/xlstm/parallel.py"],
}


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


# ---------------------------------------------------------------- where a number comes from


def git(*words: str) -> str | None:
    """What git prints, or None where there is no git or no such commit (in an sdist)."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def changes(name: str, commit: str) -> str:
    """Whether what was measured has changed since the commit of a result."""
    names = SOURCES.get(name, KERNELS)
    log = git("log", "--format=%cs", f"{commit.rstrip('+')}..HEAD", "--", *names)
    if log is None:
        return "not known here, without the git history"
    dates = log.split()
    files = ", ".join(f"`{n}`" for n in names if (ROOT / n).exists())
    if not dates:
        return f"nothing in {files}"
    return f"{len(dates)} commits to {files}, the last of {dates[0]}; not measured again"


def provenance(*names: str) -> str:
    """A table: each result, its machine, its commit, and what has changed since."""
    rows = []
    for name in names:
        result = load(name)
        commit, machine = result["commit"], result["machine"]
        date = git("log", "-1", "--format=%cs", commit.rstrip("+"))
        of = f"`{commit.rstrip('+')[:12]}`" + (f" ({date})" if date else "")
        of += " with changes that were not committed" if commit.endswith("+") else ""
        versions = f"torch {machine['torch']}"
        versions += f", Triton {machine['triton']}" if "triton" in machine else ""
        rows.append(
            f"| [{name}.json](../results/{name}.json) | {machine['device']}, {versions} | {of} | "
            f"{changes(name, commit)} |"
        )
    head = "| result | machine | commit measured | changed since |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


# ---------------------------------------------------------------- numbers


class Time(NamedTuple):
    """A median, and where it belongs."""

    implementation: str
    setup: str  # heads, head dims, sequences x tokens
    part: str  # forward, forward+backward, ...
    ms: float
    error: float | None  # relative, of h
    peak: float | None  # bytes over the inputs


def setup_of(shape: dict[str, int]) -> str:
    return f"{shape['B']:,} x {shape['T']:,}, {shape['H']} heads {shape['K']}/{shape['V']}"


def times(result: dict[str, Any], study: str | None = None) -> Iterator[Time]:
    """Every row with a speed."""
    for row in result["rows"]:
        if row["status"] == "ok" and study in (None, row["study"]):
            ms = statistics.median(row["samples_ms"])
            error, peak = row.get("errors", {}).get("h"), row.get("peak_bytes")
            yield Time(row["implementation"], setup_of(row["shape"]), row["pass"], ms, error, peak)


def three(x: float) -> str:
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"


def pair_table(found: list[Time]) -> str:
    """Set-ups down, implementations across; ms forward / with backward, and the ratio to ours."""
    names = list(dict.fromkeys(t.implementation for t in found))
    at = {(t.implementation, t.setup, t.part): t for t in found}
    lines = ["| sequences x tokens | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for setup in dict.fromkeys(t.setup for t in found):
        cells = []
        for name in names:
            pair = [at.get((name, setup, part)) for part in PASSES]
            cells.append(" / ".join(three(t.ms) if t else "-" for t in pair))
        lines.append(f"| {setup} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(name: str, about: str) -> str:
    return f"![{about}](../results/{name}.png)\n"


# ---------------------------------------------------------------- the pages


def results_page() -> str:
    """Performance: the results at a glance."""
    kernels, heads, cpu = load("gpu-kernels"), load("gpu-heads"), load("bench-cpu")
    decode = list(times(load("gpu-decode")))
    ceiling = kernels["ceiling"]
    ours = [f"tfla {gate}{how}" for gate in ("exp", "sigmoid") for how in ("", ", CUDA graph")]
    steps = ["| sequences | " + " | ".join(ours) + " |", "|---|---|---|---|---|"]
    for setup in dict.fromkeys(t.setup for t in decode):
        here = {t.implementation: t.ms for t in decode if t.setup == setup}
        count = setup.split(" x ")[0]
        steps.append(f"| {count} | " + " | ".join(three(1e3 * here[o]) for o in ours) + " |")
    return f"""# Results

Every number on this page is read from the JSON files of `docs/results` when the site is built.
Times are medians in milliseconds, forward / forward and backward; lower is better.
[How we measure](method.md) says what is compared, and [Where we lose](where_we_lose.md) lists every
comparison of these files that another implementation wins.

## Forward and backward on an H200

65,536 tokens in bf16, all implementations in one run. A copy moved
{ceiling["bytes_per_s"] / 1e12:.2f} TB/s there, and a product of 8192 x 8192 ran at
{ceiling["flops_per_s"] / 1e12:.0f} TFLOP/s. Attention has 32 heads of 128: a layer of the same
width, not the same function.

{pair_table(list(times(kernels, "length")))}
{picture("gpu-length", "Time over the length of the sequences at 65,536 tokens; lower is better")}
## Over the head dim

16 sequences of 4,096 tokens, with 4,096 channels of v in each set-up.

{pair_table(list(times(heads, "heads")))}
{picture("gpu-heads", "Time over the head dim; lower is better")}
## One token of a batch of sequences

Microseconds for one decode step, 8 heads 256/512, states in fp32 updated in place. For one
or four sequences launching the kernels takes longer than running them; a CUDA graph avoids that.

{chr(10).join(steps)}

{picture("gpu-decode", "Time of a decode step over the number of sequences; lower is better")}
## On a CPU

2,048 tokens in fp32 on one thread, beside PyTorch's attention, on a virtual machine that was busy
with other programs: compare within a row.

{pair_table(list(times(cpu, "length")))}
{picture("bench-cpu-length", "Time on a CPU over the length of the sequences; lower is better")}
## Errors

Relative errors against fp64 of everything that was timed on the H200.

{picture("gpu-errors", "Errors against fp64; lower is better")}
## What these numbers are of

{provenance(*sorted(path.stem for path in RESULTS.glob("*.json")))}
"""


COMPARED = ("gpu-kernels", "gpu-heads", "bench-cpu", "gpu-memory", "gpu-regimes") + (
    "gpu-stacks",
    "gpu-scale",
    "gpu-tf32",
)


class Loss(NamedTuple):
    """A comparison that another implementation wins."""

    what: str
    ours: str
    theirs: str
    ratio: float
    source: str


def losses() -> list[Loss]:
    """Every comparison in the results in which ours takes more time or memory."""
    found = []
    for name in ("gpu-kernels", "gpu-heads", "bench-cpu"):
        rows = list(times(load(name)))
        for ours in (t for t in rows if t.implementation.startswith("tfla ")):
            for t in rows:
                same = (t.setup, t.part) == (ours.setup, ours.part)
                if same and not t.implementation.startswith("tfla") and t.ms < ours.ms:
                    what = f"{PASSES[t.part]}, {t.setup}"
                    where = f"{load(name)['machine']['device']}, {load(name)['rows'][0]['dtype']}"
                    found.append(
                        Loss(
                            f"{what} ({where})",
                            f"{ours.implementation} {three(ours.ms)} ms",
                            f"{t.implementation} {three(t.ms)} ms",
                            ours.ms / t.ms,
                            name,
                        )
                    )
    return found + _memory() + _small() + _stacks() + _split()


def _memory() -> list[Loss]:
    """Peak memory with backward: the least of ours beside the least of theirs."""
    rows = [t for t in times(load("gpu-memory")) if t.part == "forward+backward" and t.peak]
    found = []
    for gate in ("exp", "sigmoid"):
        mine = min(
            (t for t in rows if t.implementation.startswith(f"tfla {gate} ")), key=lambda t: t.peak
        )
        for t in rows:
            other = f"mlstm_kernels xl {gate} "
            if t.implementation.startswith(other) and t.peak < mine.peak:
                what = f"peak memory, with backward, {t.setup} (H200, bf16); time in brackets"
                ours, theirs = (
                    f"{x.implementation} {x.peak / 2**20:,.0f} MiB ({three(x.ms)} ms)"
                    for x in (mine, t)
                )
                found.append(Loss(what, ours, theirs, mine.peak / t.peak, "gpu-memory"))
    return found


def _small() -> list[Loss]:
    """Single sequences, whose kernels take less time than their launches, beside cuDNN's."""
    rows = load("gpu-regimes")["small"]
    found = []
    for part in ("forward one after the other ms", "with backward one after the other ms"):
        for row in rows:
            against = [r for r in rows if r["shape"] == row["shape"] and "attention" in r["name"]]
            for t in against:
                if row["name"].startswith("tfla") and t[part] < row[part]:
                    name = part.removesuffix(" ms").replace("one after the other", "in a row")
                    found.append(
                        Loss(
                            f"{name}, {row['shape']} (H200, bf16)",
                            f"{row['name']} {1e3 * row[part]:.0f} us",
                            f"{t['name']} {1e3 * t[part]:.0f} us",
                            row[part] / t[part],
                            "gpu-regimes",
                        )
                    )
    return found


def _stacks() -> list[Loss]:
    """Models of other packages: on tfla, beside their own kernels."""
    rows = {(r["stack"], r["part"]): r["ms"] for r in load("gpu-stacks")["rows"]}
    found = []
    for (stack, part), ms in rows.items():
        theirs = rows.get((stack.removesuffix(" on tfla"), part))
        if stack.endswith(" on tfla") and theirs is not None and theirs < ms:
            of = stack.removesuffix(" on tfla")
            found.append(
                Loss(
                    f"xLSTM 7B in {of}, {part} (H100, bf16)",
                    f"{stack} {three(ms)} ms",
                    f"{of} with mlstm_kernels {three(theirs)} ms",
                    ms / theirs,
                    "gpu-stacks",
                )
            )
    return found


def _split() -> list[Loss]:
    """A sequence split over two GPUs beside half of it on one."""
    found = []
    for row in load("gpu-scale")["rows"]:
        if "alone_ms" in row and row["split_ms"] > row["alone_ms"]:
            found.append(
                Loss(
                    f"{row['name']}, one sequence over two GPUs (H200, bf16)",
                    f"split {three(row['split_ms'])} ms",
                    f"the same tokens on one GPU alone {three(row['alone_ms'])} ms",
                    row["ratio"],
                    "gpu-scale",
                )
            )
    return found


def losses_page() -> str:
    """Where we lose, as ratios."""
    lines = ["| what | tfla | the other | ratio | result |", "|---|---|---|---|---|"]
    for x in sorted(losses(), key=lambda x: -x.ratio):
        result = f"[{x.source}](../results/{x.source}.json)"
        lines.append(f"| {x.what} | {x.ours} | {x.theirs} | {x.ratio:.2f} | {result} |")
    fp32 = {r["name"]: r["with backward ms"] for r in load("gpu-regimes")["fp32"]}
    tf32 = {r["name"]: r["with backward ms"] for r in load("gpu-tf32")["tf32"]}
    off = {r["name"]: r["error_h"] for r in load("gpu-tf32")["tf32"]}
    exact = {r["name"]: r["error_h"] for r in load("gpu-regimes")["fp32"]}
    ieee = []
    for gate in ("sigmoid", "exp"):
        ours, theirs = f"tfla {gate}", f"mlstm_kernels xl {gate}"
        ieee.append(
            f"| {gate} | {three(fp32[ours])}, {exact[ours]:.0e} | {three(tf32[ours])}, "
            f"{off[ours]:.0e} | {three(tf32[theirs])}, {off[theirs]:.0e} | "
            f"{fp32[ours] / tf32[theirs]:.2f} | {tf32[ours] / tf32[theirs]:.2f} |"
        )
    return f"""# Where we lose

Ratios are time (or memory) of tfla over that of the other; above 1 the other is better. The table
holds every such comparison in the committed results, and is made from them when the site is built.

{chr(10).join(lines)}

## Products in fp32

mlstm_kernels multiplies fp32 inputs in TF32 without being asked to. tfla does so only where PyTorch
allows it, with `torch.set_float32_matmul_precision("high")`; PyTorch's default is products in fp32.
4 x 4,096 tokens, 16 heads 128/256, H200; ms with backward, and the relative error of h:

| gate | tfla, default | tfla, TF32 allowed | mlstm_kernels | ratio, default | ratio, TF32 |
|---|---|---|---|---|---|
{chr(10).join(ieee)}

[Dtypes and precision](../guide/precision.md) says which one to take.

## What these numbers are of

{provenance(*COMPARED)}
"""
