"""Times a step of gradient exploration against eager PyTorch on this GPU or CPU.

    python benchmarks/bench_explore.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/explore.py. With --save the numbers go to
benchmarks/results/explore-cpu.json or explore-cuda.json, which the documentation's tables are made from.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("explore", __doc__))
