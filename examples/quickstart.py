"""The mLSTM in forty lines: a sequence at once, in two parts, token by token, and gradients."""

import torch

import tfla

torch.manual_seed(0)
B, T, H, K, V = 2, 300, 4, 32, 64  # batch, tokens, heads, head size of q and k, head size of v

q = torch.randn(B, T, H, K)
k = torch.randn(B, T, H, K)
v = torch.randn(B, T, H, V)
i = torch.randn(B, T, H)  # input gate, before its activation
f = torch.randn(B, T, H) + 4  # forget gate: sigmoid(4) = 0.98, so the memory lasts about 50 tokens

# A whole sequence. h: (B, T, H, V).
h, end = tfla.mlstm(q, k, v, i, f, output_final_state=True)
size = sum(x[0].numel() for x in end)
print(f"h {tuple(h.shape)}; a state of {size:,} numbers a sequence, for any T")

# The same in two calls: the state is all that the second one has to know of the first.
first, second = [[x[:, s] for x in (q, k, v, i, f)] for s in (slice(0, 200), slice(200, T))]
h1, middle = tfla.mlstm(*first, output_final_state=True)
h2, _ = tfla.mlstm(*second, initial_state=middle)
difference = (torch.cat([h1, h2], 1) - h).norm() / h.norm()
print(f"two calls instead of one: relative difference {difference:.1e}")

# The same again, the last 100 tokens one at a time, as in generation. The state does not grow.
state, steps = middle, []
for t in range(200, T):
    step, state = tfla.mlstm_step(q[:, t], k[:, t], v[:, t], i[:, t], f[:, t], state)
    steps.append(step)
difference = (torch.stack(steps, 1) - h2).norm() / h2.norm()
print(f"100 steps instead: relative difference {difference:.1e}")

# Gradients are exact, through the gates and the normaliser too.
inputs = [x.requires_grad_() for x in (q, k, v, i, f)]
loss = tfla.mlstm(*inputs)[0].square().mean()
loss.backward()
norms = ", ".join(f"{name} {x.grad.norm():.2e}" for name, x in zip("qkvif", inputs, strict=True))
print(f"loss {loss.item():.4f}; norms of the gradients: {norms}")
