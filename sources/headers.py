"""The columns of your tables, looked at before any table is read: what a yaml names must be there.

Only the first line of a CSV and the schema of a Parquet file are opened.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from sources.checks import closest

SEPARATORS = {";": '";"', "\t": '"\\t"', "|": '"|"', ",": '","'}  # as a yaml writes them
NEEDED = {
    "events": ("user", "item", "time"),
    "items": ("item",),
    "users": ("user",),
    "relations": ("source", "target"),
}


def check_headers(about: dict[str, Any], path: Path) -> None:
    """Refuse columns that the yaml at `path` names, or needs, and its files do not have."""
    for table, needed in NEEDED.items():
        if table not in about:
            continue
        part, where = about[table], f"{path}: {table}"
        renamed = {str(ours): str(theirs) for ours, theirs in part.get("columns", {}).items()}
        of_file = [(theirs, f"mapped to {ours}") for ours, theirs in renamed.items()]
        of_file += [(str(column), "a rule of keep") for column in part.get("keep", {})]
        named = [(column, f"all {table} have one") for column in needed]
        for role, names in about.get("roles", {}).items():
            if role.startswith(table.removesuffix("s")):
                named += [(name, f"roles.{role} names it") for name in names]
        have = columns_of(part, path.parent, where)
        for name, why in of_file + [pair for pair in named if pair[0] not in renamed]:
            if name not in have:
                ours = f", or map it with columns: {{{name}: ITS NAME IN THE FILE}}"
                raise ValueError(
                    f"{where} ({part['file']}) lacks the column '{name}' ({why}), it has {have}: "
                    f"name the one that means it{ours * ((name, why) in named)}."
                    f"{closest(name, have)}"
                )
    for role, names in about.get("roles", {}).items():
        table = "users" if role.startswith("user") else "items"
        if names and table not in about:
            raise ValueError(
                f"{path}: roles.{role} names {names}, columns of {table}, and there is no part "
                f"{table}: say {table}: {{file: ...}}"
            )


def columns_of(part: dict[str, Any], folder: Path, where: str) -> list[str]:
    """Names of the columns of a table's files together."""
    given = part["file"] if isinstance(part["file"], list) else [part["file"]]
    have: dict[str, None] = {}
    for file in given:
        have |= dict.fromkeys(header(folder / str(file), part, where))
    return list(have)


def header(file: Path, part: dict[str, Any], where: str) -> list[str]:
    """Names of a file's columns; a CSV with another separator than the yaml's is refused."""
    separator = str(part.get("separator", ","))
    try:
        if file.suffix.lower() in (".parquet", ".pq"):
            import pyarrow.parquet as parquet

            return [str(name) for name in parquet.read_schema(file).names]
        found = pd.read_csv(
            file, sep=separator, encoding=part.get("encoding", "utf-8"), nrows=0, index_col=False
        )
    except (ValueError, OSError, LookupError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(
            f"{file} cannot be read ({error}): expected a table whose first line names its "
            "columns; check separator and encoding"
        ) from None
    names = [str(name) for name in found.columns]
    others = [other for other in SEPARATORS if other != separator and other in names[0]]
    if len(names) == 1 and others:
        said = SEPARATORS[max(others, key=names[0].count)]
        comma = ' (and decimal: "," if its numbers are like 3,50)' * (said == '";"')
        raise ValueError(
            f"{file} is one column, {names[0][:60]!r}, if {separator!r} separates: say "
            f"separator: {said}{comma} beside the file in {where}"
        )
    return names
