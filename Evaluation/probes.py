"""Probes of frozen features. `PROBES` lists them: a new probe is a `Probe` in this table."""

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from Evaluation.tables import accuracy
from util import arguments
from util.distributed.processes import gather_late, rank, reduce_sum, world_size
from util.errors import RunError, UserError
from util.lr_sched import lr_at, set_lr
from util.seeding import seed_everything
from util.tracking.run_log import Log

FEWEST = 3  # training images of a trained probe: one is held out, and batch norm needs two
SHORTEST = 1e-12  # length of a feature up to which `F.normalize` does not divide by it
Data = tuple[Tensor, Tensor]  # features (n, C) or (n, L, C), and labels (n,) int64; -1 is the label of a broken image


class Task(NamedTuple):
    """Data and settings of a probe.

    Attributes:
        train: images of the label -1 are left out.
        val: images of the label -1 count as wrong.
        classes: number of classes.
        args: of probe.py.
        device: trains; pooled features lie there, tokens on the CPU.
        log: of this rank.
    """

    train: Data
    val: Data
    classes: int
    args: argparse.Namespace
    device: torch.device
    log: Log


class Probe:
    """A classifier of frozen features.

    Attributes:
        name: the value of `--probe`.
        tokens: whether it reads all tokens of an image, (n, L, C), instead of the pooled features, (n, C).
    """

    name: str
    tokens = False

    def add_arguments(self, group: argparse._ActionsContainer) -> None:
        """Add the flags of this probe."""

    def check(self, args: argparse.Namespace, images: int, dim: int) -> list[str]:
        """Check the arguments before any work, with the number of intact training images and the features' channels.

        Returns:
            Lines that tell the user what differs from the arguments.

        Raises:
            UserError: this probe is not possible.
        """
        return []

    def evaluate(self, task: Task) -> list[dict]:
        """Train on `task.train`, evaluate on `task.val`; all processes call it.

        Returns:
            Rows of results: `probe` (its name in the table) and what `accuracy` returns.
        """
        raise NotImplementedError


def has_direction(features: Tensor) -> Tensor:
    """Return which features have a cosine with others: neither zero nor beyond float32, (n, C) -> (n,) bool."""
    length = features.norm(dim=-1)
    return (length > SHORTEST) & length.isfinite()


def knn(
    train: Tensor, labels: Tensor, queries: Tensor, ks: list[int], temperature: float, classes: int
) -> dict[int, Tensor]:
    """Let the nearest neighbours by cosine similarity s vote with weights exp(s / temperature).

    Source: Wu et al. 2018, with the settings of DINO.

    Args:
        train: (n, C) float32.
        labels: (n,) int64, of train.
        queries: (m, C) float32.
        ks: numbers of neighbours, at most n.
        temperature: of the weights.
        classes: number of classes.

    Returns:
        For each of ks, (m, up to 5) int64: the classes by their votes, -1 where a class has none.
    """
    train = F.normalize(train, eps=SHORTEST)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in F.normalize(queries, eps=SHORTEST).split(256):
        similarity, nearest = (part @ train.T).topk(max(ks))  # (b, max k), sorted
        # relative to the nearest one, whose weight is 1: a low temperature would overflow
        weights, voted = ((similarity - similarity[:, :1]) / temperature).exp(), labels[nearest]
        for k in ks:
            votes = weights.new_zeros(len(part), classes).scatter_add_(1, voted[:, :k], weights[:, :k])
            best = votes.topk(min(5, classes))
            found[k].append(best.indices.masked_fill(best.values == 0, -1))
    return {k: torch.cat(parts) for k, parts in found.items()}


def possible(ks: list[int], images: int) -> list[int]:
    """Return the numbers of neighbours that there are enough images for; raise UserError if there are none."""
    if min(ks) > images:
        raise UserError(f"--k {min(ks)}: there are {images} training images")
    return [k for k in dict.fromkeys(ks) if k <= images]


