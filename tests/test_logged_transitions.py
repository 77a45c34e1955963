"""From decision logs to transitions: what follows what, what ends, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from agents.base import AgentSpec, Decision, Transition
from agents.testing import synthetic_spec
from encoders.state import EMPTY, Observation
from evaluation.decisions import DecisionWriter
from experiments import logged_transitions
from experiments.logged_transitions import about_of, appended, batches, replay_of, survey

L, K = 8, 2
META: dict[str, Any] = {"catalog": "shop", "policy": "dqn", "env": {}, "adaptive": True}


@pytest.fixture
def spec() -> AgentSpec:
    return replace(
        synthetic_spec(num_items=20, slate_size=K), history_size=L, feedback_size=2, past_size=3
    )


class Sessions:
    """B users side by side, each in a session of their own until it ends."""

    def __init__(self, folder: Path, spec: AgentSpec, users: int, **options: Any) -> None:
        behaviours = ["buy", "click"]
        self.writer = DecisionWriter(folder, behaviours=behaviours, meta=META, **options)
        self.spec, self.users = spec, users
        self.rng = torch.Generator().manual_seed(users)
        self.user, self.episode = torch.arange(users), torch.zeros(users, dtype=torch.int64)
        self.step = torch.zeros(users, dtype=torch.int64)
        self.history = torch.full((users, L), EMPTY)
        self.feedback = torch.zeros(users, L, 2)
        self.truth: list[dict[str, Any]] = []

    def obs(self) -> Observation:
        b, s = self.users, self.spec
        owner = (self.user * 100 + self.episode).float()[:, None]  # told apart by what is seen
        return Observation(
            profile=owner.expand(b, s.profile_size).clone(),
            past=(self.user % 20)[:, None].expand(b, 3).clone(),
            past_count=torch.ones(b, 3), past_age=torch.ones(b, 3),
            history=self.history.clone(), feedback=self.feedback.clone(),
            context=self.step.float()[:, None].expand(b, s.context_size).clone(),
        )  # fmt: skip

    def play(self, terminated: list[int] = [], truncated: list[int] = [], *,  # noqa: B006
             empty: list[int] = [], excluded: torch.Tensor | None = None) -> None:  # noqa: B006  # fmt: skip
        """One step of all users; who leaves or runs out begins a new session."""
        b = self.users
        slate = torch.rand(b, 20, generator=self.rng)
        real = self.history.clamp(min=0)
        slate.scatter_(1, real, -1.0)
        slate = slate.argsort(dim=1, descending=True)[:, :K]
        slate[empty, 1] = EMPTY
        shown = slate != EMPTY
        chosen = {
            name: (torch.rand(b, K, generator=self.rng) < 0.4) & shown for name in ("buy", "click")
        }
        reward = torch.where(shown, torch.rand(b, K, generator=self.rng), 0.0)
        propensity = torch.rand(b, K, generator=self.rng).clamp(min=0.01)
        ends, over = (torch.zeros(b, dtype=torch.bool) for _ in range(2))
        ends[terminated], over[truncated] = True, True
        obs = self.obs()
        given = {
            "user": self.user, "episode": self.episode, "step": self.step,
            "time": torch.zeros(b, dtype=torch.float64),
            "decision": Decision(slate, propensity), "slot_reward": reward, "chosen": chosen,
            "terminated": ends, "truncated": over, "obs": obs,
            "excluded": obs.history if excluded is None else excluded,
        }  # fmt: skip
        self.writer.write(**{k: v.clone() if isinstance(v, torch.Tensor) else v
                             for k, v in given.items()})  # fmt: skip
        did = torch.stack(list(chosen.values()), dim=2).float()
        self.history, self.feedback = appended(self.history, self.feedback, slate, did)
        for row in range(b):
            self.truth.append({
                "user": int(self.user[row]), "episode": int(self.episode[row]),
                "step": int(self.step[row]), "slate": slate[row].tolist(),
                "buy": chosen["buy"][row].tolist(), "reward": float(reward[row].sum()),
                "propensity": float(torch.where(shown, propensity, 1.0)[row].sum()),
                "after": self.history[row].tolist(), "liked": self.feedback[row].tolist(),
                "terminated": bool(ends[row]), "truncated": bool(over[row]),
            })  # fmt: skip
        self.step += 1
        done = ends | over
        self.history[done], self.feedback[done] = EMPTY, 0.0
        self.episode += done
        self.step[done] = 0


def rows_of(folder: Path, spec: AgentSpec, batch: int = 1) -> list[Transition]:
    own = survey(folder, spec).own_mask
    return list(batches([folder], [about_of(folder, spec, "shop")], spec, batch, own))


def session_of(one: Transition) -> tuple[int, int, int]:
    """User, episode and step, from what was seen."""
    owner = int(one.obs.profile[0, 0])
    return owner // 100, owner % 100, int(one.obs.context[0, 0])


@pytest.fixture
def played(tmp_path: Path, spec: AgentSpec) -> Sessions:
    """Three users over parts of a few rows: their sessions are cut into many pieces."""
    sessions = Sessions(tmp_path / "log", spec, 3, flush_rows=9)
    sessions.play()
    sessions.play(terminated=[1], empty=[0, 2])
    sessions.play(truncated=[2], empty=[1])
    sessions.play(terminated=[0])
    sessions.play()
    sessions.play(truncated=[0], empty=[0])
    sessions.writer.close()
    return sessions


@pytest.mark.parametrize("rows", [3, 8192])
def test_every_step_is_followed_by_the_next_of_its_session(
    played: Sessions, spec: AgentSpec, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logged_transitions, "ROWS", rows)  # of a file, so that decisions are cut
    folder = played.writer.folder
    found = {session_of(one): one for one in rows_of(folder, spec)}
    truth = {(t["user"], t["episode"], t["step"]): t for t in played.truth}
    cut = {(1, 1, 3), (2, 1, 2)}  # the log breaks off there
    assert set(found) == set(truth) - cut
    for key, one in found.items():
        wanted = truth[key]
        assert one.decision.slate[0].tolist() == wanted["slate"]
        assert one.chosen[0].tolist() == wanted["buy"]
        assert float(one.reward) == pytest.approx(wanted["reward"])
        assert float(one.slot_reward.sum()) == pytest.approx(wanted["reward"])
        assert float(one.decision.propensity.sum()) == pytest.approx(wanted["propensity"])
        assert bool(one.terminated) == wanted["terminated"]
        assert bool(one.truncated) == wanted["truncated"]
        assert one.next_obs.profile[0, 0] == one.obs.profile[0, 0]  # never another session's view
        if wanted["terminated"]:
            continue
        assert one.next_obs.history[0].tolist() == wanted["after"]  # rebuilt where truncated
        assert one.next_obs.feedback[0].tolist() == wanted["liked"]
        assert torch.equal(one.next_mask, one.next_obs.history)
        assert int(one.next_obs.context[0, 0]) == key[2] + (not wanted["truncated"])


def test_a_replay_is_filled_with_all_of_them(played: Sessions, spec: AgentSpec) -> None:
    replay, logged = replay_of([played.writer.folder], spec, catalog="shop")
    assert (logged.steps, logged.used, logged.cut, logged.left_over) == (18, 16, 2, 0)
    assert (logged.episodes, logged.users, logged.policies) == (6, 3, ("dqn",))
    assert len(replay) == replay.capacity == 16
    assert replay.mask_kind == "history"
    batch = replay.sample(500, torch.Generator().manual_seed(0)).transition
    owner, step = batch.obs.profile[:, 0], batch.obs.context[:, 0]
    assert len(set(zip(owner.tolist(), step.tolist(), strict=True))) == 16
    follows = ~(batch.terminated | batch.truncated)
    assert (batch.next_obs.context[:, 0] == step + 1)[follows].all()
    assert (batch.next_obs.profile[:, 0] == owner).all()


def test_what_a_log_has_to_teach_is_counted(played: Sessions, spec: AgentSpec) -> None:
    _, logged = replay_of([played.writer.folder], spec, catalog="shop")
    frame = pd.DataFrame(played.truth)
    sessions = frame.groupby(["user", "episode"]).agg(
        reward=("reward", "sum"), left=("terminated", "any"), over=("truncated", "any")
    )
    whole = sessions[sessions.left | sessions.over]
    assert logged.session_reward == pytest.approx(whole.reward.mean(), rel=1e-5)
    items = {i for slate in frame.slate for i in slate if i != EMPTY}
    assert logged.coverage == len(items) / 20
    shown = sum(i != EMPTY for slate in frame.slate for i in slate)
    chance = sum(frame.propensity) - (2 * len(frame) - shown)  # an empty slot is certain
    assert logged.explored == pytest.approx(1.0 - chance / shown, abs=1e-5)


def test_users_of_two_logs_are_not_joined(tmp_path: Path, spec: AgentSpec) -> None:
    folders = []
    for name in ("one", "two"):
        sessions = Sessions(tmp_path / name, spec, 2)
        sessions.play()
        if name == "two":  # it would go on where the first one breaks off
            sessions.step += 1
            sessions.play(terminated=[0, 1])
        sessions.writer.close()
        folders.append(tmp_path / name)
    with pytest.raises(ValueError, match="nothing to learn from"):
        replay_of(folders[:1], spec, catalog="shop")
    replay, logged = replay_of(folders, spec, catalog="shop")
    assert (len(replay), logged.cut, logged.users) == (2, 4, 4)  # a gap breaks a session as well
    assert logged.policies == ("dqn",)


def test_chunks_are_equal_and_hardly_anything_is_left_over(
    tmp_path: Path, spec: AgentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logged_transitions, "CHUNK", 10)
    sessions = Sessions(tmp_path / "log", spec, 7)
    for _ in range(3):
        sessions.play(terminated=list(range(7)))
    sessions.writer.close()
    replay, logged = replay_of([tmp_path / "log"], spec, catalog="shop")
    assert (replay.batch, replay.length) == (7, 3)
    assert (logged.used, logged.left_over) == (21, 0)
    monkeypatch.setattr(logged_transitions, "CHUNK", 20)
    replay, logged = replay_of([tmp_path / "log"], spec, catalog="shop")
    assert (len(replay), logged.left_over) == (20, 1)


def test_a_trip_has_its_past_in_the_replay_once(
    tmp_path: Path, spec: AgentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(tmp_path / "log", spec, 4)
    for step in range(4):
        sessions.play(terminated=[0, 1, 2, 3] if step == 3 else [])
    sessions.writer.close()
    replay, _ = replay_of([tmp_path / "log"], spec, catalog="shop")
    monkeypatch.setattr(logged_transitions, "CHUNK", 4)
    packed, _ = replay_of([tmp_path / "log"], spec, catalog="shop")
    assert replay.touched == 16  # one chunk: nothing stands behind anything
    assert packed.touched == 4


def test_other_masks_than_the_history_are_kept(tmp_path: Path, spec: AgentSpec) -> None:
    sessions = Sessions(tmp_path / "log", spec, 2)
    sessions.play(excluded=torch.tensor([[3, 4, EMPTY], [5, EMPTY, EMPTY]]))
    sessions.play(truncated=[0, 1], excluded=torch.tensor([[6, EMPTY, EMPTY], [7, 8, 9]]))
    sessions.writer.close()
    found = {session_of(one): one for one in rows_of(tmp_path / "log", spec)}
    assert found[0, 0, 0].mask.tolist() == [[3, 4, EMPTY]]
    assert found[0, 0, 0].next_mask.tolist() == [[6, EMPTY, EMPTY]]
    last = found[0, 0, 1]
    assert last.next_mask[0].tolist() == [6, *last.decision.slate[0].tolist()]  # shown by now
    assert found[1, 0, 1].next_mask.tolist() == [[7, 8, 9]]  # no room
    replay, _ = replay_of([tmp_path / "log"], spec, catalog="shop")
    assert replay.mask_kind == "ids"


def test_a_slate_goes_behind_the_history_and_not_beyond_its_end() -> None:
    ids, told = torch.tensor([[4, EMPTY, EMPTY], [1, 2, 3]]), torch.zeros(2, 3, 1)
    told[0, 0] = 1.0
    slate, did = torch.tensor([[EMPTY, 7], [8, 9]]), torch.ones(2, 2, 1, dtype=torch.bool)
    history, feedback = appended(ids, told, slate, did)
    assert history.tolist() == [[4, 7, EMPTY], [1, 2, 3]]
    assert feedback[:, :, 0].tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def rewrite(folder: Path, change: Any) -> None:
    """Change the table of a log's only part."""
    path = folder / "part-00000.parquet"
    whole = pq.read_table(path)
    pq.write_table(change(whole).replace_schema_metadata(whole.schema.metadata), path)


