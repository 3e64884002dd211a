"""The command line: ``python -m tests.benchmarks``."""

from __future__ import annotations

import argparse
import json
import os
import sys


def main() -> int:
    """Measures the rows asked for and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="nbpeft and peft side by side.")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows whose name begins so")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default 1: steadier)")
    parser.add_argument("--repeats", type=float, default=1.0, metavar="FACTOR", help="measure more or less often")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print the Markdown table of the guide")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import dataclasses

    import torch

    from tests.benchmarks import harness, table

    torch.set_num_threads(arguments.threads)
    chosen = harness.rows(arguments.only)
    if not chosen or arguments.list:
        print("\n".join(f"{row.name:<20} {row.title}" for row in harness.rows()))
        return 0 if arguments.list else 2
    size = dataclasses.replace(harness.FULL, repeats=arguments.repeats)
    results = []
    for row in chosen:
        print(f"  {row.name} …", file=sys.stderr, flush=True)
        results.append(harness.measure(row, size))
    if arguments.json:
        print(json.dumps({"machine": table.machine(), "rows": [table.as_dict(result) for result in results]}, indent=1))
    elif arguments.markdown:
        print(table.as_markdown(results))
    else:
        print(f"{table.as_text(results)}\n\n{table.machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
