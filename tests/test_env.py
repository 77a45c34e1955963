"""Sessions: what is shown, written down, rewarded and ended, and what Gymnasium thinks of it."""

import subprocess
import sys
import warnings
from dataclasses import fields, replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

import envs.shown
from encoders.state import EMPTY, calendar
from envs import RecommendEnv, RecommendVectorEnv
from envs.rewards import Weighted, incremental, revenue, units
from simulators.base import Response, SimSpec
from simulators.worlds import TinyWorld

SPEC = SimSpec(None, None)
WORLD = TinyWorld(SPEC)
TRIPS = TinyWorld(SPEC, trips=4, patience=0.4)
PATIENT = TinyWorld(SPEC, patience=0.0, stop=(0.0,))  # nobody leaves


def batched(sim=WORLD, **settings):
    given = {"num_envs": 6, "slate_size": 3, "max_steps": 5, "observation": "ids"}
    return RecommendVectorEnv(sim, **(given | {"output": "torch"} | settings))


def slates(env, steps, seed=0):
    """Random slates (B, K), repeats included, one a step."""
    generator = torch.Generator().manual_seed(seed)
    shape = (env.num_envs, env.slate_size)
    return [torch.randint(env.num_items, shape, generator=generator) for _ in range(steps)]


def parts(obs):
    return {f.name: getattr(obs, f.name) for f in fields(obs)}


@pytest.mark.parametrize("observation", ["ids", "vector"])
@pytest.mark.parametrize(("slate_size", "max_steps"), [(1, 20), (10, 4)])
def test_gymnasium_has_nothing_to_say_against_the_env(observation, slate_size, max_steps):
    settings = {"slate_size": slate_size, "max_steps": max_steps, "observation": observation}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("recplay/Tiny-v0", **settings)
        check_env(env.unwrapped)
        many = gymnasium.make_vec("recplay/Tiny-v0", num_envs=5, **settings)
        many = gymnasium.wrappers.vector.RecordEpisodeStatistics(many)
        obs, _ = many.reset(seed=0)
        many.action_space.seed(0)
        lengths = 0
        for _ in range(10):
            assert many.observation_space.contains(obs)
            obs, reward, _, _, info = many.step(many.action_space.sample())
            assert reward.shape == (5,)
            lengths += info["episode"]["l"].sum() if "episode" in info else 0
        assert lengths > 0
    assert many.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


@pytest.mark.parametrize("sim", [WORLD, TRIPS], ids=["one trip", "trips"])
def test_a_batch_equals_its_rows_played_one_by_one(sim):
    env = batched(sim)
    played, ends = slates(env, 12), 0
    for row in range(env.num_envs):
        obs, info = env.reset(seed=5)
        one = RecommendEnv(sim, slate_size=3, max_steps=5, observation="ids", output="torch",
                           seed=5, row=row)  # fmt: skip
        first, told = one.reset()
        for slate in played:
            assert all(torch.equal(v, parts(first)[k]) for k, v in parts(obs[row]).items())
            assert torch.equal(info["mask"][row], told["mask"])
            obs, reward, terminated, truncated, info = env.step(slate)
            first, *outcome, told = one.step(slate[row])
            assert outcome == [float(reward[row]), bool(terminated[row]), bool(truncated[row])]
            for key in ("user", "episode", "step", "slate", "illegal", "slot_reward"):
                assert torch.equal(info[key][row], told[key])
            if terminated[row] or truncated[row]:
                ends += 1
                last = parts(info["final_obs"][row])
                assert all(torch.equal(v, parts(first)[k]) for k, v in last.items())
                assert torch.equal(info["final_mask"][row], told["mask"])
                first, told = one.reset()
    assert ends > env.num_envs


def test_the_vector_observation_is_the_encoding_of_the_ids():
    ids, vector = batched(TRIPS), batched(TRIPS, observation="vector")
    seen, state = ids.reset()[0], vector.reset()[0]
    for slate in slates(ids, 8):
        assert torch.allclose(vector.encode(seen), state, atol=1e-6)
        seen, *_, told = ids.step(slate)
        state, *_, info = vector.step(slate)
        if "final_obs" in told:
            assert torch.allclose(vector.encode(told["final_obs"]), info["final_obs"], atol=1e-6)
    assert state.shape == (6, vector.encode.size)


