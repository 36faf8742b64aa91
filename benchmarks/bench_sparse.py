"""Times the loss against a top-k record, forward and backward, beside the dense one of its rivals on this GPU or CPU.

    python benchmarks/bench_sparse.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/sparse.py. With --save the numbers go to
benchmarks/results/sparse-cpu.json or sparse-cuda.json.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("sparse", __doc__))
