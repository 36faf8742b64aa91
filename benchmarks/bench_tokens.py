"""Times sampling and soft embeddings against eager PyTorch on this GPU or CPU.

    python benchmarks/bench_tokens.py [--device auto|cpu|cuda] [--seconds 6] [--save]

The cases, their checks and their rivals: tgt_fast/bench/tokens.py. With --save the numbers go to
benchmarks/results/tokens-cpu.json or tokens-cuda.json, which the documentation's tables are made from.
"""

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("tokens", __doc__))
