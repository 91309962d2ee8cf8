"""Mutants of cross_entropy."""

from tests.mutants import Mutant

TESTS = ("tests/test_cross_entropy.py -k 'not conformance and not conforms'", "tests/test_contract.py -k cross_entropy")

KERNELS, FALLBACK, OPS = "kernels/cross_entropy.py", "dlaccel/fallback/cross_entropy.py", "dlaccel/ops/cross_entropy.py"

MUTANTS = [
    Mutant(
        "maximum starts at 0",
        KERNELS,
        "a, seen = s, s\n    if SLICED:",
        "a, seen = s, s\n    m += INF\n    m = tl.where(m != m, 0.0, m)\n    if SLICED:",
    ),
    Mutant("a row of -inf keeps its maximum", KERNELS, "    top = tl.where(top == -INF, 0.0, top)\n", ""),
    Mutant("-inf meets a running maximum of -inf", KERNELS, "d = tl.where(v == -INF, -INF, v - m)", "d = v - m"),
    Mutant(
        "sum not rescaled at a new maximum", KERNELS, "tl.where(d > 0, s * e + 1.0, s + e)", "tl.where(d > 0, s + 1.0, s + e)"
    ),
    Mutant(
        "weighted sum not moved to the new maximum",
        KERNELS,
        "a - seen * (m - m_before))\n    z = tl.where(v == -INF, -INF, v - m)",
        "a)\n    z = tl.where(v == -INF, -INF, v - m)",
    ),
    Mutant(
        "tiles: weighted sum not moved to the new maximum",
        KERNELS,
        "a - seen * (m - m_before))\n    z = tl.where(v == -INF, -INF, v - m[:",
        "a)\n    z = tl.where(v == -INF, -INF, v - m[:",
    ),
    Mutant("tiles: sum not rescaled at a new maximum", KERNELS, "s * tl.exp2((m - base) * LOG2_E) + tl.sum", "s + tl.sum"),
    Mutant(
        "tiles: -inf meets a running maximum of -inf",
        KERNELS,
        "base = tl.where(top == -INF, 0.0, top)",
        "base = top",
    ),
    Mutant("tiles: the maximum is forgotten", KERNELS, "top = tl.where(top > m, top, m)", "top = tl.where(top > m, top, top)"),
    Mutant("tiles: some classes twice", KERNELS, "tl.arange(0, TILES)[:, None] * BLOCK_C", "tl.arange(0, TILES)[:, None]"),
    Mutant(
        "tiles: tail of the row read",
        KERNELS,
        "& (c < C)[None, :, :]\n    v =",
        "& (c < C + 1)[None, :, :]\n    v =",
    ),
    Mutant(
        "last row stored twice", KERNELS, "return n, position, position < L, n * L", "return n, position, position <= L, n * L"
    ),
    Mutant(
        "int32 offsets of rows",
        KERNELS,
        "position = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_R",
        "position = (tl.program_id(0) % blocks) * BLOCK_R",
    ),
    Mutant(
        "int32 offsets of classes",
        KERNELS,
        "tensor[:, None] + c.to(tl.int64)[None, :] * stride_c",
        "tensor[:, None] + c[None, :] * stride_c",
    ),
    Mutant("ignored rows counted", KERNELS, "known = counts & (t >= 0) & (t < C)", "known = exists & (t >= 0) & (t < C)"),
    Mutant("bad targets read", KERNELS, "known = counts & (t >= 0) & (t < C)", "known = counts & (t >= 0)"),
    Mutant(
        "an ignored row's gradient is 0 times what it holds",
        KERNELS,
        'return tl.where(counts[:, None], tl.where(known[:, None], g, float("nan")), 0.0)',
        'return tl.where(known[:, None] | ~counts[:, None], g * tl.where(counts, 1.0, 0.0)[:, None], float("nan"))',
    ),
    Mutant("gradient 1 % too large", KERNELS, "g = e * (scale * a / s)[:, None]", "g = e * (scale * a / s * 1.01)[:, None]"),
    Mutant("only the first row's cotangent", KERNELS, "    return dy, dy.stride(0)\n", "    return dy, 0\n"),
    Mutant("smoothing forgets the weights", KERNELS, "g -= (scale * share)[:, None] * w\n", "g -= (scale * share)[:, None]\n"),
    Mutant(
        "probabilities smoothed without their weights",
        KERNELS,
        "return tl.where(inside, w * q, 0.0)",
        "return tl.where(inside, q, 0.0)",
    ),
    Mutant("row strides wrongly aligned", KERNELS, "align_c = math.gcd(16, C, *", "align_c = math.gcd(16, *"),
    Mutant(
        "float16 gradients scaled too early",
        KERNELS,
        "if reduction == MEAN and dtype == torch.float16 else reduction",
        "if False else reduction",
    ),
    Mutant("sums of a second level lost", KERNELS, "        partial = sums\n", "        partial = sums[:, :1]\n"),
    Mutant("fallback: maximum not subtracted", FALLBACK, "torch.sub(x, x.amax(1, keepdim=True), out=p)", "p.copy_(x)"),
    Mutant("fallback: small probabilities not repaired", FALLBACK, "far = (nll > FAR)", "far = (nll > math.inf)"),
    Mutant(
        "fallback: NaN of an ignored row reaches its gradient",
        FALLBACK,
        "bad = nll[part].isnan().logical_and_(~rows.valid[part])",
        "bad = nll[part].isnan().logical_and_(rows.valid[part])",
    ),
    Mutant(
        "fallback: ignored targets in the mean",
        FALLBACK,
        "return self.valid.sum().to(self.dtype)",
        "return torch.ones_like(self.valid).sum().to(self.dtype)",
    ),
    Mutant("fused: gradient handed out twice", OPS, "dx, ctx.owned = ctx.owned, None", "dx = ctx.owned"),
    Mutant(
        "fused: incoming gradient ignored", OPS, "return dx if cotangent.item() == 1.0 else dx.mul_(cotangent)", "return dx"
    ),
    Mutant(
        "second derivative by the logits 1 % too large",
        OPS,
        "return scale * self.p * (t - (",
        "return 1.01 * scale * self.p * (t - (",
    ),
    Mutant(
        "no gradient of a weight of probabilities",
        OPS,
        "dweight = r.by_class(g * r.q * r.n).to(weight.dtype)",
        "dweight = torch.zeros_like(weight)",
    ),
    Mutant(
        "num_items divides in the logits' dtype",
        OPS,
        "SUM, label_smoothing, True, fused) / num_items",
        "SUM, label_smoothing, False, fused) / num_items",
    ),
]
