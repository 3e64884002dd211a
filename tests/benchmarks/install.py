"""What an installation costs, for the guide: ``python -m tests.benchmarks.install``.

Builds the wheel, installs it into an environment that holds what it asks for and nothing else, and prints the wheel's
size, how long a first import takes there, and what each extra brings, as versions that are installed here.
"""

from __future__ import annotations

import tempfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

from tests.wheels import Environment, build_wheel, closure, metadata_of, pip, requirements

EXTRAS = ("", "train", "notebook", "bnb", "track", "all")
_IMPORTS = ("import nbpeft", "from nbpeft import LoraConfig, get_peft_model", "import torch, transformers")


def main() -> None:
    """Prints the three tables."""
    with tempfile.TemporaryDirectory(prefix="nbpeft-install-") as scratch:
        wheel = build_wheel(Path(scratch))
        metadata = metadata_of(wheel)
        bare = Environment.make(Path(scratch) / "bare", closure(metadata).values())
        pip(bare.python, "install", "--quiet", "--no-index", str(wheel))
        print(wheel_line(wheel), import_table(bare), extras_table(metadata), tree(metadata), sep="\n\n")


def wheel_line(wheel: Path) -> str:
    """The wheel's name, its size and that of what it unpacks to."""
    with zipfile.ZipFile(wheel) as archive:
        unpacked = sum(item.file_size for item in archive.infolist())
    return f"{wheel.name}: {wheel.stat().st_size / 1e3:,.0f} kB, {unpacked / 1e6:.1f} MB unpacked"


def import_table(environment: Environment, repeats: int = 5) -> str:
    """Seconds that imports take in fresh interpreters of an environment, the fastest, their own start not counted."""
    lines = ["| a first import | seconds |", "|---|---:|"]
    for statement in _IMPORTS:
        code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
        taken = [float(environment.run("-c", code)) for _ in range(repeats + 1)][1:]  # the first compiles to bytecode
        lines.append(f"| `{statement}` | {min(taken):.2f} |")
    return "\n".join(lines)


def extras_table(metadata: Distribution) -> str:
    """For each extra: what it asks for itself, and how many packages of which size that makes beside the engine's."""
    engine = closure(metadata)
    lines = ["| `pip install` | asks for | packages | MB |", "|---|---|---:|---:|"]
    for extra in EXTRAS:
        found = closure(metadata, filter(None, [extra]))
        added = {name: item for name, item in found.items() if not extra or name not in engine}
        own = {asked.name: "".join(sorted(asked.extras)) for asked in requirements(metadata, [extra])}
        direct = {asked.name for asked in requirements(metadata)} if extra else set()
        asks = ", ".join(sorted(f"`{name}`" for name in own if name not in direct and name != "nbpeft"))
        megabytes = sum(map(_bytes, added.values())) / 1e6
        sign, name = ("+", f"nbpeft[{extra}]") if extra else ("", "nbpeft")
        lines.append(f"| `{name}` | {asks} | {sign}{len(added)} | {sign}{megabytes:,.0f} |")
    return "\n".join(lines)


def tree(metadata: Distribution) -> str:
    """What the engine asks for, and what that asks for, each package under the first that does."""
    lines: list[str] = [f"nbpeft {metadata.version}"]
    seen: set[str] = set()
    installed = closure(metadata)

    def add(package: Distribution, depth: int) -> None:
        names = sorted({asked.name.lower().replace("_", "-") for asked in requirements(package)} & installed.keys())
        fresh = [name for name in names if name not in seen]
        seen.update(fresh)
        for name in fresh:
            lines.append(f"{'  ' * depth}{name} {installed[name].version}")
            add(installed[name], depth + 1)

    add(metadata, 1)
    return "\n".join(lines)


def _bytes(item: Distribution) -> int:
    return sum(file.size or 0 for file in item.files or ())


if __name__ == "__main__":
    main()
