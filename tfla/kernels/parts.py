"""What the scans in Gluon share: fp32 operands as two or three parts, names of Triton that have
changed."""

# mypy: disable-error-code="union-attr"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tfla._compat_triton import gluon_reinterpret

# The same functions under the names of Triton 3.6 and of later ones.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
view = gluon_reinterpret(gl.shared_memory_descriptor)

# Two numbers at once: of numbers that are rounded and widened again the compiler makes conversions
# of one each, 16 a clock and multiprocessor (h 462 us, not 384).
_REST = """
    shl.b32 a, {part}, 16;
    and.b32 b, {part}, 0xffff0000;
    mov.b32 v, a;
    mov.b32 w, b;
    sub.f32 x, {x}, v;
    sub.f32 y, {y}, w;
"""
_REGISTERS = "{ .reg .b32 a, b; .reg .f32 v, w, x, y;"
# What bf16 leaves of two numbers, as bf16.
_SECOND_PART = gl.constexpr(
    _REGISTERS
    + ".reg .b32 both; cvt.rn.bf16x2.f32 both, $2, $1;"
    + _REST.format(part="both", x="$1", y="$2")
    + "cvt.rn.bf16x2.f32 $0, y, x; }"
)
# What is left of a number whose first part is not finite is 0, not inf - inf. With two parts, where
# it would not keep inf from becoming NaN in a product, it is left out: h 353 us, with it 532.
_FINITE = """
    testp.finite.f32 p, x;
    testp.finite.f32 q, y;
    selp.f32 x, x, 0f00000000, p;
    selp.f32 y, y, 0f00000000, q;
"""
# All three parts of two numbers.
_THREE_PARTS = gl.constexpr(
    _REGISTERS
    + ".reg .pred p, q; cvt.rn.bf16x2.f32 $0, $4, $3;"
    + _REST.format(part="$0", x="$3", y="$4")
    + _FINITE
    + "cvt.rn.bf16x2.f32 $1, y, x;"
    + _REST.format(part="$1", x="x", y="y")
    + "cvt.rn.bf16x2.f32 $2, y, x; }"
)


@gluon.jit
def parts_of(value, like):
    """fp32 as the parts that ``like`` has: one of its dtype, or two or three bf16 that add up to
    it (16 or 24 bits), the first rounded to nearest, the next what that leaves."""
    if len(like) == 3:
        return gl.inline_asm_elementwise(
            _THREE_PARTS,
            "=&r,=&r,=r,r,r",
            [value],
            (gl.bfloat16, gl.bfloat16, gl.bfloat16),
            True,
            2,
        )
    else:
        first = value.to(like[0].dtype)
        if len(like) == 1:
            return (first,)
        else:
            second = gl.inline_asm_elementwise(
                _SECOND_PART, "=r,r,r", [value], gl.bfloat16, True, 2
            )
            return first, second


@gluon.jit
def store_parts(at, value):
    parts = parts_of(value, at)
    for n in gl.static_range(len(at)):
        at[n].store(parts[n])


@gluon.jit
def load(parts, LAYOUT: gl.constexpr):
    value = parts[0].load(LAYOUT)
    if len(parts) > 1:
        value = value.to(gl.float32) + parts[1].load(LAYOUT).to(gl.float32)
    if len(parts) == 3:
        value += parts[2].load(LAYOUT).to(gl.float32)
    return value


@gluon.jit
def turned(parts):
    return [each.permute((1, 0)) for each in parts]


@gluon.jit
def columns(parts, START: gl.constexpr, SIZE: gl.constexpr):
    return [each.slice(START, SIZE, dim=1) for each in parts]


@gluon.jit
def total_24(lesser, main):
    """Their sum, once they are made. What is not finite is so in the products of the largest parts
    as in IEEE arithmetic; the others, inf times 0 among them, count where they are finite."""
    return main + gl.where(gl.abs(lesser) < float("inf"), lesser, 0.0)


@gluon.jit
def scaled(x, weight):
    """x * weight, but 0 where the weight is 0, whatever x is."""
    return gl.where(weight == 0.0, 0.0, x * weight)
