"""Rows out of files (JSON lines, JSON, CSV, Parquet), a saved dataset, or the Hugging Face Hub.

A row that cannot be read comes out as a `BadRow` in its place, so that whoever reads can stop at it or
count it and go on. What is wrong with a whole file is a `DataError`.
"""

import codecs
import csv
import difflib
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lora_rm.config import GLOB
from lora_rm.console import say
from lora_rm.data.fields import listed, shown
from lora_rm.errors import DataError, first_line

JSON_LINES = (".jsonl", ".ndjson")
PACKABLE = (*JSON_LINES, ".json", ".csv")
SUFFIXES = (*(suffix + packed for suffix in PACKABLE for packed in ("", ".gz")), ".parquet")
SAVED = ("state.json", "dataset_dict.json")
"""Files of a folder written by `save_to_disk`."""

DESCRIPTION = "dataset_info.json"
"""Tells of a folder's files, in LLaMA-Factory's for one, and holds no rows."""

SPLITS = {
    "train": ("train", "training", "trainset"), "test": ("test", "testing", "testset"), "eval": ("eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"), "held out": ("heldout", "holdout"),
}  # fmt: skip
"""Words in the names of files that say of which part of a data set they are."""

MAX_ROW_BYTES = 32 * 2**20
"""Longest row, as JSON or CSV: ten times a pair of a million tokens; unpacked it takes up to 25 times as much."""

BLOCK = 2**20
"""Bytes that are read at once."""

MAX_JSON_BYTES = 2**30
"""Largest .json file, which is read as a whole; .jsonl has no limit."""

MAX_RATIO = 100
"""Text packs to a third or a tenth. What unpacks to more than this many times its size was made to fill memory."""

ALWAYS_UNPACKED = 8 * 2**20
"""Bytes that any archive may unpack to."""

MIN_PACKED_ROW = 2
"""Fewest bytes of an archive that a row takes: "Is 17 even?,no,yes", counted up, packs to 2.6. A copy packs to less."""

ALWAYS_ROWS = 100_000
"""Rows that any archive may hold; a row takes 40 microseconds and a kilobyte, however small it was packed."""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*(:\w[\w.+/-]*)?)?")
"""`org/name`, or `org/name:part` for one of its configurations or folders."""

SET_SPLIT = "Set one with --data.train-split or --data.eval-split."

WANTS_PART = re.compile(
    r"Config name is missing|There are multiple '.*' config|BuilderConfig '.*' not found|Couldn't find cache for"
)
"""How datasets says that no configuration was named, or one that is not there; on the Hub and in its cache."""

# A CSV cell is text; the name of its column says what else it can be.
NUMBER_COLUMNS = {
    "margin",
    "probability",
    "score_chosen",
    "score_rejected",
    "chosen_score",
    "rejected_score",
    "chosen_rating",
    "rejected_rating",
    "chosen-rating",
    "rejected-rating",
    "overall_preference",
    "preference_strength",
    "better_response_id",
    "rating",
    "score",
    "label",
}
LIST_COLUMNS = {"responses", "scores", "ranks", "completions", "answers", "tools", "history"}
MESSAGE_COLUMNS = {
    "prompt",
    "context",
    "conversations",
    "chosen",
    "rejected",
    "conversation_a",
    "conversation_b",
    "messages",
    "rejected_response",
    "response1",
    "response2",
    "response_0",
    "response_1",
    "response_2",
    "response_a",
    "response_b",
    "response",
    "completion",
}
JSON_COLUMNS = LIST_COLUMNS | MESSAGE_COLUMNS
TEXT_COLUMNS = {"question", "instruction", "input", "query", "system", "subset", "winner", "tie"}
COLUMNS = NUMBER_COLUMNS | JSON_COLUMNS | TEXT_COLUMNS
"""All that `lora_rm.data.formats` reads."""

LIST_OR_OBJECT = re.compile(r"\s*[\[{]")
"""How a cell begins that may hold messages; most hold a text, of which `json.loads` takes longer to find out."""