class NearestNeighbours(Probe):
    """Weighted nearest neighbours of pooled features; see `knn`."""

    name = "knn"

    def add_arguments(self, group: argparse._ActionsContainer) -> None:
        group.add_argument("--k", type=arguments.positive, nargs="+", default=[10, 20, 100, 200], help="neighbours")
        temperature = arguments.number(float, 1e-6, 1e9)
        group.add_argument("--temperature", type=temperature, default=0.07, help="of kNN's votes")

    def check(self, args: argparse.Namespace, images: int, dim: int) -> list[str]:
        possible(args.k, images)
        return []

    def evaluate(self, task: Task) -> list[dict]:
        """Return a row for each of `--k` that there are enough training images for; each process takes some queries.

        Features without a direction have no cosine: those of `train` are left out, those of `val` count as wrong.
        """
        train, val, args = task.train, task.val, task.args
        lost = [int((~has_direction(x) & (y >= 0)).sum()) for x, y in (train, val)]
        if any(lost):
            task.log.say(f"kNN: features of {lost[0]} images of train have no direction and are left out")
            task.log.say(f"kNN: features of {lost[1]} images of val have no direction and count as wrong")
        intact = has_direction(train[0]) & (train[1] >= 0)
        ks = possible(args.k, int(intact.sum()))
        if len(ks) < len(set(args.k)):
            task.log.say(f"{intact.sum()} training images: larger --k are left out")
        queries, labels = (part[rank() :: world_size()] for part in val)
        labels = labels.masked_fill(~has_direction(queries), -1)
        rows, neighbours = [], (train[0][intact], train[1][intact])
        for k, best in knn(*neighbours, queries, ks, args.temperature, task.classes).items():
            hits = (best == labels[:, None]) & (labels[:, None] >= 0)  # (m, up to 5)
            correct, correct5 = reduce_sum(torch.stack([hits[:, 0].sum(), hits.sum()])).tolist()
            row = {"probe": f"{k}-NN", "k": k, **accuracy(correct, correct5, len(val[1]))}
            rows.append(row | ({"without_direction": lost[1]} if lost[1] else {}))
        return rows


class LinearHead(nn.Linear):
    """A linear layer of pooled features: (B, C) -> (B, num_classes). Initialised as MAE's."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class AttentiveHead(nn.Module):
    """One learned query attends to the tokens, then a linear layer (El-Nouby et al. 2024, AIM); no biases.

    Args:
        dim: channels C.
        num_classes: number of outputs.
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


class Heads(nn.Module):
    """Heads of one kind, trained side by side behind one shared batch norm without weights.

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


def held_out(images: int) -> int:
    """Return how many of so many training images choose the learning rate: a tenth."""
    return max(1, images // 10)


@dataclass
class TrainedProbe(Probe):
    """A head that is trained at each learning rate of a grid; held-out training images choose one of them.

    Attributes:
        make_head: arguments, channels C, number of classes -> a head with random weights.
        lrs: the grid, for 256 images a step.
        make_optimizer: parameter groups -> optimizer; the learning rate is set at every step.
    """

    name: str
    make_head: Callable[[argparse.Namespace, int, int], nn.Module]
    lrs: tuple[float, ...]
    make_optimizer: Callable[[list[dict]], Optimizer]
    tokens: bool = False

    def check(self, args: argparse.Namespace, images: int, dim: int) -> list[str]:
        if images < FEWEST:
            raise UserError(f"a probe trains on {FEWEST - 1} images and is chosen by one held out: there are {images}")
        used = images - held_out(images)
        if used < args.probe_batch_size:
            return [f"--probe_batch_size {args.probe_batch_size}: batches have the {used} images that are trained on"]
        return []

    def evaluate(self, task: Task) -> list[dict]:
        """Return one row: the mean over `--seeds` probes, its deviation and each run; each process trains some."""
        seeds, images = range(task.args.seeds), len(task.val[1])
        shares = gather_late([self.train(task, seed) for seed in seeds[rank() :: world_size()]])
        runs = [shares[seed % world_size()][seed // world_size()] for seed in seeds]
        for seed, run in enumerate(runs):
            if count := run.get("nonfinite"):
                task.log.say(f"{self.name} probe of seed {seed}: the logits of {count} images are not finite: wrong")
        correct, correct5 = (statistics.mean(run[name] for run in runs) for name in ("correct", "correct5"))
        each = [100 * run["correct"] / images for run in runs]
        deviation = statistics.stdev(each) if len(each) > 1 else None
        return [{"probe": self.name, **accuracy(correct, correct5, images), "acc1_std": deviation, "seeds": runs}]

    def train(self, task: Task, seed: int) -> dict[str, float]:
        """Train a head at each learning rate, choose one on held-out training images, evaluate it.

        A tenth of the training images, drawn by the seed, is held out; the seed also draws the initial weights and the
        order of the images. The learning rate falls to 0 along a half-cosine.

        Returns:
            `correct` and `correct5`: images of `val` whose label is the best, or among the five best; `lr`, the
            learning rate that was chosen (for 256 images a step), and `held_out`, its accuracy in percent on the
            held-out images. Images whose logits are not finite count as wrong; `nonfinite` is their number in `val`
            where there are any.

        Raises:
            RunError: the variance of the features is not finite, or the head diverges at every learning rate.
        """
        (features, labels), args, device = task.train, task.args, task.device
        seed_everything(args.seed, seed, of_rank=0)
        start = int(torch.randint(2**31, ()))
        order = torch.Generator().manual_seed(start)  # of its own: the grid does not change it
        intact = (labels >= 0).nonzero()[:, 0].cpu()
        held, used = intact[torch.randperm(len(intact), generator=order)].tensor_split([held_out(len(intact))])
        size = min(args.probe_batch_size, len(used))
        steps = len(used) // size  # an epoch
        dim = features.shape[-1]
        model = Heads(dim, [self.make_head(args, dim, task.classes) for _ in self.lrs]).to(device)
        parameters = ([*head.parameters()] for head in model.heads)
        rates = [lr * size / 256 for lr in self.lrs]
        groups = [{"params": own, "lr_scale": rate} for own, rate in zip(parameters, rates, strict=True)]
        optimizer = self.make_optimizer(groups)
        for epoch in range(args.probe_epochs):
            for step, index in enumerate(used[torch.randperm(len(used), generator=order)].split(size)[:steps]):
                set_lr(optimizer, lr_at(epoch + step / steps, 1, 0, 0, args.probe_epochs))
                logits = model(rows_of(features, index, device).float())
                wanted = rows_of(labels, index, device).repeat(len(self.lrs))  # (heads * B,)
                # (heads, B, classes) -> (heads * B, classes); summed over heads: none changes another's gradient
                loss = len(self.lrs) * F.cross_entropy(logits.flatten(0, 1), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        if not model.get_buffer("norm.running_var").isfinite().all():
            raise RunError("the variance of the features is not finite: they are too large for a probe in float32")
        right, _, nonfinite = count(model, features, labels, held.split(size), device).unbind(dim=1)
        finite = torch.tensor([all(p.isfinite().all() for p in head.parameters()) for head in model.heads])
        finite &= nonfinite == 0
        if not finite.any():
            raise RunError(f"seed {seed}: with each of the learning rates {self.lrs} the probe diverged")
        chosen = int(right.masked_fill(~finite, -1).argmax())
        found = count(model, *task.val, torch.arange(len(task.val[1])).split(size), device)[chosen].tolist()
        result = {"correct": found[0], "correct5": found[1], "lr": self.lrs[chosen]}
        result["held_out"] = 100 * right[chosen].item() / len(held)
        return result | ({"nonfinite": found[2]} if found[2] else {})


def rows_of(values: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Return rows of values, which may lie elsewhere, on the device."""
    return values[index.to(values.device)].to(device)


