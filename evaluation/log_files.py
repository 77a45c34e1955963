"""Parquet and CSV files as pieces of columns, a few ten thousand rows in memory at a time."""

import difflib
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.log_checks import IDS

if TYPE_CHECKING:
    import polars as pl

Array = np.ndarray
Piece = dict[str, Array]  # our name to (n,) or (n, d)
ROWS = 65_536  # rows of a piece: 512 KiB a column stay in the second-level cache
READ = 4 * ROWS  # rows that Polars hands over at once
AHEAD = 16 * ROWS  # rows of a large file that Polars may read ahead of us
KEY = "recplay"  # of what our own logs say of themselves


def find(where: str | Path | Sequence[str | Path]) -> list[str]:
    """Files of a path, a folder, a glob or a list of these, each sorted by name."""
    if not isinstance(where, str | Path):
        return [path for each in where for path in find(each)]
    text = str(where)
    if Path(text).is_dir():
        text = str(Path(glob.escape(text)) / "*.parquet")
    found = [text] if Path(text).is_file() else sorted(glob.glob(text, recursive=True))
    if not found:
        raise ValueError(f"no file matches {where}: expected .parquet or .csv files")
    return found


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Name the file that Polars could not read."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        kind = "CSV" if path.endswith(".csv") else "Parquet"
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as {kind} ({reason}): it may be truncated or damaged; write "
            "or copy it again, or leave it out"
        ) from error


def lazy(path: str) -> "pl.LazyFrame":
    """The file, not yet read."""
    import polars as pl

    return pl.scan_csv(path) if path.endswith(".csv") else pl.scan_parquet(path, glob=False)


class FileRows:
    """Columns of files under our names; what they declare is checked now, rows when read."""

    def __init__(
        self,
        where: str | Path | Sequence[str | Path],
        columns: Mapping[str, str | Sequence[str]],
        extra: Sequence[str],
    ) -> None:
        self.paths = find(where)
        self.columns = {**{name: name for name in extra}, **columns}
        self.extra = tuple(extra)
        self.counts: list[int] = []
        for path in self.paths:
            with readable(path):
                frame = lazy(path)
                self._check_types(path, dict(frame.collect_schema()))
                self.counts.append(int(count(frame)))
        self.ends = np.cumsum(self.counts)  # (files,)
        self.num_rows = int(self.ends[-1])

    @property
    def names(self) -> list[str]:
        """Ours."""
        return list(self.columns)

    def meta(self) -> dict[str, Any]:
        """What the first file says of itself."""
        import polars as pl

        if self.paths[0].endswith(".csv"):
            return {}
        with readable(self.paths[0]):
            return dict(json.loads(pl.read_parquet_metadata(self.paths[0]).get(KEY, "{}")))

    def where(self, row: int) -> str:
        """A row of the log in words."""
        file = int(np.searchsorted(self.ends, row, side="right"))
        file = min(file, len(self.paths) - 1)
        return f"row {row} (row {row - self.ends[file] + self.counts[file]} of {self.paths[file]})"

    def pieces(self, names: Sequence[str]) -> Iterator[Piece]:
        """Only these columns, in the order of files and rows, without holding a file whole."""
        start = 0
        for path, rows in zip(self.paths, self.counts, strict=True):
            with readable(path):
                frame = lazy(path)
                kinds = dict(frame.collect_schema())
                wanted = {f: None for name in names for f in self.files_columns(name)}
                picked = frame.select([self._column(f, kinds[f], names) for f in wanted])
                for chunk in chunks(picked, rows, whole=path.endswith(".csv")):
                    for at in range(0, len(chunk), ROWS):
                        part = chunk[at : at + ROWS]
                        yield {name: self._read(part, name, start) for name in names}
                        start += len(part)

    def files_columns(self, name: str) -> list[str]:
        """The file's columns of one of ours."""
        theirs = self.columns[name]
        return [theirs] if isinstance(theirs, str) else list(theirs)

    def _column(self, theirs: str, kind: Any, names: Sequence[str]) -> "pl.Expr":
        """Numbers as they are; ids of other types as hashes."""
        import polars as pl

        column = pl.col(theirs)
        ours = [name for name in names if theirs in self.files_columns(name)]
        if kind.is_integer() or kind.is_float() or not set(ours) & set(IDS):
            return column
        hashed = column.cast(pl.String).hash().reinterpret(signed=True)
        return pl.when(column.is_not_null()).then(hashed).alias(theirs)

    def _read(self, part: "pl.DataFrame", name: str, start: int) -> Array:
        """One of our columns of a part as an array; views wherever Polars can give one."""
        arrays = []
        for theirs in self.files_columns(name):
            series = part[theirs]
            if series.null_count() and name not in self.extra:
                row = int(series.is_null().arg_max() or 0)
                raise ValueError(
                    f"column {theirs!r} ({name}) is null in {self.where(start + row)}: fill it, "
                    "drop the row, or leave the column out"
                )
            arrays.append(matrix(series, name) if series.dtype.is_nested() else series.to_numpy())
        if len(arrays) == 1 and isinstance(self.columns[name], str):
            return arrays[0]
        return np.column_stack(arrays)  # (n, d)

    def _check_types(self, path: str, kinds: Mapping[str, Any]) -> None:
        """Every declared column is there and of a type that can be used."""
        import polars as pl

        for name in self.names:
            for theirs in self.files_columns(name):
                if theirs not in kinds:
                    near = difflib.get_close_matches(theirs, kinds, n=1)
                    hint = f", did you mean {near[0]!r}?" if near else ""
                    raise ValueError(
                        f"{path} has no column {theirs!r} (declared as {name}){hint} It has: "
                        f"{', '.join(kinds)}"
                    )
                kind = kinds[theirs]
                lists = name == "context" and kind.is_nested()
                numeric = kind.is_numeric() or kind == pl.Boolean
                if not (numeric or lists or name in IDS or name in self.extra):
                    raise ValueError(
                        f"column {theirs!r} of {path} must hold numbers to serve as {name}, it "
                        f"holds {kind}: convert it"
                    )


def chunks(frame: "pl.LazyFrame", rows: int, whole: bool) -> Iterator["pl.DataFrame"]:
    """A file of so many rows in frames of at most READ; `whole` in one go, else in stretches."""
    if whole or rows <= AHEAD:
        yield from frame.collect_batches(chunk_size=READ, maintain_order=True)
        return
    for first in range(0, rows, AHEAD):
        yield from frame.slice(first, AHEAD).collect_batches(chunk_size=READ, maintain_order=True)


def count(frame: "pl.LazyFrame") -> int:
    """Rows of a file: from its footer where it has one."""
    import polars as pl

    return int(frame.select(pl.len()).collect().item())


def matrix(series: "pl.Series", name: str) -> Array:
    """A column of lists of one length, (n, d)."""
    import polars as pl

    if isinstance(series.dtype, pl.Array):
        return series.to_numpy()
    lengths = series.list.len().to_numpy()
    if (lengths != lengths[0]).any():
        raise ValueError(
            f"{name}: the lists of column {series.name!r} must have one length, got "
            f"{lengths.min()} to {lengths.max()}"
        )
    return series.explode().to_numpy().reshape(len(series), -1)
