"""Build the kernel of ``fused=True`` ahead of time: python -m avalanche_classp.build_kernel."""

import sys

from avalanche_classp.optim import kernel

if __name__ == "__main__":
    sys.exit(0 if kernel.build() else 1)