def test_rows_do_not_depend_on_how_many_there_are():
    small, large = batched(num_envs=3), batched(num_envs=6)
    small.reset(seed=2), large.reset(seed=2)
    for slate in slates(large, 8):
        few, reward, *_ = small.step(slate[:3])
        many, rewards, *_ = large.step(slate)
        assert all(torch.equal(v, parts(few)[k]) for k, v in parts(many[:3]).items())
        assert torch.equal(rewards[:3], reward)
    tail = batched(num_envs=2, row=4)
    tail.reset(seed=2), large.reset(seed=2)
    assert torch.equal(tail.user, large.user[4:])
    assert torch.equal(tail.episode, large.episode[4:])


def test_seeds_restart_and_a_reset_without_lets_the_next_users_in():
    env = batched(num_envs=50)
    first, _ = env.reset(seed=1)
    users, again = env.user, batched(num_envs=50, seed=1)
    again.reset()
    assert torch.equal(again.user, users)
    env.reset()
    assert not torch.equal(env.user, users)
    assert torch.equal(env.reset(seed=1)[0].past, first.past)
    assert not torch.equal(env.reset(seed=2)[0].past, first.past)
    assert len(env.user.unique()) > 35  # of 400 households, spread out


def test_options_say_whom_to_serve_and_answers_follow_user_and_episode_only():
    env, order = batched(PATIENT), torch.tensor([3, 1, 5, 0, 4, 2])
    user, episode = torch.tensor([9, 9, 8, 7, 0, 399]), torch.tensor([0, 1, 0, 0, 5, 6])
    obs, info = env.reset(options={"user": user, "episode": episode})
    assert torch.equal(info["user"], user)
    assert torch.equal(info["episode"], episode)
    assert torch.equal(obs.past, PATIENT.users.past[user])
    answers = [env.step(s)[1] for s in slates(env, 4)]
    env.reset(options={"user": user[order].numpy(), "episode": episode[order].tolist()})
    turned = [env.step(s[order])[1] for s in slates(env, 4)]
    assert all(torch.equal(a[order], t) for a, t in zip(answers, turned, strict=True))


def test_history_and_feedback_say_what_was_shown_and_what_came_of_it():
    env = batched(PATIENT)
    env.reset()
    for step, slate in enumerate(slates(env, 4)):
        obs, *_, info = env.step(slate)
        here = slice(3 * step, 3 * step + 3)
        assert torch.equal(obs.history[:, here], info["slate"])
        assert torch.equal(obs.feedback[:, here, 0], info["response"].chosen["buy"].float())
        assert (obs.history[:, here.stop :] == EMPTY).all()
        assert torch.equal(info["mask"], obs.history)
        assert info["step"].tolist() == [step] * 6
    assert obs.feedback.sum() > 0


@pytest.mark.parametrize("board", [envs.shown.BOARD, 0], ids=["board", "shared"])
def test_repeats_and_nothing_are_shown_as_empty_slots_and_counted(board, monkeypatch):
    monkeypatch.setattr(envs.shown, "BOARD", board)
    monkeypatch.setattr(envs.shown, "SHARED", 7)
    env = batched(PATIENT, num_envs=3)
    env.reset()
    env.step(torch.tensor([[1, 2, 3], [1, 2, 3], [4, 5, 6]]))
    *_, info = env.step(torch.tensor([[7, 7, 8], [3, 9, -1], [1, 2, 3]]))
    assert info["slate"].tolist() == [[7, EMPTY, 8], [EMPTY, 9, EMPTY], [1, 2, 3]]
    assert info["illegal"].tolist() == [1, 2, 0]
    allowed = env.action_masks()
    assert allowed.shape == (3, 60)
    assert np.flatnonzero(~allowed[0]).tolist() == [1, 2, 3, 7, 8]
    assert not info["response"].chosen["buy"][info["slate"] == EMPTY].any()
    env.reset()
    assert env.action_masks().all()


