"""Times the contrastive distillation loss, forward and backward, against its rivals on this GPU or CPU.

    python benchmarks/bench_contrast.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/contrast.py. With --save the numbers go to
benchmarks/results/contrast-cpu.json or contrast-cuda.json.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("contrast", __doc__))
