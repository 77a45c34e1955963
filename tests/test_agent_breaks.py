"""What small slips in agents would change and no other test would notice."""

import copy
import math
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from agents.actor_critic import ActorCritic
from agents.base import Decision
from agents.bcq import BCQ
from agents.behaviour_cloning import BehaviourCloning
from agents.cql import CQL
from agents.iql import IQL
from agents.offline import descend
from agents.reinforce import Reinforce
from agents.sac_discrete import SACDiscrete
from agents.saving import catalog_signature, check_catalog
from agents.sb3 import SB3, probs_of_slots
from agents.schedules import linear, lr_at, set_lr
from agents.slateq import logit_loss
from agents.testing import synthetic_observation, synthetic_spec, synthetic_steps
from encoders.state import EMPTY
from experiments.checkpoints import checksum, folders, save_checkpoint
from experiments.resume import difference, gone_on, interrupted_run
from experiments.watch import Watch, crossed
from tests import test_actor_critic as policies
from tests import test_slateq as slates

SPEC = synthetic_spec()


def test_several_taken_items_count_as_their_mean_under_a_model_of_one():
    v, both = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    whole = torch.tensor([0.0, 1.0, 3.0]).logsumexp(dim=0)
    assert float(logit_loss(v, both, both)) == pytest.approx(float(whole) - 2.0)


def test_the_next_slate_is_priced_by_the_running_mean():
    agent = slates.toy_agent(slates.toy_spec())
    state, slate = torch.zeros(2, dtype=torch.int64), torch.tensor([[0, 1]] * 2)
    taken = torch.zeros(2, 2, dtype=torch.bool)
    step = slates.step_of(state, slate, taken, taken.float(), state, state != 0)
    with torch.no_grad():
        before = agent._next_value(step)
        agent.net.nothing.value.bias += 10.0
        assert torch.equal(agent._next_value(step), before)
        agent.target.nothing.value.bias += 10.0
        assert torch.allclose(agent._next_value(step), before + 10.0)


def test_users_who_take_several_are_a_share_of_those_who_take_anything():
    agent = slates.toy_agent(slates.toy_spec(), batch_size=1000)
    state, slate = torch.zeros(200, dtype=torch.int64), torch.tensor([[0, 1]] * 200)
    taken = torch.zeros(200, 2, dtype=torch.bool)
    taken[:5, 0] = taken[0, 1] = True  # a fifth of five, though half a percent of all
    agent.update(slates.step_of(state, slate, taken, taken.float(), state, state == 0))
    assert agent.independent


def one_item(users, profile=0):
    """Users of one state who were shown item 0 by a policy sure of a half."""
    state = torch.nn.functional.one_hot(torch.full((users,), profile), 4).float()
    half = torch.full((users, 1), 0.5)
    return state, Decision(torch.zeros(users, 1, dtype=torch.int64), half)


