from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import closeness
from tests.closeness import assert_approximates, assert_close, assert_same, bound, differ, is_close

ROOT = Path(__file__).resolve().parent.parent


def orders(dtype: torch.dtype, terms: int, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """The same products, added from the first term to the last and the other way round."""
    torch.manual_seed(0)
    x, y = torch.randn(2, rows, terms, dtype=torch.float64).to(dtype)
    parts = (x * y).float() if dtype.itemsize == 2 else x * y
    forwards, backwards = parts[:, 0].clone(), parts[:, -1].clone()
    for term in range(1, terms):
        forwards += parts[:, term]
        backwards += parts[:, -1 - term]
    return forwards.to(dtype), backwards.to(dtype)


@pytest.mark.parametrize("terms", [4, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_another_order_uses_a_quarter_and_a_missing_term_is_found(dtype: torch.dtype, terms: int) -> None:
    one, other = orders(dtype, terms)
    scale = float(one.double().abs().max())
    error = float((one.double() - other.double()).abs().max())
    assert error <= bound(dtype, scale, terms, depth=1) / 4
    assert_close(one, other, terms=terms, depth=1)
    wrong = one * (1 + 32 * torch.finfo(dtype).eps * terms**0.5)
    assert differ(wrong, one, terms=terms // 16, depth=1) and not is_close(wrong, one, terms=terms, depth=1)


def test_a_bound_grows_with_length_depth_and_size_alone() -> None:
    plain = bound(torch.float32, 1.0, 16, 1)
    assert plain == 8 * 4 * torch.finfo(torch.float32).eps
    assert bound(torch.float32, 1.0, 64, 1) == bound(torch.float32, 1.0, 16, 4) == bound(torch.float32, 2.0, 16, 1)
    assert bound(torch.bfloat16, 1.0, 64, 1) == 8 * torch.finfo(torch.bfloat16).eps
    assert bound(torch.int64, 9.0) == 0


@pytest.mark.parametrize(
    ("actual", "expected", "said"),
    [
        (torch.ones(2), torch.ones(2, 1), "the shape is"),
        (torch.ones(2), torch.ones(2).double(), "the dtype is"),
        (torch.ones(2), torch.tensor([1.0, 1.1]), "differs by 0.1"),
        (torch.ones(2), torch.tensor([1.0, float("nan")]), "differs by inf"),
        (torch.tensor([1.0, float("inf")]), torch.ones(2), "differs by inf"),
        (torch.full((2,), 1e-9), torch.zeros(2), "rounding explains 0 "),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, "the keys differ"),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)], "not 2 values"),
        ({"a": [torch.ones(1), torch.zeros(1)]}, {"a": [torch.ones(1), torch.ones(1)]}, r"\['a'\]\[1\]: differs by 1"),
        (1.0, 1.001, "differs by 0.001"),
        (torch.tensor([3]), torch.tensor([4]), "differs by 1"),
    ],
)
def test_what_is_not_close_says_why(actual: object, expected: object, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        assert_close(actual, expected)


def test_infinities_and_nan_in_the_same_places_are_equal() -> None:
    infinite = torch.tensor([1.0, float("-inf")])
    assert_close(infinite, infinite)
    assert_close(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), equal_nan=True)
    assert_close(torch.full((2,), 1e-9), torch.zeros(2), scale=1.0)
    assert_close(torch.tensor([1 + 1e-4]), torch.tensor([1.0]), dtype=torch.bfloat16)
    assert_approximates(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0]), 0.06)
    with pytest.raises(AssertionError, match=r"differs by 0\.1 where 0\.04 of 2 is allowed"):
        assert_approximates(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0]), 0.04)
    assert_same({"a": torch.ones(2)}, {"a": torch.ones(2)})
    with pytest.raises(AssertionError, match=r"\['a'\]: the two are not equal bit by bit"):
        assert_same({"a": torch.ones(2)}, {"a": torch.ones(2) + 1e-6})


def test_a_recorder_is_given_the_share_and_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []
    monkeypatch.setattr(closeness, "record", lambda place, share: seen.append((place, share)))
    assert_close(torch.tensor([1 + 2**-20]), torch.tensor([1.0]), terms=4, depth=4)
    ((place, share),) = seen
    assert place.startswith(f"{__file__}:") and place.endswith(" close") and share == 2**-20 / (8 * 4 * 2**-23)


def test_the_plugin_writes_a_table(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import torch\nfrom tests.closeness import assert_close\n"
        "def test_near():\n    for error in (2**-22, 2**-20):\n"
        "        assert_close(torch.tensor([1 + error]), torch.tensor([1.0]), terms=4, depth=4)\n"
        "    assert float(torch.manual_seed(1).initial_seed()) == 10_008\n",
        encoding="utf-8",
    )
    table = tmp_path / "table.tsv"
    options = ["-q", "-p", "tests.margins", f"--margins={table}", "--other-seed=1", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "-c", str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    heading, row = table.read_text(encoding="utf-8").splitlines()
    share, place, test = row.split("\t")
    assert heading == "share\tplace\ttest" and float(share) == 0.25
    assert place.endswith("test_one.py:5 close") and test.endswith("::test_near")


COMPARISONS = {"allclose", "assert_allclose", "assert_close", "isclose", "approx"}
OWN_BOUNDS = {"atol", "rtol", "abs", "rel", "abs_tol", "rel_tol"}
EXCEPTIONS = {
    "clients/test_clients.py": "numbers of trainings by other libraries, whose length is theirs to choose",
    "engine/methods/entries/test_waveft.py": "tables of wavelets as they are published, to so many digits",
    "engine/methods/lora/test_autograd.py": "each element by itself, to one step of bfloat16",
    "magics/test_plan.py": "bytes, of a size in GiB that was rounded",
    "scoring/test_result.py": "intervals as they are published, to so many digits",
    "scoring/test_statistics.py": "tables of statistics as they are published, to so many digits",
    "test_sweeps.py": "numbers as they are written, with so many digits",
    "widgets/test_training_panel.py": "a count of messages, which come with the time",
}


def own_bounds(text: str) -> list[str]:
    """Comparisons of a file that state a tolerance, or that have one for all lengths and sizes."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "torch.allclose",
            "torch.testing.assert_close",
            "np.testing.assert_allclose",
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in COMPARISONS:
            found += [f"line {node.lineno}: {one.arg}" for one in node.keywords if one.arg in OWN_BOUNDS]
    return found


@pytest.mark.parametrize(
    "text",
    [
        "assert torch.allclose(one, other)",
        "assert all(map(torch.allclose, ones, others))",
        "torch.testing.assert_close(one, other)",
        "assert one.allclose(other, atol=1e-5)",
        "assert one == pytest.approx(other, rel=1e-5)",
        "assert math.isclose(one, other, abs_tol=0.1)",
    ],
)
def test_a_tolerance_is_found_in_whatever_way_it_is_stated(text: str) -> None:
    assert own_bounds(text)
    assert not own_bounds("assert_close(one, other, terms=4)\nassert one == pytest.approx(other)")


def test_no_test_states_a_tolerance_of_its_own() -> None:
    tests = ROOT / "tests"
    texts = {path.relative_to(tests).as_posix(): path.read_text(encoding="utf-8") for path in tests.rglob("*.py")}
    assert len(texts) > 400
    found = {name: bounds for name, text in texts.items() if (bounds := own_bounds(text))}
    assert found.keys() == EXCEPTIONS.keys(), {name: found[name] for name in found.keys() - EXCEPTIONS.keys()}
