"""One call from a log to users: fitted, judged in words, kept and read back."""

import sys

import pytest
import torch
from synthetic import HashedTexts

import simulators.catalog
from experiments import fit_simulator
from simulators.catalog import load_catalog
from simulators.exposed import ExposureSimulator
from simulators.fitted import FittedSimulator


def command(monkeypatch, tmp_path, data, *words):
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "mine.yaml").write_text(f"_target_: {data}\nmodels: {{}}\n")
    argv = ["fit_simulator.py", "--config-dir", str(tmp_path), "data=mine", "progress=false",
            "dim=8", "cut=0.8", f"out={tmp_path / 'users'}", *words]  # fmt: skip
    monkeypatch.setattr(simulators.catalog, "TextEncoder", HashedTexts)
    monkeypatch.setattr(sys, "argv", argv)
    fit_simulator.main()


def test_purchases_make_users_that_can_be_read_back(monkeypatch, tmp_path, capsys):
    command(monkeypatch, tmp_path, "synthetic.load", "size=60", "window=120.0", "hidden=8")
    said = capsys.readouterr().out
    assert "Hit@10" in said
    assert "FittedSimulator.load(" in said
    catalog = load_catalog(tmp_path / "users" / "catalog.pt")
    users = FittedSimulator.load(tmp_path / "users" / "users.pt", catalog, patience=0.3)
    assert len(catalog) == 60
    assert f"{len(users.users)} starting points" in said
    assert users.assumed.patience == 0.3
    assert torch.isfinite(users.preference.bias).all()


def test_impressions_make_users_who_answer_what_is_shown(monkeypatch, tmp_path, capsys):
    real, asked = fit_simulator.calibration, []

    def noted(users, logs, **settings):
        asked.append(set(logs.users["user"]) & set(users.users.ids))
        return real(users, logs, **settings)

    monkeypatch.setattr(fit_simulator, "calibration", noted)
    command(monkeypatch, tmp_path, "feeds.feed", "size=40", "epochs=1")
    said = capsys.readouterr().out
    assert "click: " in said
    assert "leave: " in said
    assert asked == [set()]  # the figures are of users that were not fitted to
    catalog = load_catalog(tmp_path / "users" / "catalog.pt")
    users = ExposureSimulator.load(tmp_path / "users" / "users.pt", catalog)
    assert set(users.behaviours) == {"click", "like", "hate"}


def test_a_log_of_tables_needs_its_yaml(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, "sources.tables.load", "+data.config=null")
    assert "give the yaml that describes your tables" in capsys.readouterr().err
