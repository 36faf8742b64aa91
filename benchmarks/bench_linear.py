"""Times the distillation loss from hidden states, forward and backward, against its rivals on this GPU or CPU.

    python benchmarks/bench_linear.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/linear.py. With --save the numbers go to
benchmarks/results/linear-cpu.json or linear-cuda.json.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("linear", __doc__))
