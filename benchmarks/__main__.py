"""`python -m benchmarks [NAME ...]`: run all benchmarks, or those named."""

import platform
import sys
import warnings

import torch

from benchmarks import lifecycle

BENCHMARKS = {"lifecycle": lifecycle.run}


def main(names: list[str]) -> None:
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"No benchmark {', '.join(sorted(unknown))}. There is: {', '.join(BENCHMARKS)}.")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers', about deprecations
    machine = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, one thread, {machine}; medians in ms, multiples of hand")
    for name in names or BENCHMARKS:
        for row in BENCHMARKS[name]():
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
