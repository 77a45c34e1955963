"""What evaluate() returns: estimates with verdicts, as text, frames, JSON, a figure or a page."""

import difflib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.wording import IDENTIFIED, Row, in_text, of_model, present

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("policy", "estimator", "value", "std_error", "low", "high", "interval", "ess",
           "covered_mass", "mean_weight", "max_share", "pareto_k", "verdict", "lam", "n",
           "note")  # fmt: skip
DIFFERENCES = ("policy", "baseline", "estimator", "difference", "std_error", "low", "high",
               "p_value", "p_holm", "verdict")  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Estimates of policies on one log; a number that the log does not support is nan.

    `diagnosed` is by policy: verdict, kinds of weights and their sums, figures' points.
    """

    rows: list[Row]
    differences: list[Row]
    diagnosed: dict[str, Row]
    about: Row

    def __post_init__(self) -> None:
        # nothing shown may give away what a verdict withholds, by whichever way it came here
        rows = [r if r["estimator"] == "bounds" else sealed(r) for r in self.rows]
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "differences", [sealed(r) for r in self.differences])
        known = {policy: discreet(facts) for policy, facts in self.diagnosed.items()}
        object.__setattr__(self, "diagnosed", known)

    @property
    def policies(self) -> list[str]:
        """Names, in the order in which they were asked for."""
        return list(dict.fromkeys([*self.diagnosed, *(row["policy"] for row in self.rows)]))

    def of(self, policy: str) -> list[Row]:
        """Rows of one policy."""
        return [row for row in self.rows if row["policy"] == policy]

    def verdict(self, policy: str) -> str:
        """Of the policy, or of its first row where it was not diagnosed."""
        if policy in self.diagnosed:
            return str(self.diagnosed[policy]["verdict"])
        return str(self.of(policy)[0]["verdict"])

    def frame(self) -> "pd.DataFrame":
        """One row per policy, estimator and interval."""
        return framed(self.rows, COLUMNS)

    def compare(self) -> "pd.DataFrame":
        """Paired differences against the baseline, p-values adjusted by Holm's steps (1979)."""
        return framed(self.differences, DIFFERENCES)

    def diagnostics(self, policy: str) -> Row:
        """All that was found out about the weights of one policy."""
        if policy not in self.diagnosed:
            near = difflib.get_close_matches(str(policy), list(self.diagnosed), n=1, cutoff=0.4)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown policy {policy!r}{hint}; there are: {', '.join(self.diagnosed)}"
            )
        return self.diagnosed[policy]

    def plot(self, path: str | Path) -> None:
        """Write the forest plot, PNG or SVG by the suffix of the path."""
        from evaluation import figures

        kind = Path(path).suffix.lower().lstrip(".")
        if kind not in ("png", "svg"):
            raise ValueError(f"expected a path that ends in .png or .svg, got {str(path)!r}")
        write(path, figures.saved(figures.forest, self, kind))

    def to_html(self, path: str | Path) -> None:
        """Write one page that needs no other file."""
        from evaluation.page import page

        write(path, page(self).encode())

    def to_json(self, path: str | Path) -> None:
        """Write strict JSON: what is withheld or infinite is null."""
        parts = {
            name: getattr(self, name) for name in ("rows", "differences", "diagnosed", "about")
        }
        text = json.dumps(strict(parts), indent=1, allow_nan=False, ensure_ascii=False)
        write(path, f"{text}\n".encode())

    def __str__(self) -> str:
        return in_text(self)


def sealed(row: Row) -> Row:
    """The row without the numbers that its verdict does not allow."""
    if row["verdict"] == IDENTIFIED or of_model(row):
        return row
    names = ("value", "difference", "std_error", "low", "high", "p_value", "p_holm")
    return {name: math.nan if name in names else x for name, x in row.items()}


def discreet(facts: Row) -> Row:
    """Diagnostics of a policy; without what, added to the model's value, is the withheld one."""
    if facts["verdict"] == IDENTIFIED:
        return facts
    curve = [{**point, "value": math.nan} for point in facts.get("curve") or []]
    return {**facts, "dm_dr_gap": None, "curve": curve or None}


def framed(rows: list[Row], names: Sequence[str]) -> "pd.DataFrame":
    """Rows as a frame with these columns."""
    import pandas as pd

    return pd.DataFrame({name: [row.get(name) for row in rows] for name in names})


def strict(x: Any) -> Any:
    """Values that JSON has; no nan, no infinity, no array."""
    if isinstance(x, dict):
        return {str(name): strict(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [strict(value) for value in x]
    if isinstance(x, np.ndarray | np.generic):
        return strict(x.tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def write(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def margin_chart_scalars(table: Table) -> dict[str, float]:
    """TensorBoard tags `ope/{policy}/{estimator}/value|low|high`, by the first interval of each."""
    scalars = {}
    for (policy, estimator), row in first_rows(table).items():
        for name in ("value", "low", "high"):
            if present(row[name]):
                scalars[f"ope/{policy}/{estimator}/{name}"] = float(row[name])
    return scalars


def margin_chart_layout(table: Table) -> dict[str, dict[str, list[Any]]]:
    """Custom-scalar layout: a margin chart for each estimate that has a band."""
    charts: dict[str, list[Any]] = {}
    for (policy, estimator), row in first_rows(table).items():
        if all(present(row[name]) for name in ("value", "low", "high")):
            tags = [f"ope/{policy}/{estimator}/{name}" for name in ("value", "low", "high")]
            charts[f"{policy}/{estimator}"] = ["Margin", tags]
    return {"off-policy": charts}


def first_rows(table: Table) -> dict[tuple[str, str], Row]:
    """By policy and estimator, the row of its first interval."""
    rows: dict[tuple[str, str], Row] = {}
    for row in table.rows:
        rows.setdefault((row["policy"], row["estimator"]), row)
    return rows