# What `Dataset.to_csv` makes of a list of messages: Python's notation, which JSON cannot read.
PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{'(role|content|from|value)'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as the file has it."""

    values: dict[str, Any]
    """Column name -> value."""

    source: str
    """Where it stands: `pairs.jsonl line 17`, or `pairs.parquet row 17`; both count from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be read."""

    source: str
    """Where it stands, as in `Row`."""

    reason: str
    """A few words to count it under, such as `broken JSON`."""

    message: str
    """What is wrong and what is allowed, without the source."""


def read_rows(
    source: str, *, split: str = "train", columns: Mapping[str, str] | None = None
) -> Iterator[Row | BadRow]:
    """Yields the rows of files, a saved dataset or a dataset on the Hub, one after the other.

    Args:
        source: A file with one of `SUFFIXES`; a folder of such files or a pattern like `data/*.jsonl`, read in sorted
            order; a folder written by `save_to_disk`; or a Hub id, which a colon and a configuration or folder may
            follow: `Anthropic/hh-rlhf:harmless-base`.
        split: Which split of a saved or Hub dataset; a file has none.
        columns: What columns are called there, by their names here (`data.columns`).

    Raises:
        DataError: If the source does not exist, is damaged, of an unknown type, or holds no rows; or `columns` has a name
            that is not read.
    """
    columns = columns or {}
    check_columns(columns)
    is_empty = True
    for row in _open(source, split, columns):
        is_empty = False
        yield _renamed(row, columns) if columns and isinstance(row, Row) else row
    if is_empty:
        raise DataError(f"{source} holds no rows. A source needs at least one; check how it was written.")


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises if `data.columns` has a name that is not read.

    Raises:
        DataError: If so, with the nearest name.
    """
    for name in sorted(columns.keys() - COLUMNS):
        near = difflib.get_close_matches(name, sorted(COLUMNS), n=1)
        advice = f"Did you mean {near[0]}?" if near else "Write {name here: name there}: {chosen: winner}."
        raise DataError(f"data.columns has {shown(name)}, and no column of that name is read. {advice}")


def _renamed(row: Row, columns: Mapping[str, str]) -> Row | BadRow:
    """The row with the columns' names here."""
    for name, there in columns.items():
        if there not in row.values:
            message = (
                f"column '{there}', which data.columns reads as '{name}', is missing (found: {listed(row.values)}). "
                "Correct data.columns, or add the column."
            )
            return BadRow(source=row.source, reason="missing field", message=message)
    others = {name: value for name, value in row.values.items() if name not in columns.values()}
    values = others | {name: row.values[there] for name, there in columns.items()}
    return Row(values=values, source=row.source)


def find_files(source: str) -> list[Path]:
    """The files that a source names, or the one folder of a saved dataset; none for a dataset on the Hub.

    Raises:
        DataError: If there is no such file, or one is of an unknown type.
    """
    try:
        path = Path(source).expanduser()
        path.stat()
        found = sorted(path.iterdir()) if path.is_dir() else [path]
    except FileNotFoundError:
        found = []
        if GLOB.search(source):
            found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 - takes no absolute pattern
    except (OSError, ValueError, RuntimeError) as error:  # no permission, too long, NUL, ~nobody
        raise DataError(f"{shown(source)} cannot be looked up: {error}. Check the path.") from error
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED):
            return [path]
        named = [file for file in found if file.name[0] != "." and file.name != DESCRIPTION]
        files = [file for file in named if _suffix(file) and file.is_file()]
        if not files:
            there = listed(dict.fromkeys(file.name for file in found))
            raise DataError(
                f"{source} is a folder without preference files (found: {there}). Allowed: a folder of files that end with "
                f"{', '.join(SUFFIXES)}, or one written by `datasets.save_to_disk`; give another."
            )
        return files
    for file in found:
        if not file.is_file():
            raise DataError(
                f"{file} is no regular file. Allowed: files, or one folder; save what it gives first."
            )
        if not _suffix(file):
            raise DataError(f"{file} has an unknown type. Allowed: {', '.join(SUFFIXES)}; convert it to one.")
    if not found and (_suffix(path) or not HUB_ID.fullmatch(source)):
        raise DataError(f"{source}: no such file. Check the path; it is looked up from {Path.cwd()}.")
    return found


def check_one_split(source: str) -> None:
    """Looks whether a folder holds what is trained on and what is not, going by names.

    Raises:
        DataError: If so.
    """
    files = find_files(source)
    if not Path(source).expanduser().is_dir():
        return
    found: dict[str, str] = {}
    for file in files:
        words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", file.name)}
        splits = [split for split, names in SPLITS.items() if words & set(names)]
        if len(splits) == 1:
            found.setdefault(splits[0], file.name)
    if len(found) > 1:
        named = ", ".join(f"{split}: {listed([name])}" for split, name in found.items())
        raise DataError(
            f"{source}: holds files of several splits, by their names ({named}), and all of a folder would be read. Give each "
            f"side its own files, by a pattern in quotes like '{glob.escape(source)}/*train*'."
        )