def test_sharing_columns_forbids_the_same(monkeypatch):
    answers = []
    for most in (envs.shown.BOARD, 0):
        monkeypatch.setattr(envs.shown, "BOARD", most)
        monkeypatch.setattr(envs.shown, "SHARED", 11)
        env = batched(num_envs=40, max_steps=9)
        env.reset()
        assert env.shown.exact == bool(most)
        rng = torch.Generator().manual_seed(0)
        infos = [env.step(torch.randint(-1, 60, (40, 3), generator=rng))[-1] for _ in range(30)]
        answers.append(torch.stack([info["slate"] for info in infos]))
        with pytest.raises(ValueError, match="60"):  # no item of the catalogue
            env.step(torch.full((40, 3), 60))
    assert torch.equal(*answers)
    assert (answers[0] == EMPTY).float().mean() > 0.05


def test_long_slates_are_searched_for_repeats_as_short_ones(monkeypatch):
    slate = torch.randint(0, 20, (50, 12), generator=torch.Generator().manual_seed(0))
    short = envs.shown.repeated(slate)
    monkeypatch.setattr(envs.shown, "PAIRS", 1)
    assert torch.equal(envs.shown.repeated(slate), short)
    rows = [[i in row[:k] for k, i in enumerate(row)] for row in slate.tolist()]
    assert short.tolist() == rows


def test_what_a_simulator_keeps_or_tells_is_not_written_over():
    class Telling(TinyWorld):
        """Tells a tensor of its state, and hands on one that it keeps."""

        def start(self, users, draws):
            self.kept = torch.ones(len(users)) if len(users) == 200 else torch.zeros(len(users))
            return super().start(users, draws) | {"told": users.float()[:, None], "kept": self.kept}

        def respond(self, state, slate, draws):
            response, state = super().respond(state, slate, draws)
            return replace(response, value=state["told"].expand(slate.shape)), state

    env = batched(Telling(SPEC), num_envs=200)
    env.reset()
    first = env.simulator.kept
    for slate in slates(env, 12):
        user = env.user
        *_, info = env.step(slate)
        assert torch.equal(info["response"].value[:, 0], user.float())  # of who was asked
        assert torch.equal(env.state["told"][:, 0], env.user.float())
    assert (first == 1.0).all()


def test_running_out_of_steps_is_truncation_and_leaving_is_termination():
    env = batched(PATIENT)
    env.reset()
    for step, slate in enumerate(slates(env, 10)):
        _, _, terminated, truncated, info = env.step(slate)
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (step % 5 == 4)
        assert ("final_obs" in info) == bool(truncated.any())
    env = batched(TinyWorld(SPEC, patience=1.0, stop=(1.0,)), max_steps=1)
    env.reset()
    _, _, terminated, truncated, info = env.step(slates(env, 1)[0])
    assert terminated.all()  # leaving on the last step is leaving
    assert not truncated.any()
    assert (info["final_obs"].history[:, :3] == info["slate"]).all()


def test_the_next_user_takes_the_row_in_the_same_step():
    env = batched(num_envs=200)
    seen, _ = env.reset()
    for slate in slates(env, 6):
        before = env.user
        seen, _, terminated, truncated, info = env.step(slate)
        done = terminated | truncated
        assert torch.equal(info["user"], before)
        assert torch.equal(info["_final_obs"], done)
        assert torch.equal(env.user[~done], before[~done])
        assert (seen.history[done] == EMPTY).all()
        assert (seen.feedback[done] == 0).all()
        assert (info["mask"][done] == EMPTY).all()
        assert (info["final_mask"][done] != EMPTY).any(dim=1).all()
        assert torch.equal(seen.past[done], WORLD.users.past[env.user[done]])
        assert torch.equal(info["final_obs"].history[~done], seen.history[~done])
        assert (env.steps[done] == 0).all()
    assert (env.episode.unique().numel()) == 200  # no two rows share their draws


