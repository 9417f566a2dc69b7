"""Build the kernel of ``fused=True`` ahead of time: python -m avalanche_classp.build_kernel."""

import argparse
import sys

from avalanche_classp.optim.backends import cpu_kernel

ABOUT = (
    "Compile the kernel of CLASSPOptimizer(fused=True) ahead of time, if it is not on disk. It "
    "needs a C++ compiler. The exit code is 0 if the kernel is there, else 1."
)

if __name__ == "__main__":
    program = "python -m avalanche_classp.build_kernel"
    argparse.ArgumentParser(program, description=ABOUT).parse_args()
    sys.exit(0 if cpu_kernel.build() else 1)
