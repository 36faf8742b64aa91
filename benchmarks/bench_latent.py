"""Times perturb and ascend against eager PyTorch and torch.compile on this GPU or CPU.

    python benchmarks/bench_latent.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/latent.py. With --save the numbers go to
benchmarks/results/latent-cpu.json or latent-cuda.json, which the documentation's tables are made from.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("latent", __doc__))
