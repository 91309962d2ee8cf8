"""Mutants of batch_norm."""

from tests.mutants import Mutant

KERNELS, FALLBACK, OPS = "kernels/batch_norm.py", "dlaccel/fallback/batch_norm.py", "dlaccel/ops/batch_norm.py"
FILE = "tests/test_batch_norm.py"
SHAPES = (f"{FILE} -k 'shapes and triton and float32'",)
OPTIONS = (f"{FILE} -k 'options and triton'",)
COTANGENTS = (f"{FILE} -k 'cotangents and triton'",)
STATE = (f"{FILE} -k 'keep_torch_s_state and triton and float32'",)
TORCH = (f"{FILE} -k 'not triton and not compile and not conformance and not wide_loads'",)
ONE_LAUNCH = ("tests/test_batch_norm_one_launch.py",)
SECOND = ("tests/test_contract.py -k 'gradgradcheck and batch_norm and torch'",)
TESTS = (FILE,)

MUTANTS = [
    Mutant("row mask one too wide", KERNELS, "(row < R)[:, None]", "(row <= R)[:, None]", SHAPES),
    Mutant(
        "values past the end count for the statistics",
        KERNELS,
        "z = tl.where(inside, x_tile.to(ACC) - k_tile, 0.0)",
        "z = x_tile.to(ACC) - k_tile",
        SHAPES,
    ),
    Mutant(
        "statistics without a shift",
        KERNELS,
        'k = tl.where(tl.abs(k) < float("inf"), k, 0.0)',
        "k = k * 0.0",
        (f"{FILE} -k 'far_from_zero and triton'",),
    ),
    Mutant(
        "the last slices are not merged",
        KERNELS,
        "range(0, PARTS, MERGE)",
        "range(0, PARTS - PARTS // 2, MERGE)",
        (f"{FILE} -k more_slices",),
    ),
    Mutant(
        "sums of groups from the wrong row",
        KERNELS,
        "merged(second + start * C,",
        "merged(second + start,",
        (f"{FILE} -k many_slices",),
    ),
    Mutant(
        "momentum the wrong way round",
        KERNELS,
        "(1 - share) * old_mean + share * mean64",
        "share * old_mean + (1 - share) * mean64",
        SHAPES,
    ),
    Mutant("running variance is the biased one", KERNELS, "(var / (1 - per_value))", "var", SHAPES),
    Mutant("batches are not counted", KERNELS, "tl.load(counter) + 1)", "tl.load(counter))", STATE),
    Mutant(
        "cumulative average by the old count",
        KERNELS,
        "share = 1.0 / tl.load(counter).to(tl.float64)",
        "share = 1.0 / (tl.load(counter) - 1).to(tl.float64)",
        STATE,
    ),
    Mutant(
        "gradient passes at 0",
        KERNELS,
        "g = tl.where(y <= 0, 0.0, g)",
        "g = tl.where(y < 0, 0.0, g)",
        (f"{FILE} -k 'special and triton'",),
    ),
    Mutant("gradient passes at 6", KERNELS, "(y >= 6)", "(y > 6)", (f"{FILE} -k 'special and triton'",)),
    Mutant(
        "mask before rounding",
        KERNELS,
        "affine(x_tile, mean, scale, bias).to(OUT)",
        "affine(x_tile, mean, scale, bias)",
        (f"{FILE} -k 'after_rounding and triton'",),
    ),
    Mutant(
        "mask of the residual form recomputed without it",
        OPS,
        "recomputable = activation is not None and residual is None",
        "recomputable = activation is not None",
        OPTIONS,
    ),
    Mutant(
        "layout of dy taken for that of x",
        KERNELS,
        "[*of_g, *of_x, *of_y]",
        "[*of_x, *of_x, *of_y]",
        COTANGENTS,
    ),
    Mutant(
        "y's own layout is not looked at",
        KERNELS,
        "return t if t.stride() == self.layout else",
        "return t if True else",
        (f"{FILE} -k 'layouts and triton'", *COTANGENTS),
    ),
    Mutant(
        "evaluation takes the variance for rstd",
        KERNELS,
        "values = 1.0 / tl.sqrt(values + EPS)",
        "values = values + EPS",
        OPTIONS,
    ),
    Mutant("dx without the mean's part", KERNELS, "g = g - of_mean - (x_tile", "g = g - (x_tile", SHAPES),
    Mutant(
        "one launch: a slice counts before its sums are stored",
        KERNELS,
        "    tl.debug_barrier()  # all threads have stored before one of them counts\n",
        "",
        ONE_LAUNCH,
    ),
    Mutant(
        "one launch: the last slice is not added up",
        KERNELS,
        "merged(first, channel, C, PARTS, MERGE)",
        "merged(first, channel, C, PARTS - 1, MERGE)",
        ONE_LAUNCH,
    ),
    Mutant(
        "one launch: the second pass does not acquire the sums",
        KERNELS,
        'sem="acquire") <= PARTS',
        'sem="relaxed") <= PARTS',
        ONE_LAUNCH,
    ),
    Mutant(
        "one launch: slices of all blocks count as one",
        KERNELS,
        "arrived = tickets + 1 + block",
        "arrived = tickets + 1",
        ONE_LAUNCH,
    ),
    Mutant(
        "one launch: the second pass a group too early",
        KERNELS,
        "(step + 1 - LAG, 0)",
        "(step + 2 - LAG, 0)",
        (f"{ONE_LAUNCH[0]} -k drawn_before",),
    ),
    Mutant("one launch: the tickets start anywhere", KERNELS, "new_zeros(1 +", "new_empty(1 +", ONE_LAUNCH),
    Mutant("fallback: sums of squares whatever the mean", FALLBACK, "NEAR, FAR = 2.0, 5.0", "NEAR, FAR = 1e9, 1e9", TORCH),
    Mutant(
        "fallback: the variance of the samples' means is lost",
        FALLBACK,
        "of_samples.sub_(mean).square_().add_(within)",
        "of_samples.sub_(mean).mul_(0).add_(within)",
        TORCH,
    ),
    Mutant(
        "fallback: pieces of the residual out of step",
        FALLBACK,
        "activated_(y_piece.add_(residual_piece), activation)",
        "activated_(y_piece.add_(residual[: len(y_piece)]), activation)",
        TORCH,
    ),
    Mutant(
        "torch backend: dy is overwritten",
        OPS,
        "        dy = gate(dy, y, activation)\n        bias",
        "        dy = dy.copy_(gate(dy, y, activation)) if dy.is_contiguous() else gate(dy, y, activation)\n        bias",
        TORCH,
    ),
    Mutant(
        "evaluation saves statistics that training overwrites",
        OPS,
        "saved=lambda args, outputs: saved(args, *outputs)",
        "saved=lambda args, outputs: saved(args, outputs[0], args[4], args[5])",
        TORCH,
    ),
    Mutant("second derivative through rstd lost", OPS, "to_x = -n.rstd.square()", "to_x = 0 * n.rstd.square()", SECOND),
    Mutant(
        "SyncBatchNorm: the spread of the processes' means is lost",
        "dlaccel/distributed.py",
        "(deviations + counts * (means - mean).square())",
        "deviations",
        ("tests/test_sync_batch_norm.py",),
    ),
    Mutant(
        "SyncBatchNorm: dx by this process's sums",
        "dlaccel/distributed.py",
        "dist.all_reduce(sums, group=group)",
        "pass",
        ("tests/test_sync_batch_norm.py",),
    ),
    Mutant(
        "SyncBatchNorm: gradient without the spread's part",
        FALLBACK,
        "_native(x, -of_x_hat * scale,",
        "_native(x, 0 * of_x_hat,",
        ("tests/test_sync_batch_norm.py",),
    ),
    Mutant(
        "aten's own gradient is derived again",
        OPS,
        "if dy is None or not torch.is_grad_enabled():",
        "if dy is None or torch.is_grad_enabled():",
        ("tests/test_contract.py -k 'third_derivative and batch_norm and auto'",),
    ),
]