def swap(name: str, column: Any) -> Any:
    return lambda t: t.set_column(t.column_names.index(name), name, column(t))


def nulled(name: str) -> Any:
    return swap(name, lambda t: pa.nulls(len(t), t[name].type))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop_columns(["past", "history"]), "what the policy saw was not logged"),
        (nulled("context"), "does not say what the policy saw"),
        (lambda t: t.drop_columns(["propensity"]), "has no column propensity"),
        (nulled("propensity"), r"propensity must be in \(0, 1\], got nan in decision 0"),
        (swap("propensity", lambda t: pc.multiply(t["propensity"], 0.0)), "got 0.0 in decision 0"),
        (swap("reward", lambda t: pc.multiply(t["reward"], float("inf"))), "reward must be finite"),
        (swap("item", lambda t: pc.add(t["item"], 20)), "a log of another catalogue"),
        (swap("slot", lambda t: pc.multiply(t["slot"], 2)), "a log of another slate_size"),
        (swap("step", lambda t: pc.multiply(t["step"], 0)), "two decisions of user 0, episode 0"),
        (lambda t: t.slice(0, 0), "is empty"),
    ],
)
def test_a_log_that_cannot_serve_is_refused(
    tmp_path: Path, spec: AgentSpec, change: Any, words: str
) -> None:
    sessions = Sessions(tmp_path / "log", spec, 2)
    sessions.play()
    sessions.play(terminated=[0, 1])
    sessions.writer.close()
    rewrite(tmp_path / "log", change)
    with pytest.raises(ValueError, match=words):
        replay_of([tmp_path / "log"], spec, catalog="shop")


