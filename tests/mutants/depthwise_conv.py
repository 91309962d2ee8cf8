"""Mutants of depthwise_conv1d and depthwise_conv2d."""

from tests.mutants import Mutant

TESTS = ("tests/test_depthwise_conv.py", "tests/test_contract.py -k 'depthwise_conv2d and (layouts or gradgradcheck)'")

KERNELS, FALLBACK, OPS = "kernels/depthwise_conv.py", "dlaccel/fallback/depthwise_conv.py", "dlaccel/ops/depthwise_conv.py"

MUTANTS = [
    Mutant(
        "row mask one too wide",
        KERNELS,
        "(rows < images * across) & (lanes < channels)\n    else:",
        "(rows <= images * across) & (lanes < channels)\n    else:",
    ),
    Mutant(
        "lane mask one too wide",
        KERNELS,
        "(rows < images * channels) & (lanes < across)",
        "(rows < images * channels) & (lanes <= across)",
    ),
    Mutant(
        "undefined lanes outside the image",
        KERNELS,
        "mask=mask & inside, other=0.0).to(ACCUMULATOR)",
        "mask=mask & inside).to(ACCUMULATOR)",
    ),
    Mutant(
        "padding in front read as image",
        KERNELS,
        "inside = (position + zero >= 0) & (position + zero < size)",
        "inside = position + zero < size",
    ),
    Mutant("last element along skipped", KERNELS, "& (position + zero < size)", "& (position + zero < size - 1)"),
    Mutant(
        "stride of y taken from x",
        KERNELS,
        "line = y + offset(n, stride_yn, VEC) + offset(o, stride_yc) ",
        "line = y + offset(n, stride_xn, VEC) + offset(o, stride_yc) ",
    ),
    Mutant(
        "filters of a channel not next to each other",
        KERNELS,
        "offset(o // MULTIPLIER, stride_xc)\n    w_mask",
        "offset(o % (channels // MULTIPLIER), stride_xc)\n    w_mask",
    ),
    Mutant(
        "dgrad: one filter of each channel",
        KERNELS,
        "for i in tl.range(0, MULTIPLIER * STEPS * (KS // TAPS), num_stages=1):",
        "for i in tl.range(0, STEPS * (KS // TAPS), num_stages=1):",
    ),
    Mutant(
        "dgrad: phase across off by one",
        KERNELS,
        "first = tl.where((a + PAD_A + (STRIDE_A - 1)",
        "first = tl.where((a + 1 + PAD_A + (STRIDE_A - 1)",
    ),
    Mutant(
        "wgrad: last step skipped",
        KERNELS,
        "tl.minimum((split + 1) * steps_per_split, steps), num_stages=1)",
        "tl.minimum((split + 1) * steps_per_split, steps - 1), num_stages=1)",
    ),
    Mutant("stride of the bias ignored", KERNELS, "tl.load(b + offset(o, stride_b), mask=w_", "tl.load(b + o, mask=w_"),
    Mutant("strides stay divided", KERNELS, "index.to(tl.int64) * stride * VEC", "index.to(tl.int64) * stride"),
    Mutant("channels stay divided in the weight gradient", KERNELS, "    channels *= VEC\n    CHANNELS", "    CHANNELS"),
    Mutant(
        "accumulated in float16",
        "kernels/config.py",
        "return tl.float64 if torch.float64 in dtypes else tl.float32",
        "return tl.float16",
    ),
    Mutant("int32 offsets", KERNELS, "return index.to(tl.int64) * stride", "return index * stride"),
    Mutant(
        "fallback: padding of dgrad symmetric",
        FALLBACK,
        "after = [size[d] + padding[2 * d] - dy.shape[2 + d] for d in (0, 1)]",
        "after = list(before)",
    ),
    Mutant("fallback: weights not flipped", FALLBACK, "_conv(dy, weight.flip(2, 3), None", "_conv(dy, weight, None"),
    Mutant(
        "fallback: stride and dilation not exchanged",
        FALLBACK,
        ".contiguous(), None, dilation, pads, stride, True)",
        ".contiguous(), None, stride, pads, dilation, True)",
    ),
    Mutant(
        "fallback: overwrites the incoming gradient",
        FALLBACK,
        "grid = empty(dy, (*dy.shape[:2], *size), channels_last).zero_()",
        "grid = empty(dy, (*dy.shape[:2], *size), channels_last).zero_() + dy.zero_().sum()",
    ),
    Mutant(
        "fallback: images in the channels with one image's bias",
        FALLBACK,
        "else bias.repeat(n)",
        "else bias.repeat_interleave(n)",
    ),
    Mutant(
        "fallback: images in the channels with channels' filters out of order",
        FALLBACK,
        "dy, weight = _one_image(dy), weight.repeat(n, 1, 1, 1)",
        "dy, weight = _one_image(dy), weight.repeat_interleave(n, 0)",
    ),
    Mutant("gradient of the bias lost", OPS, "dy.sum((0, 2, 3)) if ctx.wanted[2] else None", "None"),
    Mutant(
        "second derivative by the weight lost",
        OPS,
        "wgrad_op(dy, gdx, weight.shape, *options, channels_last) if ctx.wanted[1] else None",
        "None",
    ),
    Mutant(
        "fake: the format of the weight ignored",
        OPS,
        "suggests_channels_last(x) or suggests_channels_last(weight)\n    ),",
        "suggests_channels_last(x)\n    ),",
    ),
    Mutant(
        "padding='same': the odd element on the left",
        OPS,
        "totals[1] // 2, totals[1] - totals[1] // 2]",
        "totals[1] - totals[1] // 2, totals[1] // 2]",
    ),
    Mutant("planes: columns of a lane in another order", KERNELS, "return (c0, c1, c2, c3)", "return (c0, c2, c1, c3)"),
    Mutant("planes: the next row read as padding", KERNELS, "& (block >= 0) & (block < width)", "& (block >= 0)"),
    Mutant("planes: a piece of the row before read", KERNELS, "& (block >= 0) & (block < width)", "& (block < width)"),
    Mutant(
        "planes: the row before read as padding", KERNELS, "mask & (column >= 0) & (column < width)", "mask & (column < width)"
    ),
    Mutant("planes: filter not flipped across", KERNELS, "(KW - 1 - i % KW if FLIP else i % KW)", "(i % KW)"),
    Mutant("planes: stride of y taken from x", KERNELS, "+ offset(o, stride_yc, VEC)", "+ offset(o, stride_xc, VEC)"),
    Mutant(
        "planes: stride of the bias ignored",
        KERNELS,
        "tl.load(b + offset(o, stride_b), mask=exists",
        "tl.load(b + o, mask=exists",
    ),
    Mutant(
        "planes: filters of a channel not neighbours",
        KERNELS,
        "offset(o // MULTIPLIER, stride_xc, VEC)\n    zero",
        "offset(o, stride_xc, VEC)\n    zero",
    ),
    Mutant(
        "planes, wgrad: filters of a channel not neighbours",
        KERNELS,
        "offset(o // MULTIPLIER, stride_xc, VEC)\n        for",
        "offset(o, stride_xc, VEC)\n        for",
    ),
    Mutant("planes, wgrad: columns past the row multiply", KERNELS, "tl.where(v < rest, value, 0.0)", "value"),
    Mutant(
        "planes, wgrad: rows past the image multiply",
        KERNELS,
        "z = tl.where(start + (j - i // KW * DILATION_H) // STRIDE_H + zero < height, z, acc[i])",
        "pass",
    ),
    Mutant("planes, wgrad: lanes past the row count", KERNELS, "tl.where(rest > 0, acc[i], 0.0)", "acc[i]"),
    Mutant("planes, wgrad: filters transposed", KERNELS, "(i % KW * KH + i // KW) * channels", "i * channels"),
    Mutant(
        "planes, wgrad: one block of columns over another",
        KERNELS,
        "((split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * KW * KH) * channels + block",
        "(split * tl.num_programs(1)).to(tl.int64) * KW * KH * channels + block",
    ),
    Mutant(
        "planes, wgrad: the rows of the next split counted twice",
        KERNELS,
        "tl.minimum((split + 1) * steps_per_split, images * segments), num_stages",
        "tl.minimum((split + 2) * steps_per_split, images * segments), num_stages",
    ),
    Mutant(
        "planes, wgrad: dy's stride across channels taken from x",
        KERNELS,
        "offset(n, stride_dyn, VEC) + offset(o, stride_dyc, VEC) + offset(start + t",
        "offset(n, stride_dyn, VEC) + offset(o, stride_xc, VEC) + offset(start + t",
    ),
]
