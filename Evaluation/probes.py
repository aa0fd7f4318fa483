"""Probes of frozen features: weighted nearest neighbours, a linear layer, attention pooling."""

import argparse
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from util.errors import RunError
from util.lr_sched import lr_at, set_lr
from util.seeding import seed_everything

# Learning rates that are tried, for 256 images a step.
LINEAR_LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ATTENTIVE_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FEWEST = 3  # training images of a trained probe: one is held out, and batch norm needs two
SHORTEST = 1e-12  # features: what `F.normalize` does not divide by


def held_out(images: int) -> int:
    """Return how many of so many training images choose the learning rate: a tenth."""
    return max(1, images // 10)


def has_direction(features: Tensor) -> Tensor:
    """Tell which features have a cosine with others: neither zero nor beyond float32, (n, C) -> (n,) bool."""
    length = features.norm(dim=-1)
    return (length > SHORTEST) & length.isfinite()


def knn(
    train: Tensor, labels: Tensor, queries: Tensor, ks: list[int], temperature: float, classes: int
) -> dict[int, Tensor]:
    """Votes of the nearest neighbours by cosine similarity s, weighted exp(s / temperature) (Wu et al. 2018, DINO).

    Args:
        train: (n, C) float32.
        labels: (n,) int64, of train.
        queries: (m, C) float32.
        ks: numbers of neighbours, at most n.
        temperature: of the weights.
        classes: number of them.

    Returns:
        For each of ks, (m, up to 5) int64: the classes by their votes, -1 where a class has none.
    """
    train, found = F.normalize(train, eps=SHORTEST), {k: [] for k in ks}
    for part in F.normalize(queries, eps=SHORTEST).split(256):
        similarity, nearest = (part @ train.T).topk(max(ks))  # (b, max k), sorted
        # from the nearest on, whose weight is 1: a low temperature would overflow
        weights, voted = ((similarity - similarity[:, :1]) / temperature).exp(), labels[nearest]
        for k in ks:
            votes = weights.new_zeros(len(part), classes).scatter_add_(1, voted[:, :k], weights[:, :k])
            best = votes.topk(min(5, classes))
            found[k].append(best.indices.masked_fill(best.values == 0, -1))
    return {k: torch.cat(parts) for k, parts in found.items()}


class LinearHead(nn.Linear):
    """A linear layer of pooled features: (B, C) -> (B, num_classes). Initialised as MAE's."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class AttentiveHead(nn.Module):
    """One learned query attends to the tokens, then a linear layer (El-Nouby et al. 2024, AIM): no biases.

    Args:
        dim: channels C.
        num_classes: outputs.
        num_heads: of the attention; divides C.
    """

    def __init__(self, dim: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.k, self.v = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.linear = nn.Linear(dim, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, num_classes)."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, n, C) -> (B, heads, n, C / heads)

        query = heads(self.query).expand(len(x), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(query, heads(self.k(x)), heads(self.v(x)))
        return self.linear(pooled.flatten(1))  # (B, heads, 1, C / heads) -> (B, C)


class Probes(nn.Module):
    """Heads of one kind, trained side by side behind one batch norm without weights, which is the same for all.

    Args:
        dim: channels C.
        heads: take (B, C) or (B, L, C).
    """

    def __init__(self, dim: int, heads: list[nn.Module]) -> None:
        super().__init__()
        self.norm, self.heads = nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) or (B, L, C) -> logits (heads, B, num_classes); tokens are normalised over batch and length."""
        x = self.norm(x.reshape(-1, x.shape[-1])).view_as(x)  # (B, L, C) -> (B * L, C) -> (B, L, C)
        return torch.stack([head(x) for head in self.heads])


def train_probe(
    make_head: Callable[[], nn.Module],
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Train a head at each learning rate of a grid, choose one on held-out training images, evaluate it.

    A tenth of the training images, drawn by the seed, is held out; the seed also draws the initial weights and the
    order of the images. Linear heads are trained by SGD with momentum, attentive ones by AdamW; the learning rate
    falls to 0 along a half-cosine.

    Args:
        make_head: a new head, of random weights.
        train: features (n, C) or (n, L, C) and labels (n,); images of the label -1 are left out.
        val: the same, but those of the label -1 count as wrong.
        args: `seed`, `probe_epochs` and `probe_batch_size` count.
        seed: of this probe.
        device: that trains; the features may lie elsewhere.

    Returns:
        `correct`, `correct5` among the images of `val`; `lr`, the one chosen (for 256 images a step), and `held_out`,
        its accuracy in percent there. Images whose logits are not finite count as wrong; `nonfinite` is their number in
        `val` where there are any.

    Raises:
        RunError: the features have no finite variance, or every learning rate has led to values that are not finite.
    """
    seed_everything(args.seed, seed, of_rank=0)
    order = torch.Generator().manual_seed(torch.randint(2**31, ()).item())  # apart: the grid does not change it
    features, labels = train
    intact = (labels >= 0).nonzero()[:, 0].cpu()
    held, used = intact[torch.randperm(len(intact), generator=order)].tensor_split([held_out(len(intact))])
    size = min(args.probe_batch_size, len(used))
    steps = len(used) // size  # an epoch
    linear = features.ndim == 2
    lrs = LINEAR_LRS if linear else ATTENTIVE_LRS
    probes = Probes(features.shape[-1], [make_head() for _ in lrs]).to(device)
    groups = [
        {"params": list(head.parameters()), "lr_scale": lr * size / 256}
        for head, lr in zip(probes.heads, lrs, strict=True)
    ]
    optimizer = SGD(groups, lr=0, momentum=0.9) if linear else AdamW(groups, lr=0, weight_decay=0.05)
    for epoch in range(args.probe_epochs):
        for step, index in enumerate(used[torch.randperm(len(used), generator=order)].split(size)[:steps]):
            set_lr(optimizer, lr_at(epoch + step / steps, 1, 0, 0, args.probe_epochs))
            logits = probes(rows_of(features, index, device).float())
            # a sum over heads: none of them changes another's gradient
            wanted = rows_of(labels, index, device).repeat(len(lrs))  # (heads * B,)
            loss = len(lrs) * F.cross_entropy(logits.flatten(0, 1), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    probes.eval()
    if not probes.norm.running_var.isfinite().all():
        raise RunError("the variance of the features is not finite: they are too large for a probe in float32")
    right, _, nonfinite = count(probes, *train, held.split(size), device).unbind(dim=1)
    finite = [all(p.isfinite().all() for p in head.parameters()) for head in probes.heads]
    fit = torch.tensor(finite) & (nonfinite == 0)
    if not fit.any():
        raise RunError(f"seed {seed}: with each of the learning rates {lrs} the probe diverged")
    chosen = int(right.masked_fill(~fit, -1).argmax())
    found = count(probes, *val, torch.arange(len(val[1])).split(size), device)[chosen].tolist()
    result = {"correct": found[0], "correct5": found[1], "lr": lrs[chosen]}
    result["held_out"] = 100 * right[chosen].item() / len(held)
    return result | ({"nonfinite": found[2]} if found[2] else {})


def rows_of(values: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Some rows, of values that may lie elsewhere, on the device."""
    return values[index.to(values.device)].to(device)


@torch.inference_mode()
def count(probes: Probes, features: Tensor, labels: Tensor, batches: Iterable[Tensor], device: torch.device) -> Tensor:
    """Count over batches of rows the labels that are each head's best, those among its five best, and broken logits.

    Returns:
        (heads, 3) int64; an image whose logits are not finite is in the last count alone.
    """
    counts = torch.zeros(len(probes.heads), 3, dtype=torch.int64)
    for index in batches:
        logits = probes(rows_of(features, index, device).float())
        finite = logits.isfinite().all(dim=-1, keepdim=True)  # (heads, B, 1)
        best = logits.topk(min(5, logits.shape[-1])).indices  # (heads, B, 5)
        hits = (best == rows_of(labels, index, device)[:, None]) & finite
        found = hits[..., 0].sum(dim=1), hits.sum(dim=(1, 2)), (~finite).sum(dim=(1, 2))
        counts += torch.stack(found, dim=1).cpu()
    return counts