def test_a_log_of_another_shop_or_environment_is_refused(tmp_path: Path, spec: AgentSpec) -> None:
    sessions = Sessions(tmp_path / "log", spec, 2)
    sessions.play(terminated=[0, 1])
    sessions.writer.close()
    with pytest.raises(ValueError, match="another catalogue"):
        replay_of([tmp_path / "log"], spec, catalog="other")
    with pytest.raises(ValueError, match="history has 8 places"):
        replay_of([tmp_path / "log"], replace(spec, history_size=10), catalog="shop")
    with pytest.raises(ValueError, match="feedback has 16 places"):
        replay_of([tmp_path / "log"], replace(spec, feedback_size=1), catalog="shop")
    with pytest.raises(ValueError, match="no decision log in"):
        replay_of([tmp_path / "nothing"], spec, catalog="shop")
    with pytest.raises(ValueError, match="no log to learn from"):
        replay_of([], spec, catalog="shop")


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_file_that_fills_the_last_batch_keeps_its_last_decision(
    tmp_path: Path, spec: AgentSpec, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(logged_transitions, "ROWS", rows)
    sessions = Sessions(tmp_path / "log", spec, 2)
    for _ in range(2):
        sessions.play(terminated=[0, 1])
    sessions.writer.close()
    assert pq.read_metadata(next((tmp_path / "log").glob("*.parquet"))).num_rows == 8
    assert len(rows_of(tmp_path / "log", spec)) == 4


def test_a_session_whose_beginning_is_not_in_the_log_is_not_whole(
    tmp_path: Path, spec: AgentSpec
) -> None:
    sessions = Sessions(tmp_path / "log", spec, 2)
    sessions.step[0] = 3
    sessions.play(terminated=[0, 1])
    sessions.writer.close()
    returns = survey(tmp_path / "log", spec).returns
    assert returns.tolist() == pytest.approx([sessions.truth[1]["reward"]])


def test_who_leaves_at_the_step_limit_has_left(tmp_path: Path, spec: AgentSpec) -> None:
    sessions = Sessions(tmp_path / "log", spec, 1)
    sessions.play(terminated=[0], truncated=[0])
    sessions.writer.close()
    (one,) = rows_of(tmp_path / "log", spec)
    assert (one.terminated.item(), one.truncated.item()) == (True, False)
