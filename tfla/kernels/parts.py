"""What the scans in Gluon share: fp32 operands as two parts, names of Triton that have changed."""

# mypy: disable-error-code="union-attr"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tfla._compat_triton import gluon_reinterpret

# The same functions under the names of Triton 3.6 and of later ones.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
view = gluon_reinterpret(gl.shared_memory_descriptor)

# What bf16 leaves of two numbers, as bf16. Of numbers that are rounded and widened again the
# compiler makes conversions of one each, 16 a clock and multiprocessor (h 462 us, not 384).
_REST = gl.constexpr("""{
    .reg .b32 both, a, b;
    .reg .f32 x, y;
    cvt.rn.bf16x2.f32 both, $2, $1;
    shl.b32 a, both, 16;
    and.b32 b, both, 0xffff0000;
    mov.b32 x, a;
    mov.b32 y, b;
    sub.f32 x, $1, x;
    sub.f32 y, $2, y;
    cvt.rn.bf16x2.f32 $0, y, x;
}""")


@gluon.jit
def parts_of(value, like):
    """fp32 as the parts that ``like`` has: one of its dtype, or two bf16 that add up to it."""
    first = value.to(like[0].dtype)
    if len(like) == 1:
        return (first,)
    else:
        return first, gl.inline_asm_elementwise(_REST, "=r,r,r", [value], gl.bfloat16, True, 2)


@gluon.jit
def store_parts(at, value):
    parts = parts_of(value, at)
    for n in gl.static_range(len(at)):
        at[n].store(parts[n])


@gluon.jit
def load(parts, LAYOUT: gl.constexpr):
    value = parts[0].load(LAYOUT)
    if len(parts) == 2:
        value = value.to(gl.float32) + parts[1].load(LAYOUT).to(gl.float32)
    return value


@gluon.jit
def turned(parts):
    return [each.permute((1, 0)) for each in parts]


@gluon.jit
def columns(parts, START: gl.constexpr, SIZE: gl.constexpr):
    return [each.slice(START, SIZE, dim=1) for each in parts]
