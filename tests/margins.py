"""How much of its bound each comparison uses: a pytest plugin, and a command that lists what uses much.

``python -m pytest -p tests.margins --margins FILE`` writes the largest share of each test and place to a table.
``python -m tests.margins [PATH …]`` does so with each set of kernels that this processor has, one, two and four
threads and three seeds, and lists what uses more than a quarter of its bound (``tests.closeness``): what a
quarter does not hold will fail on the processor of somebody else. Approximations are left out, as their error is
that of a method and not of rounding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import closeness
from tests.run import KERNELS, NUMERIC, SLOW, has_instructions, threads

ALLOWED = 0.25
ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "artifacts" / "margins"

Shares = dict[tuple[str, str], float]


class Recorder:
    """Collects the shares of one process; those of xdist's workers come to the process above them."""

    def __init__(self, table: Path) -> None:
        self.table = table
        self.shares: Shares = {}

    def __call__(self, place: str, share: float) -> None:
        """Notes a share of a bound."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        self.add({(place.removeprefix(f"{ROOT}/"), test): share})

    def add(self, shares: Shares) -> None:
        """Keeps the larger ones."""
        for key, share in shares.items():
            self.shares[key] = max(share, self.shares.get(key, 0.0))

    def pytest_testnodedown(self, node: Any) -> None:
        """Takes what a worker has collected."""
        self.add({(place, test): share for place, test, share in getattr(node, "workeroutput", {}).get("margins", ())})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Writes the table, or hands the shares to the process above."""
        rows = sorted(((share, *key) for key, share in self.shares.items()), reverse=True)
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["margins"] = [(place, test, share) for share, place, test in rows]
            return
        lines = [f"{share:.4f}\t{place}\t{test}" for share, place, test in rows]
        self.table.write_text("\n".join(["share\tplace\ttest", *lines, ""]), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the plugin."""
    parser.addoption("--margins", metavar="FILE", help="table of the shares of bounds that comparisons use")
    parser.addoption("--other-seed", type=int, default=0, help="changes the seeds that tests give to torch")


def pytest_configure(config: pytest.Config) -> None:
    """Starts recording."""
    if config.getoption("--margins"):
        closeness.record = recorder = Recorder(Path(config.getoption("--margins")))
        config.pluginmanager.register(recorder, "margins")
    other, plain = config.getoption("--other-seed"), torch.manual_seed

    def seeded(seed: int) -> torch.Generator:
        file = sys._getframe(1).f_code.co_filename
        by_a_test = "site-packages" not in file and not file.startswith(
            f"{ROOT}/nbpeft/"
        )  # seeds of methods are PEFT's
        return plain(int(seed) + (10_007 * other if by_a_test else 0))

    if other:
        torch.manual_seed = seeded


def main() -> int:
    """Runs the tests with each combination, and lists what uses too much of its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = {"native": {}, **{name: values for name, values in KERNELS.items() if has_instructions(name)}}
    parser.add_argument("--kernels", nargs="+", choices=sets, default=list(sets))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments, rest = parser.parse_known_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    found: Shares = {}
    for kernels, number, seed in product(arguments.kernels, arguments.threads, arguments.seeds):
        name = f"{kernels}, {number} threads, seed {seed}"
        table = OUTPUT / f"{kernels}-{number}-{seed}.tsv"
        options = [
            "-q",
            "-m",
            f"not ({SLOW})",
            "-p",
            "tests.margins",
            "--margins",
            str(table),
            "--other-seed",
            str(seed),
        ]
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / "artifacts" / f"inductor-margins-{kernels}")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(rest or NUMERIC)],
            cwd=ROOT,
            env={**os.environ, **sets[kernels], **threads(number), **cache},
            capture_output=True,
            text=True,
        )
        print(f"{name}: {(done.stdout.splitlines() or [done.stderr])[-1]}", flush=True)
        for row in table.read_text(encoding="utf-8").splitlines()[1:]:
            used, place, test = row.split("\t")
            key = (place, test.partition("[")[0])
            if not place.endswith(" approximates") and float(used) > max(ALLOWED, found.get(key, 0.0)):
                found[key] = float(used)
    for (place, test), share in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{share:8.3f}  {place}  {test.rpartition('::')[2]}")
    print(f"{len(found)} places use more than {ALLOWED} of their bound")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
