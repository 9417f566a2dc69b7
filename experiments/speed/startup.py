"""What `import avalanche_classp` takes beside `import torch`."""

from __future__ import annotations

import subprocess
import sys

from .measure import in_turn, ratio

COMMANDS = {
    "import torch": "import torch",
    "import avalanche_classp": "import avalanche_classp",
    "import torch and make an SGD": (
        "import torch\ntorch.optim.SGD([torch.nn.Parameter(torch.ones(1))])"
    ),
    "import avalanche_classp and make a CLASSPOptimizer": (
        "import torch\n"
        "from avalanche_classp import CLASSPOptimizer\n"
        "CLASSPOptimizer([torch.nn.Parameter(torch.ones(1))])"
    ),
}


def measure_startup(rounds: int) -> None:
    """Print the times of fresh processes."""

    def process(code: str) -> object:
        return subprocess.run([sys.executable, "-c", code], check=True)

    calls = {name: lambda code=code: process(code) for name, code in COMMANDS.items()}
    seconds = in_turn(calls, rounds, calls=1)
    torch_alone = seconds["import torch"]
    print(f"\nStart of a process, n = {rounds}; target at most 1.3 times import torch")
    for name, values in seconds.items():
        print(f"  {name}: {ratio(values, torch_alone)} times, {min(values):.2f} s at best")