def test_reinforce_counts_advantages_in_spreads_of_the_returns():
    losses = []
    for unit in (1.0, 100.0):
        agent = Reinforce(policies.toy_spec(), steps=1, width=16, entropy_weight=0.0)
        state, decision = one_item(8)
        with torch.no_grad():
            for p in agent.critic.net.value.parameters():
                p.zero_()  # V is 0: the advantage is the reward
        agent.critic.square = torch.tensor(unit**2)
        reward, left = torch.full((8, 1), unit), torch.ones(8, dtype=torch.bool)
        logs = agent.update(policies.toy_step(state, decision, reward, state, left=left))
        losses.append(float(logs["train/policy_gradient_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] > 0.1


def test_reinforce_gives_no_credit_for_the_next_user_of_a_row():
    credits = []
    for paid in (0.0, 50.0):  # to who took the row after a step limit
        agent = Reinforce(policies.toy_spec(), steps=2, width=16)
        state, decision = one_item(4)
        kept, improve = [], agent._improve

        def spy(*args, kept=kept, improve=improve):
            kept.append(args[4])  # (T * B,)
            return improve(*args)

        agent._improve = spy
        cut, reward = torch.ones(4, dtype=torch.bool), torch.ones(4, 1)
        agent.update(policies.toy_step(state, decision, reward, state, cut=cut))
        agent.update(policies.toy_step(state, decision, paid * reward, state, left=cut))
        credits.append(kept[0])
    assert torch.equal(credits[0][:4], credits[1][:4])
    assert (credits[1][4:] > 40.0).all()


def test_the_critic_takes_its_unit_from_returns_not_from_surprises():
    agent = ActorCritic(policies.toy_spec(), steps=1, width=16, epochs=1)
    state, decision = one_item(8)
    left = torch.ones(8, dtype=torch.bool)
    agent.update(policies.toy_step(state, decision, torch.full((8, 1), 3.0), state, left=left))
    assert float(agent.critic.mean) == pytest.approx(3.0, abs=1e-5)


def test_empty_slots_have_no_part_in_the_mean_gain_of_a_policy():
    agent = ActorCritic(policies.toy_spec(slate_size=2), steps=1, width=16, epochs=1,
                        minibatch=None, normalize=False)  # fmt: skip
    state = torch.eye(4)
    decision = agent.act(policies.toy_obs(state), None)
    decision.slate[:, 1] = EMPTY
    kept, improve = [], agent._improve

    def spy(*args):
        kept.append(args[4])  # (n, K)
        return improve(*args)

    agent._improve = spy
    reward, left = torch.tensor([[1.0, 0.0]] * 4), torch.ones(4, dtype=torch.bool)
    logs = agent.update(policies.toy_step(state, decision, reward, state, left=left))
    # every ratio is one before the first step
    assert float(-logs["train/policy_gradient_loss"]) == pytest.approx(
        float(kept[0][:, 0].mean()), rel=1e-4
    )


def test_shuffled_rows_of_a_rollout_keep_their_own_masks():
    agent = ActorCritic(SPEC, steps=2, width=16, epochs=1, minibatch=8, lr=1e-12)
    for step in synthetic_steps(agent, SPEC, 16, 2, torch.Generator().manual_seed(0)):
        logs = agent.update(step)
    assert float(logs["train/approx_kl"]) < 1e-8  # nothing has moved: all ratios are one


def test_critics_follow_the_schedule_of_their_policies():
    spec = replace(SPEC, total_steps=128)
    for kind in (ActorCritic, Reinforce):
        agent = kind(spec, steps=2, width=16, schedule="linear")
        for step in synthetic_steps(agent, spec, 32, 2, torch.Generator().manual_seed(0)):
            agent.update(step)
        rates = [x.param_groups[0]["lr"] for x in (agent.optimizer, agent.critic.optimizer)]
        assert rates == [agent.lr / 2] * 2


def soft_agent():
    """SAC with a few steps in its replay, and a sample of them."""
    agent = SACDiscrete(SPEC, width=16, learning_starts=10_000)
    for step in synthetic_steps(agent, SPEC, 32, 3, torch.Generator().manual_seed(0)):
        agent.update(step)
    return agent, agent.replay.at(torch.arange(64))


def test_soft_targets_come_from_the_running_means_of_two_different_twins():
    agent, sample = soft_agent()
    twins = [twin(sample.transition.obs) for twin in agent.twins]
    assert not torch.allclose(*twins, atol=1e-3)
    before = copy.deepcopy(agent)._learn_twins(sample)[0]
    with torch.no_grad():
        for target in agent.targets:
            target.value.bias += 100.0
    after = agent._learn_twins(sample)[0]
    assert float(after - before) == pytest.approx(
        2 * 100.0 * float(sample.discount.mean()), rel=0.05
    )


def test_a_soft_policy_is_learnt_over_its_own_slates_and_what_they_allow():
    agent, sample = soft_agent()
    batch = sample.transition
    other = replace(batch.decision, slate=batch.decision.slate.flip(1))
    seen = [
        copy.deepcopy(agent)._learn_policy(replace(batch, decision=decision))
        for decision in (batch.decision, other)
    ]
    assert torch.equal(seen[0][0], seen[1][0])
    left = SPEC.num_items - (batch.mask != EMPTY).sum(dim=1)
    assert left.unique().numel() > 1
    assert torch.allclose(seen[0][2], 0.3 * left.float().log())


@pytest.mark.parametrize(
    ("kind", "taught", "served"),
    [
        (BehaviourCloning, "net", "mean"),
        (CQL, "net", "target"),
        (BCQ, "q", "q_mean"),
        (IQL, "policy", "policy_mean"),
    ],
)
def test_learners_from_logs_serve_their_running_means(kind, taught, served):
    agent = kind(SPEC, width=16)
    obs = synthetic_observation(SPEC, 8, torch.Generator().manual_seed(0))
    before = agent.scores(obs)
    with torch.no_grad():
        getattr(agent, taught).famous.weight += 10.0
        assert torch.equal(agent.scores(obs), before)
        getattr(agent, served).famous.weight += 10.0
    assert not torch.allclose(agent.scores(obs), before, atol=0.1)


def next_step(**changes):
    """Users of state 0 who were shown item 0, then seen in state 1."""
    state, decision = one_item(4)
    later, _ = one_item(4, profile=1)
    return replace(policies.toy_step(state, decision, torch.zeros(4, 1), later), **changes)


@pytest.mark.parametrize("kind", [BCQ, CQL, IQL])
def test_learners_from_logs_go_on_after_a_step_limit_and_stop_where_users_left(kind):
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    for left, cut, worth in ((no, yes, 80.0), (no, no, 80.0), (yes, no, 0.0)):
        agent = kind(policies.toy_spec(), width=16, gamma=0.8)
        net = {BCQ: "q_mean", CQL: "target", IQL: "value"}[kind]
        with torch.no_grad():
            part = getattr(agent, net)
            part.value.bias += 100.0  # what follows is worth a hundred
        logs = agent.update(next_step(terminated=left, truncated=cut))
        assert float(logs["train/td_error"]) == pytest.approx(worth, abs=2.0)


def test_iql_bootstraps_from_the_next_state():
    agent = IQL(policies.toy_spec(), width=16)
    agent.value.forward = lambda seen: 100.0 * seen.state[:, 0]  # state 0 alone is worth anything
    assert float(agent.update(next_step())["train/td_error"]) < 2.0


def test_iql_judges_the_log_by_the_running_mean_of_q():
    agent = IQL(policies.toy_spec(), width=16)
    with torch.no_grad():
        agent.q_mean.value.bias += 100.0
    assert float(agent.update(next_step())["offline/advantage"]) == pytest.approx(100.0, abs=2.0)


def test_iql_weighs_what_it_clones_by_its_advantage():
    agent = IQL(policies.toy_spec(), width=16)
    with torch.no_grad():
        agent.q_mean.value.bias += 1e6  # all weights are at their most
    logs = agent.update(next_step())
    assert float(logs["train/policy_gradient_loss"]) > 50.0  # a hundred times log of four


@pytest.mark.parametrize(("kind", "net", "mean"), [(BCQ, "q", "q_mean"), (CQL, "net", "target")])
def test_learners_from_logs_pick_by_the_net_and_price_by_its_mean(kind, net, mean):
    agent = kind(policies.toy_spec(), gamma=0.5, **({"threshold": 0.0} if kind is BCQ else {}))
    getattr(agent, net).values = lambda seen: torch.tensor([[8.0, 1.0, 2.0, 9.0]] * 4)
    getattr(agent, mean).values = lambda seen: torch.tensor([[5.0, 7.0, 9.0, 0.0]] * 4)
    target = agent._targets(next_step(next_mask=torch.tensor([[3]] * 4)))  # not item 3
    target = target[0] if isinstance(target, tuple) else target
    assert target.tolist() == [[2.5]] * 4


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        (BehaviourCloning, [("net", "mean")]),
        (BCQ, [("q", "q_mean"), ("behaviour", "behaviour_mean")]),
        (CQL, [("net", "target")]),
        (IQL, [("q", "q_mean"), ("policy", "policy_mean")]),
    ],
)
def test_every_running_mean_of_a_learner_from_logs_follows_its_net(kind, pairs):
    agent = kind(policies.toy_spec(), width=16, tau=0.25, lr=1e-2)
    before = {mean: copy.deepcopy(getattr(agent, mean)) for _, mean in pairs}
    agent.update(next_step())
    for net, mean in pairs:
        moved = False
        for fast, slow, was in zip(
            getattr(agent, net).parameters(), getattr(agent, mean).parameters(),
            before[mean].parameters(), strict=True,
        ):  # fmt: skip
            assert torch.allclose(slow, was.lerp(fast, 0.25))
            moved = moved or not torch.equal(fast, was)
        assert moved


@pytest.mark.parametrize("kind", [BehaviourCloning, BCQ, CQL, IQL])
def test_learners_from_logs_decay_their_personal_weights_alone(kind):
    agent = kind(policies.toy_spec(), width=16, shrink=5.0)
    found = vars(agent).get("optimizers") or {"one": agent.optimizer}
    first = next(iter(found.values()))
    decays = [group["weight_decay"] for group in first.param_groups]
    assert decays == [5.0, 0.0]
    net = getattr(agent, "q", None) or agent.net
    assert {id(p) for p in first.param_groups[0]["params"]} == {id(p) for p in net.personal()}


def test_a_step_is_clipped_by_the_norm_over_all_parameters():
    one, two = (torch.zeros((), requires_grad=True) for _ in range(2))
    norm = descend(3.0 * one + 4.0 * two, torch.optim.SGD([one, two], lr=1.0), 1.0)
    assert float(norm) == pytest.approx(5.0)
    assert [float(one.detach()), float(two.detach())] == pytest.approx([-0.6, -0.8], abs=1e-4)


def test_learners_from_logs_compare_with_what_could_be_shown_then_not_next():
    mask = torch.tensor([[3]] * 4)
    for kind, name in (
        (BehaviourCloning, "train/loss"),
        (BCQ, "offline/behaviour_loss"),
        (CQL, "offline/conservative_gap"),
    ):
        logs = kind(policies.toy_spec(), width=16).update(
            next_step(mask=mask, next_mask=torch.full((4, 1), EMPTY))
        )
        assert float(logs[name]) == pytest.approx(math.log(3), abs=0.1)  # four items less one


def test_an_empty_slot_of_sb3_brings_back_no_item():
    logits, allowed = torch.zeros(1, 2, 3), torch.tensor([[False, True, True]])
    probs = probs_of_slots(logits, allowed, torch.tensor([[EMPTY, 0]]), greedy=False)
    assert probs.tolist() == [[0.0, 0.0]]


def test_a_free_setting_is_free_by_its_whole_name(tmp_path):
    OmegaConf.save({"steps": 5, "agent": {"steps": 8}}, tmp_path / "config.yaml")
    then, now = (OmegaConf.create({"steps": 9, "agent": {"steps": s}}) for s in (8, 16))
    assert difference(tmp_path, then) == ""
    assert difference(tmp_path, now) == "agent.steps was 8, now 16"


def test_the_newest_of_two_runs_that_were_cut_off_goes_on(tmp_path, monkeypatch):
    cfg = OmegaConf.create({"seed": 3, "run_dir": None})
    for stamp in ("20260101-000000", "20260102-000000"):
        (tmp_path / f"seed3-{stamp}").mkdir()
        OmegaConf.save(cfg, tmp_path / f"seed3-{stamp}" / "config.yaml")
    monkeypatch.setattr("experiments.resume.home_of", lambda cfg: tmp_path)
    assert interrupted_run(cfg).folder == tmp_path / "seed3-20260102-000000"


def test_the_checksum_of_a_large_file_is_of_all_its_blocks(tmp_path):
    content = bytes(range(256)) * 8192  # two blocks
    (tmp_path / "agent.pt").write_bytes(content)
    assert checksum(tmp_path / "agent.pt") == zlib.crc32(content)


def test_a_step_that_jumps_over_a_multiple_has_crossed_it_once():
    found = [step for step in range(64, 700, 64) if crossed(step, 64, 100)]
    assert found == [128, 256, 320, 448, 512, 640]
    assert not crossed(128, 64, 0)


def test_an_evaluation_as_good_as_the_best_is_no_new_best(tmp_path):
    watch = Watch(OmegaConf.create({"early_stopping": 0}), None, None, tmp_path, 999, 64)
    for step, value in ((64, 1.0), (128, 1.0), (192, 0.5)):
        watch.curves = SimpleNamespace(step=step)
        watch.judge_best(value)
    assert (watch.best, watch.best_step, watch.worse) == (1.0, 64, 2)


def test_schedules_stay_at_their_ends_and_reach_all_parameters():
    assert [linear(steps, 1.0, 0.2, 20) for steps in (0, 10, 20, 30)] == pytest.approx(
        [1.0, 0.6, 0.2, 0.2]
    )
    for schedule, half in (("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)):
        found = [lr_at(1.0, schedule, steps, 20) for steps in (0, 10, 20, 30)]
        end = float(schedule == "constant")
        assert found == pytest.approx([1.0, half, end, end], abs=1e-12)
    one, two = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two]}], lr=1.0)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_full_replay_of_sb3_comes_back_full_and_writes_where_it_would_have():
    spec = synthetic_spec(slate_size=1)
    one, other = (SB3(spec, capacity=8) for _ in range(2))
    one._for_users(2)
    buffer = one.model.replay_buffer
    buffer.full, buffer.pos = True, 1
    other.load_experience(one.experience())
    kept = other.model.replay_buffer
    assert (kept.full, kept.pos, kept.size()) == (True, 1, buffer.buffer_size)


def test_a_signature_tells_one_hot_catalogues_in_another_order_apart():
    one, other = (catalog_signature(x) for x in (torch.eye(4), torch.eye(4).flip(0)))
    assert one.unique().numel() == 4
    with pytest.raises(ValueError, match="another catalogue of the same size"):
        check_catalog(one, other)


def test_the_result_of_a_run_that_goes_on_no_longer_holds(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    gone_on(tmp_path, OmegaConf.create({"steps": 9}))
    assert not (tmp_path / "result.json").exists()


def test_a_later_checkpoint_goes_even_where_it_is_whole(tmp_path):
    for step in (1000, 400):
        save_checkpoint(tmp_path, {}, OmegaConf.create({}), step=step, about={}, keep=2)
    assert [folder.name for folder in folders(tmp_path)] == ["step-000000000400"]