def test_a_new_trip_forgets_what_was_shown_and_remembers_what_was_bought():
    env = batched(TRIPS, num_envs=300, max_steps=12, slate_size=5)
    before, _ = env.reset()
    moved_rows = 0
    for slate in slates(env, 8):
        time = env.time
        after, _, terminated, truncated, info = env.step(slate)
        last = info.get("final_obs", after)
        moved = (info["response"].elapsed > 0) & ~(terminated | truncated)
        bought = before.feedback[:, :, 0].sum(1) + info["response"].chosen["buy"].sum(1)
        expected = before.past_count.sum(1) + bought
        assert torch.equal(last.past_count.sum(1)[moved], expected[moved])
        assert (after.history[moved] == EMPTY).all()
        assert not env.shown.board[moved, :-1].any()  # what was shown may be shown anew
        assert torch.allclose(env.time[moved], (time + info["response"].elapsed)[moved])
        assert torch.equal(after.context[moved], calendar(env.time[moved]))
        still = ~(moved | terminated | truncated)
        assert torch.equal(after.past[still], before.past[still])
        moved_rows += int(moved.sum())
        now, order = after.past.sort(dim=1)
        width = env.state["past"].shape[1]
        assert torch.equal(now[:, -width:], env.state["past"])  # simulator and env remember alike
        assert torch.allclose(after.past_age.gather(1, order)[:, -width:], env.state["past_age"])
        before = after
    assert moved_rows > 100


def test_what_was_handed_out_never_changes():
    env = batched(TRIPS, num_envs=50)
    seen, _ = env.reset()
    kept = []
    for slate in slates(env, 8):
        kept.append((seen, {k: v.clone() for k, v in parts(seen).items()}))
        seen = env.step(slate)[0]
    assert all(torch.equal(parts(o)[k], v) for o, copy in kept for k, v in copy.items())
    env = batched(output="numpy")
    obs, info = env.reset()
    obs["history"][:], info["mask"][:] = 7, 7  # the caller's own copies
    assert (env.view.history == EMPTY).all()


def response(chosen, organic, value):
    chosen, organic, value = torch.tensor(chosen), torch.tensor(organic), torch.tensor(value)
    zero = torch.zeros(len(value))
    return Response({"click": organic, "buy": chosen}, organic, value, zero > 0, zero, value * 0)


def test_rewards_by_hand():
    answer = response([[True, True, False]], [[True, False, True]], [[2.0, 3.5, 0.0]])
    assert revenue(answer).tolist() == [[2.0, 3.5, 0.0]]
    assert units(answer).tolist() == [[1.0, 0.0, 1.0]]  # the first behaviour is the click here
    assert Weighted({"click": 0.1, "buy": 2.0})(answer).tolist() == [pytest.approx([2.1, 2.0, 0.1])]
    only_buy = replace(answer, chosen={"buy": answer.chosen["buy"]})
    assert incremental(only_buy).tolist() == [[0.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match=r"weights name \['like'\].*\['buy', 'click'\]"):
        Weighted({"like": 1.0})(answer)


def test_the_reward_of_a_step_is_the_sum_of_its_slots():
    env = batched(PATIENT, reward=revenue)
    env.reset()
    total = 0.0
    for slate in slates(env, 5):
        _, reward, *_, info = env.step(slate)
        assert torch.equal(reward, info["slot_reward"].sum(dim=1))
        price = WORLD.catalog.price[info["slate"].clamp(min=0)]
        assert torch.equal(info["slot_reward"], price * info["response"].chosen["buy"])
        total += float(reward.sum())
    assert total > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"slate_size": 61}, "slate_size=61 needs as many items, the catalogue has 60"),
        ({"max_steps": 21}, "the mask would forbid all: lower max_steps to 20"),
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"observation": "id"}, r"observation must be one of .*'ids'.*got 'id'"),
        ({"output": "jax"}, "output must be one of .*got 'jax'"),
        ({"device": "cuda"}, "catalogue is on cpu, the environment was asked for cuda"),
    ],
)
def test_a_session_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        batched(**settings)


