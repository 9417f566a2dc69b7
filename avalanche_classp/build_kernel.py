"""Build the kernel of ``fused=True`` ahead of time: python -m avalanche_classp.build_kernel."""

import sys

from avalanche_classp.optim.backends import cpu_kernel

if __name__ == "__main__":
    sys.exit(0 if cpu_kernel.build() else 1)
