"""Mutants of linear_relu."""

from tests.mutants import Mutant

TESTS = ("tests/test_linear_relu.py", "tests/test_contract.py -k linear_relu")

KERNELS, FALLBACK, OPS = "kernels/linear_relu.py", "dlaccel/fallback/linear_relu.py", "dlaccel/ops/linear_relu.py"

MUTANTS = [
    Mutant(
        "row mask of the store one too wide",
        KERNELS,
        "inside = (rows < M)[:, None] & (columns < N)[None, :]\n    tl.store(y",
        "inside = (rows <= M)[:, None] & (columns < N)[None, :]\n    tl.store(y",
    ),
    Mutant(
        "tail of K not masked on x",
        KERNELS,
        "x_block = tl.load(x_tile, mask=k[None, :] < K - start, other=0.0)",
        "x_block = tl.load(x_tile, mask=k[None, :] < BLOCK_K, other=0.0)",
    ),
    Mutant(
        "masked lanes of w undefined",
        KERNELS,
        "w_block = tl.load(w_tile, mask=k[:, None] < K - start, other=0.0)",
        "w_block = tl.load(w_tile, mask=k[:, None] < K - start)",
    ),
    Mutant(
        "last ragged block of K skipped",
        KERNELS,
        "for start in range(0, K, BLOCK_K):\n        if",
        "for start in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):\n        if",
    ),
    Mutant(
        "stride of y taken from dy",
        KERNELS,
        "tl.load(y + row * stride_ym + column * stride_yn",
        "tl.load(y + row * stride_dym + column * stride_dyn",
    ),
    Mutant("stride of the bias ignored", KERNELS, "columns.to(tl.int64) * stride_bn", "columns.to(tl.int64)"),
    Mutant("ReLU turns NaN into 0", KERNELS, "return tl.where(z < 0, 0.0, z)", "return tl.where(z > 0, z, 0.0)"),
    Mutant(
        "gradient passes where y is 0",
        KERNELS,
        "dz_block = tl.where(y_block <= 0, 0.0, dy_block)",
        "dz_block = tl.where(y_block < 0, 0.0, dy_block)",
    ),
    Mutant(
        "accumulated in float16",
        KERNELS,
        "out_dtype=ACCUMULATOR)\n        x_tile",
        "out_dtype=ACCUMULATOR).to(tl.float16).to(ACCUMULATOR)\n        x_tile",
    ),
    Mutant(
        "float64 accumulated in float32",
        "kernels/config.py",
        "return tl.float64 if torch.float64 in dtypes else tl.float32",
        "return tl.float32",
    ),
    Mutant(
        "int32 offsets of rows", KERNELS, "x_tile = x + (rows % M).to(tl.int64)[:, None]", "x_tile = x + (rows % M)[:, None]"
    ),
    Mutant(
        "last block of rows left out of db",
        KERNELS,
        'blocks = cdiv(M, chosen["ROWS"])',
        'blocks = max(M // chosen["ROWS"], 1)',
    ),
    Mutant(
        "fallback: gradient of the weight 1 % too large",
        FALLBACK,
        "else dz.t().mm(_as_2d(x))",
        "else 1.01 * dz.t().mm(_as_2d(x))",
    ),
    Mutant(
        "fallback: overwrites the incoming gradient",
        FALLBACK,
        "dz = _as_2d(_threshold_backward(dy, y, 0))",
        "dz = _as_2d(dy.masked_fill_(y <= 0, 0))",
    ),
    Mutant(
        "fallback: gradient of the bias wanted, not given",
        FALLBACK,
        "dz.sum(0) if mask[2] else None",
        "dz.sum(0) if mask[2] and mask[1] else None",
    ),
    Mutant(
        "second derivative by the weight lost",
        OPS,
        "as_2d(dz).t() @ as_2d(gdx) if ctx.wanted[2] and gdx is not None else None",
        "None",
    ),
    Mutant(
        "fake: shape of the last dimension wrong",
        OPS,
        "fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0]))",
        "fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[1]))",
    ),
]
