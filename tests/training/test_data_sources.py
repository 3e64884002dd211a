"""The same rows from every source give the same tokens; what cannot be read is said in one line."""

from __future__ import annotations

import csv
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pandas
import pytest
import torch
from torch.utils.data import IterableDataset

from nbpeft._util import hub_access
from nbpeft.errors import ConfigError, MissingPackageError, TrainingError
from nbpeft.training import open_data, prepare_data, train
from nbpeft.training.data import StreamedRows, hub, sources
from nbpeft.training.data.hub import DatasetName
from tests.char_tokenizer import CharTokenizer
from tests.checkpoint import loopback
from tests.training.support import trainable

PAIRS = [{"prompt": f"{number} and {number} is ", "completion": str(2 * number)} for number in range(6)]
TOKENIZER = CharTokenizer()
EXPECTED = list(prepare_data(PAIRS, TOKENIZER))


def frame() -> Any:
    return pandas.DataFrame(PAIRS)


class Polars:
    """What of a DataFrame of polars is used."""

    columns = ("prompt", "completion")

    def to_dicts(self) -> list[dict[str, str]]:
        return PAIRS


class Numbers(IterableDataset[Any]):
    def __init__(self, rows: Any = PAIRS) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.mark.parametrize(
    "data",
    [
        PAIRS,
        tuple(PAIRS),
        [(row["prompt"], row["completion"]) for row in PAIRS],
        datasets.Dataset.from_list(PAIRS),
        frame(),
        Polars(),
        datasets.Dataset.from_list(PAIRS).to_iterable_dataset(),
        Numbers(),
    ],
    ids=["list", "tuple", "pairs", "dataset", "pandas", "polars", "stream", "torch stream"],
)
def test_rows_of_every_kind_become_the_same_tokens(data: Any) -> None:
    assert list(prepare_data(data, TOKENIZER)) == EXPECTED


def write_separated(path: Path, delimiter: str, rows: Any = PAIRS) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n\n" for row in PAIRS))
    (tmp_path / "rows.json").write_text(json.dumps(PAIRS))
    (tmp_path / "held.json").write_text(json.dumps({"version": 1, "data": PAIRS}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, PAIRS)))
    write_separated(tmp_path / "rows.csv", ",")
    write_separated(tmp_path / "rows.tsv", "\t")
    frame().to_parquet(tmp_path / "rows.parquet")
    return tmp_path


NAMES = ["rows.jsonl", "rows.json", "held.json", "lines.json", "rows.csv", "rows.tsv", "rows.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_kind_become_the_same_tokens(files: Path, name: str) -> None:
    assert list(prepare_data(files / name, TOKENIZER)) == EXPECTED
    assert list(prepare_data(f"{files / name}[2:4]", TOKENIZER)) == EXPECTED[2:4]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("rows", [PAIRS, [{"prompt": "a, b; c", "completion": 'd;\n"e", f'}] * 3])
def test_what_separates_cells_is_found(tmp_path: Path, delimiter: str, rows: Any) -> None:
    path = tmp_path / "rows.csv"
    write_separated(path, delimiter, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as a spreadsheet saves it
    assert open_data(path) == rows


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("ID;Ticket Text ;Team\n1;Hello, you, there;a\n2;b;c;d\n", ["ID", "Ticket Text ", "Team"]),
        ("a|b\n1,2|3\n4|5\n", ["a", "b"]),
        ("sep=;\r\na,b;c\r\n1;2\r\n", ["a,b", "c"]),
        ('a\tb\n"1\t2"\t3\n', ["a", "b"]),
    ],
)
def test_the_header_decides_what_separates_cells(tmp_path: Path, content: str, columns: list[str]) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8-sig")
    assert list(open_data(tmp_path / "a.csv", skip_bad=True)[0]) == columns


