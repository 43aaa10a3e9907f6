"""The limits of gates, for every backend, and for PyTorch and JAX alike."""

LOG2E = 1.4426950408889634

# The limits of log-gates, natural logarithms: what is above LIMIT counts as LIMIT, what is below
# -LIMIT as -inf, which has a stand-in that survives subtraction: a state of gauge EMPTY holds
# nothing and loses to any token of a finite gate, log_i = -inf loses to it, and log_f = -inf makes
# everything lose to that. Powers of two are the same numbers in every dtype; fp32 holds the sums
# of a chunk of 64 tokens, fp64 those of any sequence.
LIMIT = 2.0**100  # 1.3e30
EMPTY = -(2.0**113)
LOG_I_NOTHING = -(2.0**116)
LOG_F_NOTHING = -(2.0**120)

# The limits of (a, u), the stabilised log-gates of tfla/gates.py, as powers of two.
# 64 (RESET + STEP) < 2^24: whole exponents are exact in fp32.
STEP = 2048.0  # of a finite log-decay; a weight beyond 2^-STEP of another is 0 beside it
WRITE = 4096.0  # of a finite log-weight, downwards
RESET = 147456.0  # log-decay of log_f = -inf: more than 64 steps can add up to
NOTHING = -(2.0**100)  # of log_i = -inf: 2^NOTHING is 0, whatever is added to it
# A gauge that is rounded by more than this is not followed by the weights: exp(32) is 8e13.
FOLLOWED = 32.0
