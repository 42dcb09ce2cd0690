"""Builds the native kernels: plain C, no Python or torch headers in the loops, called through ctypes.

The extension is optional. Where no C compiler is found the install still succeeds and engram runs its
slower torch path, saying so once (engram/tables/kernels.py).
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "engram.tables._native",
            sources=sorted(glob("engram/*/*.c")),
            depends=sorted(glob("engram/*/*.h")),
            # contract=off: a fused multiply-add rounds once where two operations round twice, so results
            # would depend on the instruction set. Every path must give the same bits.
            extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,
        )
    ]
)
