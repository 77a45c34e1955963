"""The Q-net reads what it should, ignores padding, and its two ways to a value agree."""

from dataclasses import replace

import pytest
import torch

from agents.nets import HEADS, LEFT, QNet, Reader, ValueNet, item_features
from agents.testing import synthetic_observation, synthetic_spec
from encoders.state import EMPTY

SPEC = synthetic_spec(num_items=30, slate_size=3)
FORMS = [
    {"head": head, "dueling": dueling, "memory": memory}
    for head in HEADS
    for dueling in (True, False)
    for memory in (True, False)
]
QUANTILES = [{**form, "quantiles": 3} for form in FORMS]


def observe(batch=6, seed=0):
    return synthetic_observation(SPEC, batch, torch.Generator().manual_seed(seed))


def shaken(form, seed=0):
    """A net whose every weight is far from its start, so that no term is too small to see."""
    net, generator = QNet(SPEC, width=16, **form), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return net


@pytest.mark.parametrize("form", FORMS)
def test_values_of_a_slate_are_the_values_of_its_items(form):
    net, obs = shaken(form), observe()
    slate = torch.rand(6, 30, generator=torch.Generator().manual_seed(2)).topk(12, dim=1).indices
    slate[:, :4] = obs.past[:, :4].clamp(min=0)  # known items among them
    q = net(obs)
    some = net.values_of(net.read(obs), slate)
    assert q.shape == (6, 30)
    assert torch.allclose(some, q.gather(1, slate), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_equals_singles(form):
    net, obs = shaken(form), observe()
    alone = torch.cat([net(obs[b : b + 1]) for b in range(6)])
    assert torch.allclose(alone, net(obs), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("head", ["dot", "dense"])
def test_with_dueling_the_mean_value_is_the_value_of_the_state(head):
    net, obs = shaken({"head": head}), observe()
    seen = net.read(obs)
    hidden = net.body(seen.state)
    left = 10.0 * net.extra(hidden, seen).masked_fill(seen.shown, 0.0).topk(LEFT, dim=1).values
    value = net.value(hidden) + net.left(left)
    assert torch.allclose(net(obs).mean(dim=1, keepdim=True), value, atol=1e-3)


def test_values_start_small_and_finite_whatever_the_scale_of_the_vectors():
    for scale in (1e-3, 1.0, 1e3):
        spec = replace(SPEC, item_vectors=SPEC.item_vectors * scale)
        q = QNet(spec)(observe(64)).detach()
        assert q.isfinite().all()
        assert float(q.abs().max()) < 1.0


def test_the_net_is_a_function_of_the_seed_and_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    one, two, other = QNet(SPEC), QNet(SPEC), QNet(replace(SPEC, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    obs = observe()
    assert torch.equal(one(obs), two(obs))
    assert not torch.equal(one(obs), other(obs))


def test_padding_is_not_read():
    net, obs = shaken({}), observe()
    noisy = replace(
        obs,
        past_count=torch.where(obs.past == EMPTY, 50.0, obs.past_count),
        past_age=torch.where(obs.past == EMPTY, 7.0, obs.past_age),
        feedback=torch.where((obs.history == EMPTY)[:, :, None], 1.0, obs.feedback),
    )
    assert torch.allclose(net(noisy), net(obs), atol=1e-5)


@pytest.mark.parametrize(
    "field", ["profile", "past", "past_count", "past_age", "history", "feedback", "context"]
)
def test_every_part_of_an_observation_is_read(field):
    net, obs = shaken({}), observe()
    other = replace(obs, **{field: getattr(obs, field).roll(1, dims=0)})
    assert not torch.allclose(net(other), net(obs), atol=1e-4)


def test_the_memory_term_moves_the_items_of_the_past_and_no_other():
    net, obs = shaken({"dueling": False}), observe()
    seen = net.read(obs)
    extra = net.extra(net.body(seen.state), seen)  # (B, H)
    own = torch.zeros(6, 31).scatter(1, torch.where(obs.past == EMPTY, 30, obs.past), extra)[:, :30]
    moved = net.values(seen)
    net.memory = False
    assert torch.allclose(moved - own, net.values(seen), atol=1e-3)
    assert (extra[obs.past == EMPTY] == 0).all()
    assert (extra[obs.past != EMPTY] != 0).all()


def test_main_axes_keep_all_of_one_hot_vectors_and_the_similarity_of_others():
    assert torch.linalg.matrix_rank(item_features(torch.eye(9))) == 9
    vectors = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    features = item_features(vectors)
    cos = torch.nn.functional.cosine_similarity
    assert torch.allclose(
        cos(features[:20], features[20:]), cos(vectors[:20], vectors[20:]), atol=1e-4
    )


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="dot, dense, two_tower, got 'wide'"):
        QNet(SPEC, head="wide")


@pytest.mark.parametrize("form", QUANTILES)
def test_quantiles_of_a_slate_are_those_of_its_items(form):
    net, obs = shaken(form), observe()
    slate = torch.rand(6, 30, generator=torch.Generator().manual_seed(2)).topk(12, dim=1).indices
    slate[:, :4] = obs.past[:, :4].clamp(min=0)  # known items among them
    q = net(obs)  # (6, 30, 3)
    assert q.shape == (6, 30, 3)
    some = net.values_of(net.read(obs), slate)  # (6, 12, 3)
    expected = q.gather(1, slate[:, :, None].expand(6, 12, 3))
    assert torch.allclose(some, expected, atol=1e-3, rtol=1e-4)
    assert (q[:, :, 0] != q[:, :, 1]).any()


def test_v_of_s_is_one_number_a_user_and_reads_the_state():
    net, obs = ValueNet(SPEC, width=16), observe()
    value = net(net.read(obs))
    assert value.shape == (6,)
    alone = torch.cat([net(net.read(obs[row : row + 1])) for row in range(6)])
    assert torch.allclose(alone, value, atol=1e-6)
    moved = replace(obs, profile=obs.profile + 1.0)
    assert not torch.allclose(net(net.read(moved)), value)


def test_nets_of_one_catalogue_read_the_same_whatever_their_seeds():
    a, b = QNet(SPEC, seed=1).read(observe()), ValueNet(SPEC, seed=2).read(observe())
    assert torch.equal(a.state, b.state)
    assert torch.equal(a.traces, b.traces)
    assert a.state.shape == (6, Reader(SPEC).size)
    assert list(Reader(SPEC).parameters()) == []


def test_what_is_left_of_the_past_moves_the_value_and_is_not_taught_by_it():
    net, obs = shaken({}), observe()
    # the mean over items is V(s): what an item of the past is worth is learnt from that item
    (slope,) = torch.autograd.grad(net(obs).mean(dim=1).sum(), net.recall)
    assert slope.abs().max() < 1e-3
    (slope,) = torch.autograd.grad(net(obs)[:, 0].sum(), net.left.weight)
    assert slope.abs().max() > 1e-2


def test_a_mean_of_likes_and_dislikes_is_by_their_size():
    read = Reader(SPEC)
    mean = read.mean(torch.tensor([[3, 4, EMPTY]]), torch.tensor([[1.0, -1.0, 0.0]]))
    assert torch.allclose(mean[0], (read.items[3] - read.items[4]) / 2.0, atol=1e-6)


def test_the_recent_mean_counts_an_item_once_however_often_it_was_bought():
    read, obs = Reader(SPEC), observe()
    often = replace(
        obs, past_count=obs.past_count * torch.arange(1.0, 1.0 + obs.past_count.shape[1])
    )
    wide = read.items.shape[1]
    first = obs.profile.shape[1] + obs.context.shape[1] + wide  # after the mean by count
    one, other = (read.state(x)[:, first : first + wide] for x in (obs, often))
    assert torch.equal(one, other)
    assert not torch.equal(read.state(obs), read.state(often))


def test_value_nets_of_two_seeds_differ():
    seen = Reader(SPEC)(observe())
    one, other, same = (ValueNet(SPEC, width=16, seed=seed)(seen) for seed in (1, 2, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_a_pair_is_read_as_both_are_alone():
    read, obs = Reader(SPEC), observe()
    later = replace(obs, history=obs.history.roll(1, dims=1))
    other = replace(later, past_count=obs.past_count + 1.0)
    for after in (later, other):  # the same past, and one that changed
        for got, wanted in zip(read.pair(obs, after), (read(obs), read(after)), strict=True):
            for name in ("state", "past", "traces", "shown"):
                assert torch.equal(getattr(got, name), getattr(wanted, name))
    assert not torch.equal(*(seen.traces for seen in read.pair(obs, other)))