def test_a_separator_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a;b,c\n1;2,3\n")
    (tmp_path / "b.tsv").write_text("a;b\n1;2\n")
    assert open_data(tmp_path / "a.csv", ",") == [{"a;b": "1;2", "c": "3"}]
    assert open_data(f"{tmp_path}/a.csv[:1]", ";") == [{"a": "1", "b,c": "2,3"}]
    assert open_data(tmp_path / "b.tsv", ";") == [{"a": "1", "b": "2"}]
    assert len(prepare_data(tmp_path / "b.tsv", TOKENIZER, columns={"text": "b"}, separator=";")) == 1
    for data, separator, words in (
        (tmp_path / "a.csv", ",,", "must be one character"),
        (tmp_path / "a.csv", "", "must be one character"),
        ("rows.jsonl", ";", "is for .csv and .tsv files, and 'rows.jsonl' is none"),
        (PAIRS, ";", "is for .csv and .tsv files, and the data is a list"),
    ):
        with pytest.raises(TrainingError, match=words):
            open_data(data, separator)


def test_a_table_of_one_column_is_separated_by_commas(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text\n"a; b"\n"c, d"\n')
    assert open_data(tmp_path / "rows.csv") == [{"text": "a; b"}, {"text": "c, d"}]


def test_cells_are_as_long_as_they_are_for_the_time_of_reading(tmp_path: Path) -> None:
    before = csv.field_size_limit(1000)
    try:
        (tmp_path / "rows.csv").write_text(f"text\n{'a' * 200_000}\n")
        assert len(open_data(tmp_path / "rows.csv")[0]["text"]) == 200_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_the_longest_cell_fits_a_long_of_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(limit: int) -> int:
        if limit >= 2**31:
            raise OverflowError("Python int too large to convert to C long")
        return 131_072

    (tmp_path / "rows.csv").write_text("text\na\n")
    monkeypatch.setattr(csv, "field_size_limit", narrow)
    assert open_data(tmp_path / "rows.csv") == [{"text": "a"}]


def test_files_are_read_without_datasets_and_pandas(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets", "pandas", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in NAMES[:-1]:
        assert list(prepare_data(files / name, TOKENIZER)) == EXPECTED
    with pytest.raises(MissingPackageError, match=r"^Reading rows.parquet needs pyarrow: pip install pyarrow$"):
        open_data(files / "rows.parquet")
    with pytest.raises(
        MissingPackageError, match=r"^Reading the dataset 'some/name' needs datasets: pip install datasets$"
    ):
        open_data("some/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"^a.jsonl, line 2 is not JSON: Expecting value"),
        ("a.json", '{"a": 1, "b": 2}', r"^a.json contains an object with 2 keys; expected a list of rows"),
        ("a.json", "[1, ", r"^a.json is not JSON: "),
        ("a.json", "3", r"^a.json does not contain a list of rows"),
        ("a.csv", "text\nyes, no\n", r"^a.csv, line 2 has more cells than the 1 of its header \(separated by ','\)"),
        ("a.csv", "text;text\na;b\n", r"^a.csv has two columns called 'text': rename one of them"),
        ("a.csv", "text\n", r"^a.csv has no rows"),
        ("a.csv", b"text\n\xff\xfe\n", r"^a.csv is not UTF-8 text"),
        ("a.parquet", "text", r"^a.parquet is not Parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrainingError, match=message) as failure:
        open_data(tmp_path / name)
    assert "\n" not in str(failure.value)


TABLE = "Betreff;Nachricht;Kategorie\nGrüße;wie geht es?;gut\nPreis;zu hoch: 10 €;schlecht\n"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize("separator", [";", ","])
def test_a_table_in_the_encoding_of_a_spreadsheet_names_a_line_that_reads_it(
    tmp_path: Path, encoding: str, separator: str
) -> None:
    place = tmp_path / "mails.csv"
    place.write_bytes(TABLE.replace(";", separator).encode(encoding))
    with pytest.raises(
        TrainingError, match=r"mails.csv is not UTF-8 text: save it in that encoding, or pass"
    ) as failure:
        open_data(place)
    line = str(failure.value).partition("the table that ")[2].removesuffix(" reads.")
    read = eval(line, {"pandas": pandas})
    assert list(read.columns) == ["Betreff", "Nachricht", "Kategorie"]
    assert read["Betreff"][0] == "Grüße" and "€" in read["Nachricht"][1]


def test_a_wrong_separator_names_the_right_one(tmp_path: Path) -> None:
    place = tmp_path / "mails.csv"
    place.write_text(TABLE, encoding="utf-8")
    with pytest.raises(TrainingError, match="one column with the separator ',': the separator seems to be ';'"):
        open_data(place, ",")
    assert len(open_data(place, ";")) == 2
    place.write_text("text\nyes; no\nno\n")
    assert open_data(place, ",") == [{"text": "yes; no"}, {"text": "no"}]


def test_a_file_that_is_not_there_names_the_nearest(files: Path) -> None:
    with pytest.raises(TrainingError, match=r"There is no file '.*/row.csv'. Did you mean 'rows.csv'"):
        open_data(files / "row.csv")
    with pytest.raises(TrainingError, match="There is no folder '/nowhere'"):
        open_data("/nowhere/rows.csv")
    with pytest.raises(TrainingError, match=r"'\[x\]' is not a range of rows"):
        open_data(f"{files / 'rows.csv'}[x]")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/name", DatasetName("user/name", "", "", "")),
        ("user/name:train[:5]", DatasetName("user/name", "", "train", "[:5]")),
        ("user/name:english:train", DatasetName("user/name", "english", "train", "")),
    ],
)
def test_a_dataset_has_a_name(name: str, expected: DatasetName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load_named", lambda found: [found])
    assert open_data(name) == [expected]


def test_an_iterator_is_refused_with_the_remedy() -> None:
    with pytest.raises(TrainingError, match=r"found a generator. Make a list of it: list\(…\)"):
        open_data(row for row in PAIRS)


# Folders and the hub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository's folder, with two splits of JSON Lines; what ``datasets`` caches stays in the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "sums"
    place.mkdir()
    (place / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PAIRS))
    (place / "test.jsonl").write_text(f"{json.dumps(PAIRS[0])}\n")
    return place


@pytest.mark.parametrize(("what", "rows"), [("", PAIRS), (":test", PAIRS[:1]), (":train[2:4]", PAIRS[2:4])])
def test_a_folder_of_data_is_read_split_by_split(folder: Path, what: str, rows: Any) -> None:
    assert list(open_data(f"{folder}{what}")) == rows


def test_a_split_that_is_not_there_names_those_there_are(folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"Unknown split .*train.*test") as failure:
        open_data(f"{folder}:validation")
    assert "\n" not in str(failure.value)
    (folder / "train.jsonl").rename(folder / "validation.jsonl")
    with pytest.raises(TrainingError, match=r"Say which split of '.*sums': .*validation"):
        open_data(str(folder))
    (folder / "validation.jsonl").unlink()
    assert list(open_data(f"{folder}[:1]")) == PAIRS[:1]


def test_a_folder_that_is_not_one_of_data_is_refused_at_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nothing" / "below").mkdir(parents=True)
    with pytest.raises(TrainingError, match="nothing' has no files; expected a folder with data"):
        open_data(str(tmp_path / "nothing"))
    monkeypatch.setattr(hub, "MOST_FILES", 1)
    with pytest.raises(TrainingError, match="sums' has more than 1 files; name one with only the data"):
        open_data(str(folder))


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(PAIRS)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(a=whole, b=whole.select([0])).save_to_disk(str(tmp_path / "two"))
    assert list(open_data(f"{tmp_path}/one[:2]")) == PAIRS[:2]
    assert list(open_data(f"{tmp_path}/two:b")) == PAIRS[:1]
    with pytest.raises(TrainingError, match=r"Say which split of '.*two': a, b"):
        open_data(f"{tmp_path}/two")


def go_online(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for owner in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(owner, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    files = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)


def refuses_connections() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["offline", "failing", "unreachable"])
def test_a_hub_that_does_not_answer_is_one_line_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried again: the clients of the hub would do so for half a minute."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with loopback.serving() as hub:
        hub.broken = True
        if kind != "offline":
            go_online(monkeypatch, hub.endpoint if kind == "failing" else refuses_connections())
        with pytest.raises(TrainingError) as failure:
            open_data("user/name:train[:10]")
    assert str(failure.value) == (
        "'user/name' is not a folder here, the hub is offline or cannot be reached, and it is not in the cache of "
        "datasets."
    )
    assert hub.asked == (["HEAD /"] if kind == "failing" else [])
    assert not waits


def test_a_dataset_that_the_hub_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback.serving() as hub:
        go_online(monkeypatch, hub.endpoint)
        with pytest.raises(
            TrainingError, match=r"^'user/name': Dataset 'user/name' doesn't exist on the Hub"
        ) as failure:
            open_data("user/name")
    assert "\n" not in str(failure.value)
    assert len(hub.asked) > 1


def test_a_dataset_is_read_from_the_hub_and_then_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lines = [f"{json.dumps(row)}\n".encode() for row in PAIRS]
    with loopback.serving() as hub:
        hub.files["datasets/user/sums"] = {"train.jsonl": b"".join(lines), "test.jsonl": lines[0]}
        go_online(monkeypatch, hub.endpoint)
        assert list(open_data("user/sums")) == PAIRS
        assert list(open_data("user/sums:train[:3]")) == PAIRS[:3]
        assert list(open_data("user/sums:test")) == PAIRS[:1]
        with pytest.raises(TrainingError, match=r"^'user/sums' cannot be read: Unknown split .*train.*test"):
            open_data("user/sums:tset")
        with pytest.raises(TrainingError, match=r"^'user/sums' cannot be read: BuilderConfig 'other' not found"):
            open_data("user/sums:other:train")
        assert "GET /datasets/user/sums/resolve/" in "".join(hub.asked)
        hub.asked.clear()
        hub.broken = True
        hub_access._known.clear()  # as after a minute
        assert list(prepare_data("user/sums[:3]", TOKENIZER)) == EXPECTED[:3]
        assert hub.asked == ["HEAD /"]


# Streams


def test_a_stream_is_read_no_further_than_it_is_trained() -> None:
    given: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(100_000):
            given.append(number)
            yield {"text": f"row {number}"}

    stream = datasets.IterableDataset.from_generator(rows)
    result = train(trainable(), stream, tokenizer=TOKENIZER, max_steps=3, per_device_train_batch_size=2)
    assert result.steps == 3
    assert len(given) < 50


def test_a_stream_without_a_number_of_steps_is_refused() -> None:
    model = trainable()
    with pytest.raises(
        ConfigError, match=r"^The rows are a stream of unknown length: set the number of steps, e.g. max_steps=200$"
    ):
        train(model, Numbers(), tokenizer=TOKENIZER)
    with pytest.raises(TrainingError, match="The stream has no rows"):
        train(model, Numbers([]), tokenizer=TOKENIZER, max_steps=1)


def test_a_bad_row_of_a_stream_is_named_when_it_comes() -> None:
    rows = [*PAIRS[:2], {"prompt": "a", "completion": 3}]
    with pytest.raises(TrainingError, match=r"Row 2: 'completion' is an int"):
        list(prepare_data(Numbers(rows), TOKENIZER))
    model = trainable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"Row 0 has the token id 105"):
        train(model, Numbers([{"text": "\x89\x88"}] * 4), tokenizer=TOKENIZER, max_steps=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_stream_can_be_gone_through_again() -> None:
    rows = prepare_data(Numbers([*PAIRS, {"prompt": "a", "completion": ""}]), TOKENIZER)
    assert isinstance(rows, StreamedRows)
    assert list(rows) == list(rows) == EXPECTED


def test_columns_of_one_name_are_refused() -> None:
    table = pandas.DataFrame([["a", "b", "c"]], columns=["prompt", "completion", "completion"])
    with pytest.raises(TrainingError, match=r"^The DataFrame has 2 columns named 'completion'; rename all but one\.$"):
        prepare_data(table, TOKENIZER)


def test_a_column_is_not_read_under_two_names() -> None:
    rows = [{"a": "x", "b": "y"}]
    with pytest.raises(TrainingError, match="'a' is given for both 'prompt' and 'completion'; name two columns"):
        prepare_data(rows, TOKENIZER, columns={"prompt": "a", "completion": "a"})
