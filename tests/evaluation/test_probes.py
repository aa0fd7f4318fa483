"""Test probes on given features: compare them with NumPy, train them on classes that are separable."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from Evaluation import probes
from util.errors import RunError
from util.tracking.run_log import Log, open_log

CPU = torch.device("cpu")
HEADS = probes.Heads
ARGS = argparse.Namespace(seed=0, probe_epochs=40, probe_batch_size=64, attn_heads=2)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_knn_against_numpy():
    rng = np.random.default_rng(0)
    train, queries, labels = rng.normal(size=(60, 8)), rng.normal(size=(300, 8)), rng.integers(0, 7, 60)
    tensors = (torch.from_numpy(x).float() for x in (train, queries))
    got = probes.knn(next(tensors), torch.from_numpy(labels), next(tensors), [1, 3, 20], 0.07, 9)
    for k, predicted in got.items():
        assert predicted.shape == (300, 5)
        for query, classes in zip(queries, predicted.tolist(), strict=True):
            cosine = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
            nearest = np.argsort(-cosine)[:k]
            votes = {c: np.exp(cosine[nearest[labels[nearest] == c]] / 0.07).sum() for c in set(labels[nearest])}
            want = sorted(votes, key=votes.get, reverse=True)[:5]
            assert classes == want + [-1] * (5 - len(want))


def test_attention_pooling_against_a_formula():
    """Each head pools the values by the softmax of query and keys; batch norm treats all tokens alike."""
    torch.manual_seed(0)
    heads = [probes.AttentiveHead(6, 5, num_heads=2)]
    x = 3 + 2 * torch.randn(4, 7, 6)
    got = probes.Heads(6, heads)(x)[0]
    query, k, v, linear = (w.detach().double().numpy() for w in heads[0].parameters())
    x = x.double().numpy()
    x = (x - x.mean(axis=(0, 1))) / np.sqrt(x.var(axis=(0, 1)) + 1e-6)
    pooled = np.zeros((4, 6))
    for part in (slice(0, 3), slice(3, 6)):
        scores = (x @ k.T)[..., part] @ query[0, 0, part] / np.sqrt(3)
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        pooled[:, part] = (weights[..., None] * (x @ v.T)[..., part]).sum(axis=1)
    assert np.allclose(got.detach(), pooled @ linear.T, atol=1e-6)


def separable(count, shape=(), seed=0):
    """Return four classes that differ in two of eight channels, whose scale is a hundredth of the others'."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    x = torch.randn(count, *shape, 8, generator=generator)
    signs = torch.stack([labels % 2, labels // 2], dim=1) * 2.0 - 1  # (count, 2)
    x[..., :2] = 1e-2 * (0.2 * x[..., :2] + signs.view(count, *[1] * len(shape), 2))
    return x, labels


def train(train, val, probe=probes.LINEAR):
    return probe.train(probes.Task(train, val, 4, ARGS, CPU, Log()), seed=0)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_probes_learn_what_is_separable(kind):
    shape = (5,) if kind == "attentive" else ()
    result = train(separable(300, shape), separable(100, shape, 1), probes.PROBES[kind])
    assert result["correct"] >= 95
    assert result["correct5"] == 100
    assert result["held_out"] > 90


def test_the_learning_rate_is_chosen_without_val():
    """The labels of val change neither the learning rate nor the held-out accuracy; the label -1 is never right."""
    data, (x, y) = separable(300), separable(100, seed=1)
    truths = (y, (y + 1) % 4, torch.full((100,), -1))
    right, wrong, broken = (train(data, (x, truth)) for truth in truths)
    assert right["lr"] == wrong["lr"]
    assert right["held_out"] == wrong["held_out"]
    assert right["correct"] >= 95
    assert wrong["correct"] <= 5
    assert (broken["correct"], broken["correct5"]) == (0, 0)
    single = train(data, (x[:1], y[:1]))  # as among many images
    assert single["correct"] == 1


def test_a_low_temperature_gives_the_nearest_neighbour():
    """Weights that are not relative to the nearest one's would overflow float32."""
    rng = torch.Generator().manual_seed(0)
    train, labels = torch.randn(200, 8, generator=rng), torch.arange(200) % 4
    for temperature in (0.07, 0.01, 1e-4):
        best = probes.knn(train, labels, train, [1, 20], temperature, 4)
        assert torch.equal(best[1][:, 0], labels)
    assert torch.equal(best[20][:, 0], labels)


def zeroed(head):
    """Return the head with weights of zero."""
    torch.nn.init.zeros_(head.weight)
    return head


def test_heads_trained_side_by_side_are_independent(monkeypatch):
    """A head gets the same weights as alone; the best head on held-out images is chosen."""
    data = separable(200)
    found = {}
    for lrs in ((0.0,), (0.3,), (0.0, 0.3, 1e-5)):
        seen = []
        monkeypatch.setattr(probes, "Heads", lambda *a, s=seen: s.append(HEADS(*a)) or s[0])
        probe = replace(probes.LINEAR, lrs=lrs, make_head=lambda *_: zeroed(probes.LinearHead(8, 4)))
        found[lrs] = train(data, data, probe), seen[0].heads
    together, heads = found[0.0, 0.3, 1e-5]
    assert together["lr"] == 0.3
    for head, alone in zip(heads, ((0.0,), (0.3,)), strict=False):
        assert torch.allclose(head.weight, found[alone][1][0].weight, rtol=1e-4, atol=1e-9)


def test_a_diverged_learning_rate_is_never_chosen():
    """NaN, which topk treats as the largest logit, does not count as right either."""
    data = separable(200)

    def found(*starts, lr=0.3, data=data):
        heads = iter(starts)

        def make_head(*_):
            head = probes.LinearHead(8, 4)
            torch.nn.init.constant_(head.weight, next(heads))
            torch.nn.init.ones_(head.bias[:1])  # the prediction is 0 without training
            return head

        return train(data, data, replace(probes.LINEAR, lrs=(lr,) * len(starts), make_head=make_head))

    with pytest.raises(RunError, match="the probe diverged"):
        found(float("nan"), float("inf"))
    assert found(float("nan"), 0) == found(0)
    assert found(0)["correct"] > 190
    never_right = data[0], data[1].clamp(min=1)
    assert found(float("nan"), 0, lr=0, data=never_right) == found(0, lr=0, data=never_right)
    assert found(0, lr=0, data=never_right)["held_out"] == 0


def test_logits_that_are_not_finite_count_as_wrong():
    model = HEADS(2, [torch.nn.Identity()]).eval()
    x = torch.tensor([[1.0, 0], [float("nan"), 0], [0, float("inf")], [0, 1], [3, 0]])
    labels = torch.tensor([0, 0, 1, 0, -1])
    assert probes.count(model, x, labels, [torch.arange(5)], CPU).tolist() == [[1, 2, 2]]


def test_features_without_a_direction(capsys):
    """They have no cosine: those of train are no neighbours, those of val count as wrong."""
    train = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0, 0], [3e38, 3e38]]), torch.tensor([0, 0, 1, 0, 0])
    val = torch.tensor([[1.0, 0.2], [0.1, 1], [0, 0]]), torch.tensor([0, 1, 0])
    args = argparse.Namespace(k=[1, 4], temperature=0.07)
    (row,) = probes.PROBES["knn"].evaluate(probes.Task(train, val, 2, args, CPU, open_log()))
    assert (row["k"], row["acc1"], row["images"], row["without_direction"]) == (1, pytest.approx(200 / 3), 3, 1)
    out = capsys.readouterr().out
    assert "features of 2 images of train have no direction and are left out" in out
    assert "features of 1 images of val have no direction and count as wrong" in out
    assert "3 training images: larger --k are left out" in out
