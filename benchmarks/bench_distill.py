"""Times the distillation loss, forward and backward, against its rivals on this GPU or CPU.

    python benchmarks/bench_distill.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/distill.py. With --save the numbers go to
benchmarks/results/distill-cpu.json or distill-cuda.json, which the documentation's tables are made from.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("distill", __doc__))
