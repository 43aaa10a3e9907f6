"""Measuring: `tfla bench` and `tfla roofline`. Correct before fast: what is wrong has no speed."""
