"""The wheel, and environments that hold it and nothing it does not ask for.

Nothing heavy is downloaded: what the wheel asks for is linked from the environment that runs this.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(folder: Path) -> Path:
    """Builds the project's wheel into a folder; pip fetches hatchling, which builds it."""
    pip(sys.executable, "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("nbpeft-*.whl")
    return wheel


def metadata_of(wheel: Path) -> Distribution:
    """What a wheel says of itself."""
    (found,) = distributions(path=[str(wheel)])
    return found


def pip(python: str | Path, *arguments: str) -> str:
    """Runs pip for an interpreter, which need not have it, and returns what it printed.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"pip {arguments[0]} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def requirements(package: Distribution, extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """What a distribution asks for on this machine, with the given extras of it."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def closure(package: Distribution, extras: Iterable[str] = ()) -> dict[str, Distribution]:
    """All that a distribution asks for, directly or not, as it is installed here: name -> distribution.

    Raises:
        PackageNotFoundError: one of them is not installed here.
    """
    found: dict[str, Distribution] = {}
    own, seen = canonicalize_name(package.metadata["Name"]), set[tuple[str, frozenset[str]]]()
    waiting = [(package, frozenset(extras))]
    while waiting:
        asking, of_it = waiting.pop()
        for requirement in requirements(asking, of_it):
            name = canonicalize_name(requirement.name)
            step = name, frozenset(requirement.extras)
            if step in seen:
                continue
            seen.add(step)
            if name != own:
                found[name] = distribution(name)
            waiting.append((package if name == own else found[name], step[1]))
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Environment:
    """A virtual environment with nothing but what is linked into it, and no pip.

    Attributes:
        folder: where it is.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path, linked: Iterable[Distribution], *, clear: bool = False) -> Environment:
        """Makes one, with links to distributions that are installed here; ``clear`` replaces one that is there."""
        if clear:
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        made = cls(folder)
        # Beside the environment's own folder, where pip would try to replace what it installs in another version.
        links = folder / "linked"
        links.mkdir()
        for item in linked:
            _link(item, links)
        (made.packages / "linked.pth").write_text(str(links), encoding="utf-8")
        return made

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where pip installs packages for it."""
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, *arguments: str) -> str:
        """Runs its interpreter away from the checkout, and returns what it printed.

        Raises:
            RuntimeError: it failed; the message is what it said.
        """
        command = [str(self.python), "-I", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        if done.returncode:
            raise RuntimeError(f"{arguments[0]} failed:\n{done.stdout}\n{done.stderr}")
        return done.stdout


def _link(item: Distribution, folder: Path) -> None:
    tops = {file.parts[0] for file in item.files or ()} - {"..", "__pycache__"}
    for top in tops:
        if not (folder / top).exists():  # a folder that several packages share, such as ``cuda``
            (folder / top).symlink_to(str(item.locate_file(top)))
