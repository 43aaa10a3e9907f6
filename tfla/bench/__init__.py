"""Measuring: `tfla bench` and `tfla roofline`. Correct before fast: what is wrong has no speed."""

# Its commands and their short helps, which `tfla --help` shows without the imports of cli.py.
COMMANDS = {
    "bench": "Measure this implementation beside others on this machine, and compare two runs. "
    "Every result is held against fp64 before it is timed; what is wrong has no speed.",
    "roofline": "FLOPs, bytes and limits of each kernel of a call.",
    "plan": "The kernels that a call takes on a GPU.",
}
