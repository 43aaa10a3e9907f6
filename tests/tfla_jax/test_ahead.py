"""What XLA makes of the backend "triton", for GPUs that are not there: no buffer is forgotten to be
updated in place, and none is copied; and the message of a launch is the one of jaxlib.

XLA (jaxlib 0.11.2) fuses a call in a loop with slices around it and forgets that a result was to
lie where an operand lies, if one of the two is such a slice. The numbers are then wrong in silence.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
MISSING = [name for name in ("triton", "jax_cuda13_plugin") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]
NAMES = [
    *("forward", "gradient", "sigmoid", "states", "slices", "packed", "vmap", "vmap of gradient"),
    *("step", "steps of layers", "layers exp", "layers exp remat", "layers sigmoid"),
    *("layers sigmoid remat", "shard_map"),
]
LOOPS = [name for name in NAMES if "layers" in name]
CALL = 'custom_call_target="triton_kernel_call_ffi"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each program its HLO and where its values lie."""
    made = tmp_path_factory.mktemp("ahead")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "ahead.py"), str(made)],
        cwd=HERE.parent.parent,
        env={
            **environment,
            "PYTHONPATH": str(HERE.parent.parent),
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver
            "JAX_PLATFORMS": "cpu,cuda",
            "XLA_FLAGS": f"--xla_dump_to={made / 'dump'} --xla_dump_hlo_as_text",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return made


# ---------------------------------------------------------------- reading HLO


class Instruction(NamedTuple):
    name: str
    operation: str
    operands: list[str]
    text: str


def computations(hlo: str) -> dict[str, dict[str, Instruction]]:
    """By their names the instructions of each, by theirs."""
    found: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line):
            current = found[head[1]] = {}
        elif made := re.match(r"  (?:ROOT )?%(\S+) = (?:\(.*?\)|\S+) ([\w-]+)\((.*)$", line):
            inside = made[3].split(")")[0]
            operands = re.findall(r"%([\w.-]+)", inside)
            current[made[1]] = Instruction(made[1], made[2], operands, line)
    return found


def aliases(call: Instruction) -> list[tuple[int, int]]:
    """(result, operand) that share memory."""
    text = re.search(r"output_to_operand_aliasing=\{(.*?\})\}", call.text)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", text[1]) if text else []
    return [(int(result or 0), int(operand)) for result, operand in pairs]


def calls(inside: dict[str, Instruction]) -> Iterator[Instruction]:
    yield from (x for x in inside.values() if x.operation == "custom-call" and CALL in x.text)


def is_slice(name: str, inside: dict[str, Instruction]) -> bool:
    """Is it a part of something else?"""
    x = inside[name]
    while x.operation == "bitcast":
        x = inside[x.operands[0]]
    return x.operation in ("slice", "dynamic-slice")


def is_sliced_into(call: Instruction, result: int, inside: dict[str, Instruction]) -> bool:
    """Does the result become a part of something else?"""
    single = not re.search(r"= \(", call.text.split("custom-call")[0])
    seen = {call.name} if single else set()
    for x in inside.values():
        if x.operation == "get-tuple-element" and x.operands == [call.name]:
            if re.search(rf"index={result}\b", x.text):
                seen.add(x.name)
        elif x.operation == "bitcast" and x.operands[0] in seen:
            seen.add(x.name)
        elif x.operation == "dynamic-update-slice" and x.operands[1] in seen:
            return True
    return False


class Fused(NamedTuple):
    """A fusion that has a launch which updates something."""

    fusion: Instruction
    call: Instruction
    inside: dict[str, Instruction]
    around: dict[str, Instruction]


def fused(hlo: str) -> list[Fused]:
    every, found = computations(hlo), []
    for around in every.values():
        for x in around.values():
            body = re.search(r"\bcalls=%([\w.-]+)", x.text)
            if x.operation == "fusion" and body and body[1] in every:
                inside = every[body[1]]
                found += [Fused(x, call, inside, around) for call in calls(inside) if aliases(call)]
    return found


def place_of(value: str, memory: str) -> tuple[str, str]:
    """(allocation, offset) of a value, as "name" or "name{1}"."""
    allocation = ""
    for line in memory.splitlines():
        if head := re.match(r"\s*allocation (\d+):", line):
            allocation = head[1]
        at = re.match(r"\s*value: <\d+ (\S+) @\d+> \(size=\d+,offset=(\d+)\)", line)
        if at and at[1] == value:
            return allocation, at[2]
    raise KeyError(value)


def value_of(name: str, around: dict[str, Instruction]) -> str:
    """The value that an instruction passes on."""
    x = around[name]
    while x.operation in ("bitcast", "get-tuple-element"):
        if x.operation == "get-tuple-element":
            index = re.search(r"index=(\d+)", x.text)
            assert index is not None
            return f"{x.operands[0]}{{{index[1]}}}"
        x = around[x.operands[0]]
    return x.name


# ---------------------------------------------------------------- what must hold


def test_the_tests_see_an_update_that_is_forgotten(folder: Path) -> None:
    with pytest.raises(AssertionError, match="custom-call"):
        check_updates("broken", folder)


@pytest.mark.parametrize("name", NAMES)
def test_no_update_in_place_is_forgotten(name: str, folder: Path) -> None:
    """A launch that updates a buffer may be fused with slices of others, but never of this one; and
    then the result of the fusion lies where the buffer lay. Where a kernel is given both addresses
    (a step) it need not."""
    check_updates(name, folder)


