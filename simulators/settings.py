"""Settings of fits and what is assumed of users: refused before any work, by their names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ABOVE_0 = {"window": "days", "gap": "minutes"}
AT_LEAST_1 = ("epochs", "hidden", "members", "trees")


@dataclass(frozen=True)
class Assumptions:
    """What purchases cannot tell; satiation they can: None takes it from the log."""

    patience: float = 0.1
    satiation: float | None = None
    drift: float = 0.0
    exposure: float | str = 0.0  # or "display"
    position: float = 0.0
    choice: str = "logit"
    trips: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.patience <= 1.0:
            raise ValueError(f"patience must be a probability in [0, 1], got {self.patience}")
        if self.trips < 1:
            raise ValueError(f"trips must be at least 1, got {self.trips}")
        if self.choice not in ("logit", "independent", "cascade"):
            raise ValueError(f"choice must be logit, independent or cascade, got {self.choice!r}")
        for name in ("satiation", "drift", "exposure", "position"):
            value = getattr(self, name)
            if name == "exposure" and isinstance(value, str):
                if value != "display":
                    raise ValueError(f"exposure must be a number or display, got {value!r}")
                continue
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what no log can be fitted with; each message begins with the name of its setting."""
    for name, unit in ABOVE_0.items():
        if name in settings and not 0.0 < settings[name] < math.inf:
            raise ValueError(f"{name} must be above 0 {unit}, got {settings[name]}")
    for name in AT_LEAST_1:
        if name in settings and settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
    if settings.get("offers") is not None:
        check_offers(settings["offers"])
    Assumptions(**{k: settings[k] for k in Assumptions.__dataclass_fields__ if k in settings})


def check_offers(path: str | Path) -> None:
    """Refuse a table of offers that is not there."""
    if not isinstance(path, str | Path) or not Path(path).is_file():
        raise ValueError(
            f"offers must be a CSV file of item, and price, discount or both, got {path!r}: there "
            "is no such file; give its path from where you are, or null for the usual prices"
        )


def check_display(exposure: float | str, log: str) -> None:
    """Refuse exposure=display of a `log` without a table of promotions."""
    if isinstance(exposure, str) and log != "complete_journey":
        raise ValueError(
            f"exposure=display: {log} comes with no table of promotions that says what "
            "was displayed where: measure yours with simulators.promotions.display_lift(logs, "
            "promotions, items) and give its log_shift as the number exposure= (docs/promotions.md)"
        )