def tell_left_out(source: str) -> None:
    """Says what of a folder is not read, beside its description and what is hidden."""
    files = find_files(source)  # raises if it cannot be looked up
    folder = Path(source).expanduser()
    if not files or files == [folder] or not folder.is_dir():
        return
    ignored = {*files, folder / DESCRIPTION, folder / "README.md"}
    others = [path for path in sorted(folder.iterdir()) if path not in ignored and path.name[0] != "."]
    if others:
        names = listed(f"{path.name}/" if path.is_dir() else path.name for path in others)
        say(f"{source}: files {listed(file.name for file in files)} are read; not read: {names}.")


def _suffix(path: Path) -> str:
    return next((known for known in SUFFIXES if path.name.lower().endswith(known)), "")


def _open(source: str, split: str, columns: Mapping[str, str]) -> Iterator[Row | BadRow]:
    """Chooses the reader by what the source is."""
    files = find_files(source)
    if not files:
        return _hub_rows(source, split)
    if files[0].is_dir():
        return _saved_rows(source, files[0], split)
    return chain.from_iterable(_file_rows(str(file), file, columns) for file in files)


def _file_rows(source: str, path: Path, columns: Mapping[str, str]) -> Iterator[Row | BadRow]:
    suffix = _suffix(path)
    if suffix.startswith(".csv"):
        rows = _csv_rows(source, path, {there: name for name, there in columns.items()})
    else:
        readers = dict.fromkeys(JSON_LINES, _json_line_rows) | {
            ".json": _json_rows,
            ".parquet": _parquet_rows,
        }
        rows = readers[suffix.removesuffix(".gz")](source, path)
    return _no_more_than_packed(rows, source, path) if suffix.endswith((".gz", ".parquet")) else rows


def _no_more_than_packed(rows: Iterable[Row | BadRow], source: str, path: Path) -> Iterator[Row | BadRow]:
    """Stops at an archive of more rows than its bytes can say something in."""
    size = path.stat().st_size
    allowed = max(ALWAYS_ROWS, size // MIN_PACKED_ROW)
    for number, row in enumerate(rows):
        if number == allowed:
            raise DataError(
                f"{source}: its {size:,} bytes hold more than {allowed:,} rows, which are copies of each other. "
                "If it is meant so, unpack it and give the plain file."
            )
        yield row


def _lines(source: str, path: Path) -> Iterator[bytes]:
    r"""Yields the lines of a plain or gzipped file with their line ends, without a byte order mark.

    Lines end at `\n` only: a text may hold U+2028 and the others that `str.splitlines` splits at.
    """
    return chain.from_iterable(map(io.BytesIO, _blocks(source, path)))


def _blocks(source: str, path: Path) -> Iterator[bytes]:
    """Yields whole lines by the mebibyte: a loop over lines in Python takes as long as parsing them as CSV."""
    number, parts, size = 0, list[bytes](), 0
    for block in _content(source, path):
        end = block.rfind(b"\n") + 1
        size += block.find(b"\n") + 1 if end else len(block)
        # only a line that goes through blocks can be as long
        if size > MAX_ROW_BYTES:
            raise DataError(
                f"{source} line {number + 1}: is longer than {MAX_ROW_BYTES // 2**20} MiB, which no row is. "
                "Write one row a line, and see what wrote the file."
            )
        if end:
            number += block.count(b"\n")
            yield b"".join([*parts, block[:end]])
            parts, size = [], len(block) - end
        parts.append(block[end:])
    yield b"".join(parts)


def _content(source: str, path: Path) -> Iterator[bytes]:
    """Yields a plain or gzipped file by the mebibyte, without a byte order mark."""
    is_packed = path.name.lower().endswith(".gz")
    try:
        unpacked = _Unpacked(source, path)
        with gzip.open(path) if is_packed else path.open("rb") as file:
            mark = codecs.BOM_UTF8
            while block := file.read(BLOCK):
                if is_packed:
                    unpacked.add(len(block))
                yield block.removeprefix(mark)
                mark = b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source} cannot be read to its end: {error}. Fetch or write it again.") from error


class _Unpacked:
    """Counts what an archive unpacks to, and stops at what was made to fill memory."""

    def __init__(self, source: str, path: Path) -> None:
        self.source = source
        self.size = path.stat().st_size
        self.total = 0

    def add(self, num_bytes: int) -> None:
        self.total += num_bytes
        self.check(self.total)

    def check(self, total: int) -> None:
        if total > max(ALWAYS_UNPACKED, MAX_RATIO * self.size):
            raise DataError(
                f"{self.source}: its {self.size:,} bytes unpack to more than {MAX_RATIO} times as many, which "
                "preferences do not. If it is meant so, unpack it and give the plain .jsonl file."
            )


