"""Text of functions of singular values, with a derivative that is right where singular values tie or are 0.

Of x = U diag(s) V' and y = U diag(h(s)) V' an entry of U' dy V is, for i != j, a divided difference of h times an entry
of U' dx V, apart for its symmetric and its skew part (Daleckii & Krein 1965; Higham 2008, Functions of Matrices, ch. 3):

    (h(s_i) - h(s_j)) / (s_i - s_j)      and      (h(s_i) + h(s_j)) / (s_i + s_j)

No derivative of U or V is taken, which has none at a tie; there a divided difference is a slope of h. Where h jumps, it
is the mean of the slopes of both sides: what is cut off, and a direction that is not determined, have slope 0.
"""

from __future__ import annotations

DIVIDED = '''def divided_difference(a, h_a, slope_a, b, h_b, slope_b, largest):
    """(h(a) - h(b)) / (a - b); where rounding blurs that, what the slopes at a and b leave open. largest: a scale of a and b."""
    noise = 32 * torch.finfo(a.dtype).eps
    tie = (a - b).abs() <= noise * largest
    quotient = (h_a - h_b) / torch.where(tie, 1, a - b)
    between = torch.minimum(torch.maximum(quotient, torch.minimum(slope_a, slope_b)), torch.maximum(slope_a, slope_b))
    blur = noise * (h_a.abs() + h_b.abs() + largest * torch.maximum(slope_a.abs(), slope_b.abs()))
    exact = torch.where(((quotient - between) * (a - b)).abs() <= blur, between, quotient)
    return torch.where(tie, (slope_a + slope_b) / 2, exact)
'''

RECOMPOSED = '''class Recomposed(torch.autograd.Function):
    """u diag(t) v for x = u diag(s) v and t = h(s). The derivative in x is by divided differences, not through u and v:
    it is right where singular values tie."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, u, s, v, t, slope):
        return (u * t.unsqueeze(-2)) @ v

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def turned(dx, u, s, v, t, slope):
        """What dx does to u and v; what it does to t, on the diagonal, is apart."""
        core, largest = u.mT @ dx @ v.mT, s.abs().amax(-1, keepdim=True)
        even, odd = (core + core.mT) / 2, (core - core.mT) / 2
        a, b = [k.unsqueeze(-1) for k in (s, t, slope)], [k.unsqueeze(-2) for k in (s, t, slope)]
        same = divided_difference(*a, *b, largest.unsqueeze(-1))
        opposite = divided_difference(*a, -b[0], -b[1], b[2], largest.unsqueeze(-1))
        to_zero = divided_difference(s, t, slope, 0 * s, 0 * t, slope, largest)
        dy = u @ (same * (even.tril(-1) + even.triu(1)) + opposite * odd) @ v
        if u.shape[-2] > u.shape[-1]:
            dy = dy + ((dx @ v.mT - u @ core) * to_zero.unsqueeze(-2)) @ v
        if v.shape[-1] > v.shape[-2]:
            dy = dy + u @ (to_zero.unsqueeze(-1) * (u.mT @ dx - core @ v))
        return dy

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: where layers are worked out again, they are there for one reading
        u, _, v, _, _ = saved
        of_t = (u.mT @ grad @ v.mT).diagonal(dim1=-2, dim2=-1)
        return Recomposed.turned(grad, *saved), None, None, None, of_t, None
'''

FORWARD = '''class RecomposedForward(Recomposed):
    """The same with forward mode, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx, dx, du, ds, dv, dt, dslope):
        u, _, v, _, _ = ctx.saved_tensors
        return Recomposed.turned(dx, *ctx.saved_tensors) + (u * dt.unsqueeze(-2)) @ v
'''

CHOSEN = '''def recomposed(x, u, s, v, t, slope):
    """u diag(t) v."""
    rule = Recomposed if torch.compiler.is_compiling() else RecomposedForward
    return rule.apply(x, u, s, v, t, slope)
'''

SPECTRAL_MAP = """u, s, v = torch.linalg.svd(x, full_matrices=False)
least = s.amax(-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(s.dtype).eps
s = s - torch.where(s > least, 0, s).detach()
t = h(s)
return recomposed(x, u, s, v, t, torch.zeros_like(t) + slope(s, t))"""

SPECTRAL_DIVERGENCE = """s = torch.linalg.svdvals(x)
least = s.amax(-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(s.dtype).eps
s = s - torch.where(s > least, 0, s).detach()
t = h(s)
k, largest = torch.zeros_like(t) + slope(s, t), s.amax(-1, keepdim=True)
a, b = [y.unsqueeze(-1) for y in (s, t, k)], [y.unsqueeze(-2) for y in (s, t, k)]
same = divided_difference(*a, *b, largest.unsqueeze(-1))
opposite = divided_difference(*a, *(-y for y in b[:2]), b[2], largest.unsqueeze(-1))
to_zero = divided_difference(s, t, k, 0 * s, 0 * t, k, largest)
return k.sum(-1) + (same + opposite).tril(-1).sum((-2, -1)) + abs(x.shape[-2] - x.shape[-1]) * to_zero.sum(-1)"""

SYMMETRIC_DIVERGENCE = """s = torch.linalg.eigvalsh((x + x.mT) / 2)
t = h(s)
k, largest = torch.zeros_like(t) + slope(s, t), s.abs().amax(-1, keepdim=True)
a, b = [y.unsqueeze(-1) for y in (s, t, k)], [y.unsqueeze(-2) for y in (s, t, k)]
return divided_difference(*a, *b, largest.unsqueeze(-1)).tril().sum((-2, -1))"""

PSD = """m = (m + m.mT) / 2
w, q = torch.linalg.eigh(m)
return recomposed(m, q, w, q.mT, w.relu(), (w > 0).to(w))"""

VOLUME = """t = torch.as_tensor(t, dtype=m.dtype, device=m.device)
m, t, tiny = (m + m.mT) / 2, t.squeeze(-1) if t.ndim else t, torch.finfo(m.dtype).tiny
w, q = torch.linalg.eigh(m)
half = (w.square() / 4 + t).clamp_min(tiny).sqrt()
y = (w + w.abs()) / 2 + t / (half + w.abs() / 2)  # (w + sqrt(w^2 + 4 t)) / 2, without a difference
return recomposed(m, q, w, q.mT, y, y / (2 * half))"""

STIEFEL = """u, s, v = torch.linalg.svd(m, full_matrices=False)
return recomposed(m, u, s, v, torch.ones_like(s), torch.zeros_like(s))"""

RANK_AT_MOST = """u, s, v = torch.linalg.svd(m, full_matrices=False)
kept = (torch.arange(s.shape[-1], device=s.device) < r).to(s).expand_as(s)
return recomposed(m, u, s, v, kept * s, kept)"""
