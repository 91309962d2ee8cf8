"""Mutants of separable_conv2d and of the operator of its inference."""

from tests.mutants import Mutant

TESTS = ("tests/test_separable_conv.py -k '(operator and not fuzz) or pays or inference or two_kernels'",)

KERNELS, FALLBACK, OPS = "kernels/separable_conv.py", "dlaccel/fallback/separable_conv.py", "dlaccel/ops/separable_conv.py"

MUTANTS = [
    Mutant("row mask one too wide", KERNELS, "rows < images * height\n", "rows <= images * height\n"),
    Mutant("filter mask of the store one too wide", KERNELS, "< width) & (f < filters)", "< width) & (f <= filters)"),
    Mutant(
        "last block of channels skipped",
        KERNELS,
        "tl.range(0, channels, CHANNELS, num_stages=1)",
        "tl.range(0, channels // CHANNELS * CHANNELS, CHANNELS, num_stages=1)",
    ),
    Mutant(
        "tiles multiplied in another order",
        KERNELS,
        "mid[t] if db is None else mid[t] + shift, ACTIVATION)",
        "mid[T - 1 - t] if db is None else mid[T - 1 - t] + shift, ACTIVATION)",
    ),
    Mutant(
        "middle not rounded to the input's dtype",
        KERNELS,
        "mid[t] + shift, ACTIVATION).to(x.dtype.element_ty)\n            added = added + (tl.dot(z, weights,",
        "mid[t] + shift, ACTIVATION)\n            added = added + (tl.dot(z, weights.to(z.dtype),",
    ),
    Mutant("activation between left out", KERNELS, "mid[t] + shift, ACTIVATION)", "mid[t] + shift, None)"),
    Mutant(
        "bias of the depthwise part behind the activation",
        KERNELS,
        "activated(mid[t] if db is None else mid[t] + shift, ACTIVATION).to(x",
        "(activated(mid[t], ACTIVATION) if db is None else activated(mid[t], ACTIVATION) + shift).to(x",
    ),
    Mutant("stride of the pointwise bias ignored", KERNELS, "pb + offset(f, stride_pb)", "pb + f"),
    Mutant("filters of a channel not neighbours", KERNELS, "offset(c // MULTIPLIER,", "offset(c % (channels // MULTIPLIER),"),
    Mutant("int32 offsets of filters", KERNELS, "pw + offset(f, stride_pwf, VEC)", "pw + f * stride_pwf * VEC"),
    Mutant(
        "accumulated in float16",
        KERNELS,
        "ACCUMULATOR=config.accumulator(dtype)",
        "ACCUMULATOR=tl.float16",
    ),
    Mutant("one kernel where it computes the middle twice", KERNELS, 'cdiv(filters, one["FILTERS"]) * (3', "(3"),
    Mutant("fallback: activation behind left out", FALLBACK, "finished(activated_(y, activation)", "finished((y)"),
    Mutant(
        "fake: the pointwise weight's format ignored",
        OPS,
        "(x, depthwise_weight, pointwise_weight))\n    return",
        "(x,))\n    return",
    ),
    Mutant(
        "one operator although a gradient is wanted",
        OPS,
        "t.requires_grad for t in tensors):\n        return False",
        "False for t in tensors):\n        return False",
    ),
    Mutant("gradient of the middle not gated", OPS, "dmid = gate(dmid, mid, activation)", "dmid = gate(dmid, mid, None)"),
]
