"""A thread block of an NVIDIA GPU, in NumPy: runs the PTX that Triton makes of a kernel, where there is no GPU.

    with emulated("sm_90"):
        dlaccel.functional.batch_norm(...)  # or any call that launches kernels, on CPU tensors

Every launch inside is compiled for the target and executed from its PTX: layouts, shuffles, shared memory, asynchronous copies,
tensor cores and descriptors are the compiler's, and the arithmetic is the instructions'. A launch that breaks a rule raises
Fault, which names the instruction and the block:

memory      an access outside the tensors given to the kernel, or outside the block's shared memory
alignment   an access that is not a multiple of its own width, as hints that lie (`tl.multiple_of`) and launches prepared for
            other pointers make them
barriers    one that only some of a block's threads reach
hazards     shared memory written by one warp and read or written by another with no barrier in between
registers   what no instruction has written holds NaN

Blocks run one after another, in the order of the grid; the warps of a block in step. A branch that threads take differently
runs both ways, the lower address first. Asynchronous copies take effect at the wait for them. Not seen: races between blocks
(interp_checks.py has them), what ptxas makes of the PTX, time. Approximations (ex2.approx, div.full) are rounded results.

References: PTX ISA 8.7, sections 9.7 (instructions), 9.7.14 (mma fragments), 9.7.15 (wgmma, matrix descriptors), 5.5 (tensors).
"""

from __future__ import annotations

from tests.ptx.launches import emulated
from tests.ptx.memory import Fault

__all__ = ["Fault", "emulated"]
