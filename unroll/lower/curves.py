"""Text of functions of one number that are known at places of an even grid: polynomials between them, straight on beyond.

Slopes keep what the function was given, no index and no distance of any entry; those of second order are right too.
"""

from __future__ import annotations

PIECE_OF = '''def piece_of(x, pieces, low, width):
    """The number of the piece that x lies in, and how far x is into it, in widths; beyond the ends, the first or last piece."""
    far = (x - low) / width
    i = far.detach().nan_to_num().floor().clamp(0, pieces.shape[-1] - 1)
    far, i = far - i, i.long()
    if pieces.ndim > 2:  # those of each row
        i = i + pieces.shape[-1] * torch.arange(pieces.shape[-2], device=x.device)
    return i, far
'''

ALONG = '''def along(x, pieces, low, width):
    """The polynomial of the piece that x lies in. pieces: (degree + 1, number), or (degree + 1, rows, number), rows last in x."""
    i, far = piece_of(x, pieces, low, width)
    value = 0
    for c in pieces.flatten(1).flip(0):
        value = c[i] + far * value
    return value
'''

ALONG_RULE = '''class Along(torch.autograd.Function):
    """Keeps x and pieces alone, and looks again where x lies."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, pieces, low, width):
        return along(x, pieces, low, width)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.grid = inputs[2:]

    @staticmethod
    def slope(x, pieces, low, width):
        if len(pieces) == 1:
            return torch.zeros_like(x)
        return Along.apply(x, torch.stack([k / width * c for k, c in enumerate(pieces) if k]), low, width)

    @staticmethod
    def backward(ctx, grad):
        x, pieces = ctx.saved_tensors
        of_x = grad * Along.slope(x, pieces, *ctx.grid) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None
        i, far = piece_of(x, pieces, *ctx.grid)
        sums = []
        for _ in pieces:
            sums.append(grad.new_zeros(pieces[0].numel()).scatter_add(0, i.flatten(), grad.flatten()))
            grad = grad * far
        return of_x, torch.stack(sums).view_as(pieces), None, None

    @staticmethod
    def jvp(ctx, dx, dpieces, *_):
        x, pieces = ctx.saved_tensors
        return dx * Along.slope(x, pieces, *ctx.grid) + along(x, dpieces, *ctx.grid)
'''

ON_PIECES = '''def on_pieces(x, pieces, low, width):
    """along, compiled or not, in float32 or better."""
    run = along if torch.compiler.is_compiling() else Along.apply
    return run(x.to(pieces.dtype), pieces, low, width).to(x.dtype)
'''

CURVE = '''def curve(x, y, low, high):
    """Straight between values y at even places from low to high, and on beyond them."""
    y = y.to(torch.promote_types(x.dtype, torch.float32))
    return on_pieces(x, torch.stack([y[..., :-1], y.diff(dim=-1)]), low, (high - low) / (y.shape[-1] - 1))
'''

SPLINE = '''def spline(x, y, low, high):
    """The cubic spline whose coefficients at even places from low to high are y, straight on beyond them."""
    y = y.to(torch.promote_types(x.dtype, torch.float32))
    first, last = y[..., 1:2] - y[..., :1], y[..., -1:] - y[..., -2:-1]
    y = torch.cat([y[..., :1] - first, y, y[..., -1:] + last], -1)
    a, b, c, d = (y[..., k : y.shape[-1] - 3 + k] for k in range(4))
    inner = torch.stack([(a + 4 * b + c) / 6, (c - a) / 2, (a - 2 * b + c) / 2, (d - a) / 6 + (b - c) / 2])
    before = torch.stack([y[..., :1], first, 0 * first, 0 * first])
    after = torch.stack([y[..., -2:-1], last, 0 * last, 0 * last])
    width = (high - low) / (y.shape[-1] - 3)
    return on_pieces(x, torch.cat([before, inner, after], -1), low - width, width)
'''

ODD = '''def odd(y):
    """Values of an odd function from those above 0."""
    return torch.cat([-y.flip(-1), torch.zeros_like(y[..., :1]), y], -1)
'''

KEPT = '''class Kept(torch.autograd.Function):
    """x between low and high. At an end and beyond it there are the slopes alone that lead inwards: nothing stays there for good."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, low, high):
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.ends = inputs[1:]

    @staticmethod
    def backward(ctx, grad):
        (x,), (low, high) = ctx.saved_tensors, ctx.ends
        return grad.masked_fill(((x <= low) & (grad > 0)) | ((x >= high) & (grad < 0)), 0), None, None
'''

RISING = '''def rising(y, most, from_0):
    """y, none of it less than the one before, nor more than that and most. from_0: nor is the first, than 0."""
    steps = Kept.apply(F.pad(y, (1, 0)).diff(dim=-1) if from_0 else y.diff(dim=-1), 0, most).cumsum(-1)
    return steps if from_0 else torch.cat([y[..., :1], y[..., :1] + steps], -1)
'''
