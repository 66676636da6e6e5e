"""Our kernels against Inductor, other libraries and the memory: `python -m normfuse bench`.

    python benchmarks/kernels.py --time-limit 540 --out benchmarks/results/kernels_h200.json \
        --plots benchmarks/results/plots
"""

import sys

from normfuse.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
