"""What the harness makes of equal sides: python -m benchmarks.noise

The same work three times, as a baseline and two other sides. How far their ratios are from 1 is what a difference
between two sides must exceed to mean something. One set of sides lies in the cache, one in memory.
"""

import torch

from benchmarks.harness import Report, arguments


def main() -> None:
    options = arguments(__doc__, quick={"calls": 1}, calls=60)
    report = Report("noise", options.quick, options.out)
    for what, length in (("equal sides, 1 MB", 1 << 18), ("equal sides, 32 MB", 1 << 23)):
        x = torch.ones(length)
        calls = options.calls * (1 << 23) // length if not options.quick else 1
        sides = {name: lambda x=x, calls=calls: [x.mul_(1.0) for _ in range(calls)] for name in ("one", "two", "three")}
        report.compare(what, sides, rounds=options.rounds)


if __name__ == "__main__":
    main()
