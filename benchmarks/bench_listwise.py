"""Times the listwise loss, forward and backward, against its rivals on this GPU or CPU.

    python benchmarks/bench_listwise.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/listwise.py. With --save the numbers go to
benchmarks/results/listwise-cpu.json or listwise-cuda.json.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("listwise", __doc__))