@pytest.mark.parametrize(
    ("slate", "words"),
    [
        (torch.zeros(6, 2, dtype=torch.int64), r"slate must be \(6, 3\).*got \(6, 2\)"),
        (torch.zeros(6, dtype=torch.int64), r"slate must be \(6, 3\).*got \(6,\)"),
        (torch.zeros(6, 3), "integer item ids, got torch.float32"),
        (np.ones((6, 3), dtype=bool), "integer item ids, got torch.bool"),
        (torch.tensor([[0, 1, 60]] * 6), "numbered 0 to 59 .*got 60 in row 0, slot 2"),
        (torch.tensor([[0, 1, 2]] * 5 + [[0, -2, 2]]), "got -2 in row 5, slot 1"),
    ],
)
def test_a_wrong_slate_is_refused_and_nothing_happened(slate, words):
    env = batched()
    obs, _ = env.reset()
    with pytest.raises(ValueError, match=words):
        env.step(slate)
    assert (env.steps == 0).all()
    assert torch.equal(env.view.history, obs.history)
    assert env.action_masks().all()


@given(st.lists(st.lists(st.integers(-5, 70), min_size=3, max_size=3), min_size=2, max_size=2))
@settings(max_examples=60)
def test_any_slate_of_the_right_shape_is_shown_or_refused_by_name(slate):
    env = batched(num_envs=2)
    env.reset()
    flat = [item for row in slate for item in row]
    if any(item < EMPTY or item >= 60 for item in flat):
        with pytest.raises(ValueError, match="items are numbered 0 to 59"):
            env.step(np.array(slate))
        return
    *_, info = env.step(np.array(slate))
    for row, shown in zip(slate, info["slate"].tolist(), strict=True):
        first = [x if x >= 0 and x not in row[:i] else EMPTY for i, x in enumerate(row)]
        assert shown == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": [1, 2]}, r"seed must be one integer, got \[1, 2\]"),
        ({"options": {"reset_mask": np.ones(6, bool)}}, r"\['reset_mask'\]: rows restart by them"),
        ({"options": {"user": [1, 2]}}, r"'user' must be 6 integers.*got \(2,\)"),
        ({"options": {"user": [0.5] * 6}}, "'user' must be 6 integers.*float64"),
        ({"options": {"user": [400] * 6}}, "numbered 0 to 399, got 400"),
    ],
)
def test_a_wrong_reset_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        batched().reset(**arguments)


def not_a_number(response):
    return response.value * torch.nan


def one_a_user(response):
    return response.value.sum(dim=1)


def test_wrong_rewards_and_steps_out_of_turn_are_refused():
    slate = slates(batched(), 1)[0]
    env = batched(reward=not_a_number)
    env.reset()
    with pytest.raises(ValueError, match="not_a_number gave nan in row 0, slot 0"):
        env.step(slate)
    env = batched(reward=one_a_user)
    env.reset()
    with pytest.raises(ValueError, match=r"one_a_user must give slot rewards \(6, 3\), got \(6,\)"):
        env.step(slate)
    with pytest.raises(ValueError, match="call reset"):
        batched().step(slate)
    one = RecommendEnv(WORLD, max_steps=1)
    one.reset()
    one.step(0)
    with pytest.raises(ValueError, match="this episode is over: call reset"):
        one.step(1)


def test_everyone_may_leave_at_once_with_one_row_and_one_slot():
    env = batched(TinyWorld(SPEC, patience=1.0, stop=(1.0,)), num_envs=1, slate_size=1)
    env.reset()
    users = set()
    for _ in range(20):
        _, _, terminated, _, info = env.step(np.array([0]))
        assert terminated.all()
        assert info["illegal"].tolist() == [0]  # the next user has not seen it
        users.add(int(info["user"]))
    assert len(users) > 10


def test_importing_envs_is_light_and_draws_nothing(pytestconfig):
    code = (
        "import torch; before = torch.get_rng_state(); import envs, sys;"
        "assert torch.equal(before, torch.get_rng_state());"
        "print([m for m in ('transformers', 'stable_baselines3', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pytestconfig.rootpath, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
