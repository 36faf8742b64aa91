"""Times the loss against a top-k record, forward and backward, beside the dense one of its rivals on this GPU or CPU.

    python benchmarks/bench_topk.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/topk.py. With --save the numbers go to
benchmarks/results/topk-cpu.json or topk-cuda.json.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("topk", __doc__))
