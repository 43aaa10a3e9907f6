"""The drawings of the documentation: python docs/figures/draw.py writes every SVG in this folder.

They take the colours of the page they stand on, light or dark, and those of the reader's system
where they stand alone. A colour means the same in all of them: blue is computed or copied by the
kernels, orange is kept in memory, green is a state, grey is what the caller gives or gets.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
.dw { font: 13px system-ui, sans-serif; --dw-ink: #222; }
@media (prefers-color-scheme: dark) { .dw { --dw-ink: #ddd; } }
.dw text { fill: var(--md-default-fg-color, var(--dw-ink)); }
.dw .small { font-size: 11.5px; } .dw .bold { font-weight: 600; }
.dw .mono { font-family: ui-monospace, monospace; }
.dw .middle { text-anchor: middle; } .dw .end { text-anchor: end; }
.dw .line { fill: none; stroke: var(--md-default-fg-color, var(--dw-ink)); stroke-width: 1.2; }
.dw .dash { stroke-dasharray: 4 3; } .dw .faint { opacity: .5; }
.dw .tip { fill: var(--md-default-fg-color, var(--dw-ink)); }
.dw .blue { fill: #0072B2; fill-opacity: .22; stroke: #2b8cc4; }
.dw .orange { fill: #D55E00; fill-opacity: .22; stroke: #d9731f; }
.dw .green { fill: #009E73; fill-opacity: .22; stroke: #18a67f; }
.dw .grey { fill: #888; fill-opacity: .18; stroke: #888; }
"""
TIP = (
    '<defs><marker id="dw-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
    'markerHeight="7" orient="auto-start-reverse"><path class="tip" d="M0 0 L8 4 L0 8 z"/>'
    "</marker></defs>"
)