@torch.inference_mode()
def count(model: Heads, features: Tensor, labels: Tensor, batches: Iterable[Tensor], device: torch.device) -> Tensor:
    """Count over batches of rows the labels that are each head's best, those among its five best, and broken logits.

    Returns:
        (heads, 3) int64; an image whose logits are not finite is in the last count alone.
    """
    counts = torch.zeros(len(model.heads), 3, dtype=torch.int64)
    for index in batches:
        logits = model(rows_of(features, index, device).float())
        finite = logits.isfinite().all(dim=-1, keepdim=True)  # (heads, B, 1)
        best = logits.topk(min(5, logits.shape[-1])).indices  # (heads, B, 5)
        hits = (best == rows_of(labels, index, device)[:, None]) & finite
        found = hits[..., 0].sum(dim=1), hits.sum(dim=(1, 2)), (~finite).sum(dim=(1, 2))
        counts += torch.stack(found, dim=1).cpu()
    return counts


class AttentiveProbe(TrainedProbe):
    """Attention pooling of all tokens and a linear layer."""

    def add_arguments(self, group: argparse._ActionsContainer) -> None:
        group.add_argument("--attn_heads", type=arguments.side, help="attentive probe (default: 64 channels each)")

    def check(self, args: argparse.Namespace, images: int, dim: int) -> list[str]:
        if dim % attention_heads(args, dim):
            raise UserError(f"--attn_heads {attention_heads(args, dim)} does not divide the {dim} channels")
        return super().check(args, images, dim)


def attention_heads(args: argparse.Namespace, dim: int) -> int:
    """Return the number of attention heads for features of `dim` channels."""
    return args.attn_heads or max(1, dim // 64)


LINEAR = TrainedProbe(
    "linear",
    lambda args, dim, classes: LinearHead(dim, classes),
    (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    lambda groups: SGD(groups, lr=0, momentum=0.9),
)
ATTENTIVE = AttentiveProbe(
    "attentive",
    lambda args, dim, classes: AttentiveHead(dim, classes, attention_heads(args, dim)),
    (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    lambda groups: AdamW(groups, lr=0, weight_decay=0.05),
    tokens=True,
)
PROBES: dict[str, Probe] = {probe.name: probe for probe in (NearestNeighbours(), LINEAR, ATTENTIVE)}