def check_updates(name: str, folder: Path) -> None:
    hlo = (folder / f"{name}.hlo").read_text()
    memory = (folder / f"{name}.memory").read_text()
    assert hlo.count(CALL) > 0
    if "step" in name:
        counters = [x for x in fused(hlo) if aliases(x.call)[-1][0] == 4]
        found = [(x, aliases(x.call)[-1:]) for x in counters]
    else:
        found = [(x, aliases(x.call)) for x in fused(hlo)]
    for x, pairs in found:
        for result, operand in pairs:
            source = x.call.operands[operand]
            assert not is_slice(source, x.inside), x.call.text[:300]
            assert not is_sliced_into(x.call, result, x.inside), x.call.text[:300]
            number = re.search(r"parameter\((\d+)\)", x.inside[source].text)
            assert number is not None, x.inside[source].text[:300]
            outside = x.fusion.operands[int(number[1])]
            index = f"{{{result}}}" if " = (" in x.fusion.text else ""
            ours = place_of(f"{x.fusion.name}{index}", memory)
            assert ours == place_of(value_of(outside, x.around), memory)


def copies(hlo: str) -> list[str]:
    """Of arrays, by the computation that they are in."""
    return [
        f"{name}: {x.text.strip()[:120]}"
        for name, inside in computations(hlo).items()
        for x in inside.values()
        if x.operation in ("copy", "copy-start") and " s32[] copy" not in x.text
    ]


def size_of(copied: str) -> int:
    """Elements of an array."""
    found = re.search(r"= \w+\[([\d,]*)\]", copied)
    assert found is not None, copied
    return math.prod(int(size) for size in found[1].split(",") if size)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOOPS])
def test_nothing_is_copied(name: str, folder: Path) -> None:
    assert not copies((folder / f"{name}.hlo").read_text())


@pytest.mark.parametrize("name", LOOPS)
def test_in_loops_only_what_xla_must_begin_with_is_copied(name: str, folder: Path) -> None:
    """Before a loop, what it goes on with; in it, but for some kilobytes, a buffer that is updated
    by a fused launch."""
    hlo = (folder / f"{name}.hlo").read_text()
    bodies = set(re.findall(r"\bbody=%([\w.-]+)", hlo))
    assert bodies
    inside = [x for x in copies(hlo) if x.split(":")[0] in bodies]
    large = [x for x in inside if size_of(x) >= 2**14]
    assert len(large) <= len(fused(hlo)), large


def test_a_donated_state_lies_where_it_lay(folder: Path) -> None:
    head = (folder / "step.hlo").read_text().splitlines()[0]
    assert all(f"{{{result}}}: ({result - 1}, {{}}" in head for result in (1, 2, 3))


def test_rows_that_are_split_need_no_other_device(folder: Path) -> None:
    hlo = (folder / "shard_map.hlo").read_text()
    assert "num_partitions=4" in hlo
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", hlo)


# ---------------------------------------------------------------- the message


def fields(message: bytes) -> list[tuple[int, Any, bytes]]:
    """(number, value, as it was written) of a protobuf message."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value

    while at < len(message):
        start = at
        key = varint()
        number, kind = key >> 3, key & 7
        value: Any
        if kind == 0:
            value = varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            value, at = message[at : at + size], at + size
        found.append((number, value, message[start:at]))
    return found


def test_the_message_is_that_of_jaxlib() -> None:
    """But for the machine code, which jaxlib's Python cannot add."""
    code = """
import sys
import zlib
from types import SimpleNamespace
from jaxlib import gpu_triton
from tfla.jax.lowering import message

about = SimpleNamespace(name="kernel", num_warps=8, shared=228880, num_ctas=1)
code = SimpleNamespace(metadata=about, asm={"cubin": bytes(range(256))})
values = [("*bf16", None), ("i32", -3), ("i32", 0), ("i64", 2**40), ("i64", -1), ("fp32", 0.1),
          ("u64", 0)]
ours = zlib.decompress(message(code, 90, (7, 2, 1), values))
import hashlib
kernel = gpu_triton.TritonKernel("kernel", 8, 1, 228880,
    hashlib.sha256(bytes(range(256))).hexdigest(), "", 90)
make = gpu_triton.create_scalar_parameter
parameters = [gpu_triton.create_array_parameter(0, 16)]
parameters += [make(value, kind) for kind, value in values[1:]]
theirs = gpu_triton.TritonKernelCall(kernel, 7, 2, 1, parameters).to_proto("kernel", b"")
print(ours.hex(), theirs.hex())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parent.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = map(bytes.fromhex, done.stdout.split())
    try:
        theirs = zlib.decompress(theirs)
    except zlib.error:
        pass  # as it is

    def kernel_and_rest(message: bytes) -> tuple[list[Any], list[Any]]:
        (_, call, _), *named = fields(message)
        (_, kernel, _), *rest = fields(call)
        whole = [x for x in fields(kernel) if x[0] not in (5, 11)]
        return whole, [*rest, *[x for x in named if x[1]]]

    assert kernel_and_rest(ours) == kernel_and_rest(theirs)
    ((_, call, _), *_) = fields(ours)
    image = [x[1] for x in fields(fields(call)[0][1]) if x[0] == 11]
    assert [x[:2] for x in fields(image[0])] == [
        (1, bytes(range(256))),
        (2, b"kernel"),
        (3, 228880),
    ]