class Drawing:
    """A canvas of width x height; y grows downwards."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, w: float, h: float, text: str = "", colour: str = "grey"
    ) -> None:
        """A rectangle with lines of text in its middle."""
        self.parts.append(
            f'<rect class="{colour}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3"/>'
        )
        lines = text.split("\n") if text else []
        for index, line in enumerate(lines):
            down = y + h / 2 + 4.5 + 16 * (index - (len(lines) - 1) / 2)
            self.text(x + w / 2, down, line, "middle")

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        kind = f' class="{style}"' if style else ""
        self.parts.append(f'<text{kind} x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def line(self, *points: tuple[float, float], style: str = "", tip: bool = False) -> None:
        at = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#dw-tip)"' if tip else ""
        self.parts.append(f'<polyline class="line {style}" points="{at}"{end}/>')

    def arrow(self, *points: tuple[float, float], style: str = "") -> None:
        self.line(*points, style=style, tip=True)

    def __str__(self) -> str:
        return (
            f'<svg class="dw" xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {self.width} {self.height}">\n<style>{STYLE}</style>\n{TIP}\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


# ---------------------------------------------------------------- the package


def rooms() -> Drawing:
    """Who imports whom."""
    d = Drawing(760, 470)
    rows = [
        ("callers", ["cli, demo", "bench", "integrations", "nn", "xlstm"], "grey"),
        ("functions", ["api: mlstm, linear_attention, mlstm_step"], "blue"),
        (
            "validation",
            ["checks: arguments", "dispatch: which backend", "parallel: group="],
            "blue",
        ),
        ("autograd", ["ops: operators of torch, autograd.Function"], "blue"),
        ("algorithm", ["algorithm: forward and backward, written once"], "blue"),
        ("backends", ["reference: plain PyTorch", "kernels: Triton"], "green"),
        ("values", ["backend: the protocol", "spec: CallSpec", "plan", "gates"], "orange"),
        ("private names", ["_compat: torch, Triton, the CUDA driver"], "grey"),
    ]
    y = 14.0
    for name, units, colour in rows:
        d.text(118, y + 24, name, "end bold")
        width = (620 - 10 * (len(units) - 1)) / len(units)
        for index, unit in enumerate(units):
            d.box(130 + index * (width + 10), y, width, 40, unit, colour)
        if name != "private names":
            d.arrow((440, y + 40), (440, y + 56))
        y += 57
    return d


def call() -> Drawing:
    """From arguments to launches."""
    d = Drawing(760, 330)
    d.box(10, 20, 150, 56, "arguments\nq, k, v, i, f, ...", "grey")
    d.box(215, 20, 150, 56, "checks, dispatch\nerrors, backend", "blue")
    d.box(420, 20, 150, 56, "CallSpec\na call without data", "orange")
    d.box(620, 20, 130, 56, "Plan\ntiles, chunk", "orange")
    d.arrow((160, 48), (215, 48))
    d.arrow((365, 48), (420, 48))
    d.arrow((570, 48), (620, 48))
    d.box(215, 130, 150, 56, "ops\nan operator of torch", "blue")
    d.box(420, 130, 150, 56, "algorithm\nforward, backward", "blue")
    d.box(620, 110, 112, 40, "reference", "green")
    d.box(620, 170, 130, 40, "kernels", "green")
    d.arrow((495, 76), (495, 130))
    d.arrow((420, 62), (290, 130))
    d.arrow((365, 158), (420, 158))
    d.arrow((570, 150), (620, 130))
    d.arrow((570, 166), (620, 190))
    d.arrow((742, 76), (742, 170), style="dash")
    d.box(620, 254, 130, 56, "launches\non the GPU", "blue")
    d.box(420, 254, 150, 56, "Program: buffers\nand launches", "orange")
    d.arrow((685, 210), (685, 254))
    d.arrow((570, 282), (620, 282))
    d.arrow((620, 204), (560, 254), style="dash")
    d.box(10, 130, 150, 56, "h, final state\nlater: gradients", "grey")
    d.arrow((215, 158), (160, 158))
    d.arrow((290, 186), (290, 282), (420, 282))
    d.text(285, 304, "a call that comes again", "small end")
    return d


# ---------------------------------------------------------------- how it works


def time_axis() -> Drawing:
    """Chunks, checkpoints, splits and packed sequences."""
    d = Drawing(760, 452)
    left, chunk, n = 120, 38, 16
    right = left + n * chunk

    def axis(y: float) -> None:
        d.arrow((left, y), (right + 20, y), style="faint")

    d.text(112, 34, "tokens", "end bold")
    d.arrow((left, 30), (right + 20, 30))
    d.text(right - 4, 20, "t", "mono")
    d.text(112, 76, "chunks", "end bold")
    for c in range(n):
        d.box(left + c * chunk, 54, chunk, 34, "L", "blue")
    d.text(left, 108, "inside a chunk of L tokens: products of matrices, L x L scores", "small")
    d.text(112, 146, "state", "end bold")
    for c in range(n):
        d.arrow((left + c * chunk + 4, 142), (left + (c + 1) * chunk - 3, 142))
    d.text(left, 166, "from chunk to chunk: one K x V matrix, held in registers", "small")
    d.text(112, 204, "checkpoints", "end bold")
    axis(200)
    for c in (4, 8, 12):
        d.box(left + c * chunk - 8, 188, 16, 24, "", "orange")
    text = "every 2,048 tokens the state is written to memory, for the backward pass"
    d.text(left, 228, text, "small")
    d.text(112, 268, "dq, dk", "end bold")
    for c in range(0, n, 4):
        d.box(left + c * chunk + 1, 250, 4 * chunk - 2, 30, "a program each", "green")
    d.text(left, 298, "start from the checkpoints, all at once", "small")
    d.text(112, 338, "splits", "end bold")
    for c in range(0, n, 8):
        d.box(left + c * chunk + 1, 320, 8 * chunk - 2, 30, "a program each, of h and dv", "green")
    text = "only where there are too few sequences and heads to fill the GPU; a pass before makes"
    d.text(left, 368, text, "small")
    d.text(left, 383, "the state at the border", "small")
    d.text(112, 418, "packed", "end bold")
    for first, length, name in ((0, 5.3, "sequence 1"), (5.3, 2.1, "2"), (7.4, 8.6, "sequence 3")):
        d.box(left + first * chunk + 1, 400, length * chunk - 2, 30, name, "grey")
    text = "chunks start where a sequence starts; the state there is empty, or the sequence's own"
    d.text(left, 447, text, "small")
    return d


FORWARD = [
    ("sums", "k, i, f", "sum of each chunk: p, M inside it, its share of n"),
    ("gauge", "", "m and n at every chunk, weights of source and target"),
    ("h", "q, k, v", "the scan: h, the denominator, checkpoints"),
]
BACKWARD = [
    ("dv", "k, q, dh, h", "reverse scan: dv, dh . h, checkpoints of dC"),
    ("column", "q", "d: the gradient of the division; its sums for dn"),
    ("dq", "dh, v, k, q", "scan from the checkpoints of C: dq, q . dq"),
    ("column states", "", "dn at every chunk"),
    ("dk", "v, dh, q, k", "reverse scan from the checkpoints of dC: dk, k . dk"),
    ("gate gradients", "i, f", "di, and df as a reverse sum restarted at checkpoints"),
]


def passes() -> Drawing:
    """The launches of both passes for the exponential gate, and the buffers between them."""
    d = Drawing(760, 656)
    x, w = 210, 330

    def column(title: str, rows: list[tuple[str, str, str]], y: float) -> float:
        d.text(10, y, title, "bold")
        y += 14
        for index, (name, reads, makes) in enumerate(rows):
            d.box(x, y, w, 44, "", "blue")
            d.text(x + 10, y + 18, name, "bold")
            d.text(x + 10, y + 35, makes, "small")
            if reads:
                d.box(40, y + 8, 110, 28, reads, "grey")
                d.arrow((150, y + 22), (x, y + 22))
            if index + 1 < len(rows):
                d.arrow((x + w / 2, y + 44), (x + w / 2, y + 58))
            y += 58
        return y

    end = column("forward", FORWARD, 20)
    d.box(600, 34, 150, 44, "weights of chunks\np, M, decay, n", "orange")
    d.box(600, 150, 150, 44, "checkpoints of C", "orange")
    d.arrow((x + w, 112), (600, 70))
    d.arrow((x + w, 172), (600, 172))
    d.box(40, end - 4, 110, 28, "h, state", "grey")
    d.arrow((x, 190), (150, end))
    y = end + 50
    d.text(600, y - 22, "what is saved for backward", "small")
    d.line((675, 194), (675, y - 36), style="dash")
    end = column("backward", BACKWARD, y)
    first = y + 14
    d.box(600, first, 150, 44, "checkpoints of dC", "orange")
    d.arrow((x + w, first + 22), (600, first + 22))
    d.arrow((600, first + 40), (565, first + 40), (565, first + 254), (x + w, first + 254))
    d.box(600, first + 96, 150, 44, "checkpoints of C\nweights of chunks", "orange")
    d.arrow((600, first + 118), (580, first + 118), (580, first + 138), (x + w, first + 138))
    d.box(600, first + 176, 150, 44, "d, dn of chunks", "orange")
    d.arrow((x + w, first + 80), (590, first + 80), (590, first + 188), (600, first + 188))
    d.box(600, first + 290, 150, 44, "q . dq and k . dk", "orange")
    d.arrow((600, first + 312), (x + w, first + 312))
    d.box(40, end - 2, 110, 28, "di, df", "grey")
    d.arrow((x, end - 24), (150, end + 6))
    return d


def hopper() -> Drawing:
    """One chunk of the scan on Hopper: what overlaps."""
    d = Drawing(760, 330)
    left = 150
    lanes = [
        ("copy engine", 40),
        ("tensor cores", 100),
        ("threads", 160),
        ("memory out", 220),
    ]
    for name, y in lanes:
        d.text(left - 12, y + 22, name, "end bold")
        d.line((left, y + 36), (745, y + 36), style="faint")
    d.text(left, 24, "one chunk of 64 tokens", "bold")
    d.line((left + 500, 30), (left + 500, 268), style="dash faint")
    d.text(left + 506, 24, "the next one", "small")
    d.box(left + 4, 40, 470, 34, "tiles and weights of a later chunk", "blue")
    d.box(left + 504, 40, 90, 34, "...", "blue")
    d.box(left + 4, 100, 96, 34, "scores", "blue")
    d.box(left + 104, 100, 96, 34, "state's share", "blue")
    d.box(left + 204, 100, 116, 34, "state's update", "green")
    d.box(left + 340, 100, 154, 34, "scores x payload", "blue")
    d.box(left + 504, 100, 90, 34, "scores", "blue")
    d.box(left + 104, 160, 104, 34, "2^(p - M)", "blue")
    d.box(left + 212, 160, 124, 34, "weighted, 16 bits", "blue")
    d.box(left + 400, 160, 94, 34, "to 16 bits", "blue")
    d.box(left + 420, 220, 174, 34, "the output of this chunk", "orange")
    d.box(left + 4, 220, 160, 34, "the output before", "orange")
    d.arrow((left + 52, 134), (left + 150, 160))
    d.arrow((left + 336, 168), (left + 380, 134))
    d.arrow((left + 447, 194), (left + 470, 220))
    text = (
        "The order is that of states up to 128 wide. Wider ones are updated after the last product,"
    )
    d.text(left, 290, text, "small")
    text = "and where it is not slower the scores of the next chunk are made beside the output."
    d.text(left, 307, text, "small")
    return d


def pair() -> Drawing:
    """The same function as a sum over pairs and as a recurrence."""
    d = Drawing(760, 250)
    d.text(20, 24, "as attention: one weight a pair", "bold")
    side = 26
    for t in range(7):
        for s in range(t + 1):
            d.box(40 + s * side, 40 + t * side, side - 2, side - 2, "", "blue")
    d.text(40, 244, "source s", "small")
    d.text(30, 128, "t", "end")
    d.text(300, 24, "as a recurrence: one state", "bold")
    for t in range(5):
        x = 310 + 88 * t
        d.box(x, 100, 46, 46, "C", "green")
        if t < 4:
            d.arrow((x + 46, 123), (x + 88, 123))
        d.arrow((x + 23, 72), (x + 23, 100))
        d.arrow((x + 23, 146), (x + 23, 178))
        d.text(x + 23, 64, "k, v", "middle small")
        d.text(x + 23, 194, "h", "middle small")
    d.text(310, 228, "the sum runs well on matrix units; the recurrence is linear in T", "small")
    return d


DRAWINGS = {
    "rooms": rooms,
    "call": call,
    "time_axis": time_axis,
    "passes": passes,
    "hopper": hopper,
    "pair": pair,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(str(draw()))
