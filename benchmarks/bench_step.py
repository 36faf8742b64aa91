"""Times a whole training step against one written by hand on this GPU or CPU.

    python benchmarks/bench_step.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/step.py. With --save the numbers go to
benchmarks/results/step-cpu.json or step-cuda.json, which the documentation's tables are made from.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("step", __doc__))