def _json_line_rows(source: str, path: Path) -> Iterator[Row | BadRow]:
    for number, line in enumerate(_lines(source, path), 1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield BadRow(source=where, reason="not UTF-8", message=_not_utf8(error))
        except (ValueError, RecursionError) as error:
            message = f"broken JSON ({error}). Each line is one whole JSON object; see what wrote the line."
            yield BadRow(source=where, reason="broken JSON", message=message)
        else:
            yield _object_row(value, where)


def _json_rows(source: str, path: Path) -> Iterator[Row | BadRow]:
    parts, size = list[bytes](), 0
    for part in _content(source, path):
        parts.append(part)
        size += len(part)
        if size > MAX_JSON_BYTES:
            raise DataError(
                f"{source}: is larger than {MAX_JSON_BYTES // 2**20} MiB, and a .json file is read as a whole. "
                "Write it as .jsonl, one row a line, which has no limit."
            )
    content = b"".join(parts)
    if not content.strip():
        return
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: {_not_utf8(error)}") from error
    except (ValueError, RecursionError) as error:
        hint = "A file with one object a line is named .jsonl." if "Extra data" in str(error) else ""
        raise DataError(
            f"{source}: broken JSON ({error}). Mend it: a .json file is one list of rows. {hint}"
        ) from error
    if isinstance(value, dict):
        value = value.get("data")
    if not isinstance(value, list):
        raise DataError(
            f'{source} is not a list of rows. A .json file holds [...] or {{"data": [...]}}; convert it, or write .jsonl.'
        )
    for number, item in enumerate(value, 1):
        yield _object_row(item, f"{source} row {number}")


def _object_row(value: Any, where: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(values=value, source=where)
    found = {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number, true or false")
    message = (
        f"the row is {found}. A row is a JSON object with named fields; one list of rows is a .json file."
    )
    return BadRow(source=where, reason="wrong type", message=message)


def _csv_rows(source: str, path: Path, names: Mapping[str, str]) -> Iterator[Row | BadRow]:
    """`names` are those that columns have here, where they differ: they say what a cell can be."""
    # Conversations outgrow the default of 131,072 characters a cell.
    csv.field_size_limit(MAX_ROW_BYTES)
    # Bytes that are not UTF-8 pass as lone surrogates, which UTF-8 cannot hold, and are found in their row.
    texts = (block.decode(errors="surrogateescape") for block in _blocks(source, path))
    reader = csv.reader(chain.from_iterable(io.StringIO(text, newline="\n") for text in texts), strict=True)
    columns: list[str] = []
    last_line = 0
    while True:
        line = last_line + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{source} line {line}"
            message = f"broken CSV ({error}). A cell with commas, quotes or line breaks stands in double quotes; correct it."
            if not columns:
                raise DataError(f"{where}: {message}") from error
            yield BadRow(source=where, reason="broken CSV", message=message)
            continue
        finally:
            last_line = reader.line_num
        if not cells or not "".join(cells).strip():
            continue
        where = f"{source} line {line}"
        if columns:
            yield _cells_row(columns, names, cells, where)
        elif len(set(cells)) < len(cells):
            raise DataError(
                f"{where}: two columns have the same name. The first line names each column once."
            )
        else:
            columns = cells


def _cells_row(columns: list[str], names: Mapping[str, str], cells: list[str], where: str) -> Row | BadRow:
    if len(cells) != len(columns):
        message = f"{len(cells)} cells, but the first line names {len(columns)} columns. Each has one cell."
        return BadRow(source=where, reason="wrong number of cells", message=message)
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        message = "the bytes are not UTF-8. Only UTF-8 is read; save the file again with that encoding."
        return BadRow(source=where, reason="not UTF-8", message=message)
    for column, cell in zip(columns, cells, strict=True):
        if names.get(column, column) in JSON_COLUMNS and PYTHON_MESSAGES.match(cell):
            message = f"field '{column}' is in Python's notation. Write lists as JSON, or the file as .jsonl."
            return BadRow(source=where, reason="broken JSON", message=message)
    values = {
        column: _decode_cell(names.get(column, column), cell)
        for column, cell in zip(columns, cells, strict=True)
    }
    return Row(values=values, source=where)


def _decode_cell(column: str, cell: str) -> Any:
    """Reads numbers, booleans and JSON where the column calls for them; what cannot be read stays text."""
    if column == "tie":
        return {"": None, "true": True, "1": True, "false": False, "0": False}.get(cell.strip().lower(), cell)
    if column in NUMBER_COLUMNS:
        return _decode_number(cell)
    if column in JSON_COLUMNS:
        if not LIST_OR_OBJECT.match(cell):
            return None if column in LIST_COLUMNS and not cell.strip() else cell
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        # "[1, 2]" is a text to be answered, unless the column can hold nothing but a list.
        if (column in LIST_COLUMNS and isinstance(value, list)) or _is_messages(value):
            return value
    return cell


def _decode_number(cell: str) -> int | float | str | None:
    if not cell.strip():
        return None
    for number in (int, float):
        try:
            return number(cell)
        except ValueError:
            continue
    return cell


def _is_messages(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in items
    )


def _parquet_rows(source: str, path: Path) -> Iterator[Row | BadRow]:
    import pyarrow  # type: ignore[import-untyped]  # ships no types, as of 26.0
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    unpacked = _Unpacked(source, path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        unpacked.check(max((group.total_byte_size for group in groups), default=0))
        # few rows at once: a page holds a long text once and every row repeats it
        for batch in file.iter_batches(batch_size=32):
            unpacked.add(batch.nbytes)
            for offset in range(batch.num_rows):
                number += 1
                where = f"{source} row {number}"
                try:
                    values = batch.slice(offset, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield BadRow(source=where, reason="not UTF-8", message=_not_utf8(error))
                else:
                    yield Row(values=_cells_without_nulls(values), source=where)
    except DataError:
        raise
    except (
        Exception
    ) as error:  # pyarrow lets out what its decoders meet: OSError, KeyError, RecursionError ...
        raise DataError(
            f"{source} cannot be read to its end: {first_line(error)}. Fetch or write it again."
        ) from error


def _saved_rows(source: str, path: Path, split: str) -> Iterator[Row | BadRow]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # of any kind: datasets checks neither types nor names in what it reads
        message = "is not a folder written by `datasets.save_to_disk`. Name a file in it, or save it that way"
        raise DataError(f"{source} {message} ({first_line(error)}).") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{source} has no split '{split}'. It has: {', '.join(dataset)}. {SET_SPLIT}")
        dataset = dataset[split]
    yield from _dataset_rows(dataset.with_format(None), source)


def _hub_rows(source: str, split: str) -> Iterator[Row | BadRow]:
    import datasets

    name, _, part = source.partition(":")
    try:
        dataset = _load_part(name, part, split) if part else datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # the names to choose from stand in the second line, code for another program after them
        found = " ".join(str(error).partition("\nExample of usage")[0].split()) or type(error).__name__
        found = found.rstrip(".") if len(found) <= 800 else found[:800] + " .."
        advice = "Check the name, the split and the network."
        if "Unknown split" in found:
            advice = SET_SPLIT
        elif WANTS_PART.match(found):
            advice = f"Write a configuration or a folder of it after a colon, as in --data.train {name}:NAME."
        message = f"{source} is no local file, and the Hub does not give its split '{split}'"
        raise DataError(f"{message}: {found}. {advice}") from error
    yield from _dataset_rows(dataset, f"{source} {split}")


def _load_part(name: str, part: str, split: str) -> Any:
    """A configuration of a dataset on the Hub, or one of its folders if no configuration has that name."""
    import datasets

    try:
        return datasets.load_dataset(name, name=part, split=split)
    except ValueError as error:
        if not WANTS_PART.match(str(error)):
            raise
        try:
            return datasets.load_dataset(name, data_dir=part, split=split)
        except (FileNotFoundError, ValueError) as other:
            is_absent = isinstance(other, FileNotFoundError) or WANTS_PART.match(str(other))
            raise (error if is_absent else other) from None


def _dataset_rows(dataset: Iterable[dict[str, Any]], source: str) -> Iterator[Row]:
    number = 0
    rows = iter(dataset)
    while True:
        number += 1
        try:
            values = _cells_without_nulls(next(rows))
        except StopIteration:
            return
        except Exception as error:  # of any kind, out of pyarrow
            raise DataError(
                f"{source} row {number}: cannot be read: {first_line(error)}. Save the dataset again."
            ) from error
        yield Row(values=values, source=f"{source} row {number}")


def _cells_without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row, nulls in its values dropped; a column that is null as a whole is there."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Drops the nulls that Arrow fills in where one row, message or tool lacks a key that another has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _not_utf8(error: UnicodeDecodeError) -> str:
    found = f"byte 0x{error.object[error.start]:02x} at position {error.start} is not UTF-8"
    return f"{found}. Only UTF-8 is read; save the file again with that encoding."
