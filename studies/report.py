"""Report the results of a study: means and standard deviations over seeds, as a table and as a plot."""

import math
import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit

from Evaluation.tables import table, wilson


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation, which is None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def compare(values: list[float], reference: list[float]) -> dict[str, float | tuple[float, float] | None]:
    """Compare values with those of a reference that has the same seeds, in the same order.

    Returns:
        Mean `difference` of equal seeds, its standard deviation `std` and 95 % `interval` (Student's t), and the
        `effect` size (Cohen's d: the difference over the root of the mean variance of both). `std` and `interval` are
        None for one seed, `effect` where the variances are zero.
    """
    difference, std = mean_std([a - b for a, b in zip(values, reference, strict=True)])
    interval = None
    if std is not None:
        half = float(stdtrit(len(values) - 1, 0.975)) * std / math.sqrt(len(values))
        interval = difference - half, difference + half
    pooled = math.hypot(*(mean_std(group)[1] or 0 for group in (values, reference))) / math.sqrt(2)
    effect = difference / pooled if pooled else None
    return {"difference": difference, "std": std, "interval": interval, "effect": effect}


def groups(runs: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Return runs by labels and arm, in the order of `runs`; the runs of an arm are sorted by seed."""
    found: dict[str, dict[str, list[dict]]] = {}
    for run in runs:
        found.setdefault(run["labels"], {}).setdefault(run["arm"], []).append(run)
        found[run["labels"]][run["arm"]].sort(key=lambda run: run["seed"])
    return found


def summary(runs: list[dict]) -> list[dict]:
    """Return mean and standard deviation of every arm, compared with the first arm that has the same labels."""
    rows = []
    for labels, arms in groups(runs).items():
        reference = [run["accuracy"] for run in next(iter(arms.values()))]
        for number, (arm, of_arm) in enumerate(arms.items()):
            accuracy = [run["accuracy"] for run in of_arm]
            mean, std = mean_std(accuracy)
            row = {"labels": labels, "arm": arm, "seeds": [run["seed"] for run in of_arm], "mean": mean, "std": std}
            for kind in ("pretrain", "finetune"):
                row[f"{kind}_seconds"] = statistics.fmean([run[kind]["seconds"] if run[kind] else 0 for run in of_arm])
            rows.append(row | ({"compared": compare(accuracy, reference)} if number else {}))
    return rows


def machines(runs: list[dict], otherwise: dict) -> list[dict]:
    """Return the machines of runs (of results.json) without duplicates, each with its first and last date as `dates`.

    `otherwise` is the machine of runs that did not record theirs.
    """
    found: dict[tuple, set[str]] = {}
    for step in (step for run in runs for step in (run["pretrain"], run["finetune"]) if step):
        for machine in step["machines"] or [otherwise]:
            about = tuple((name, value) for name, value in machine.items() if name != "date")
            found.setdefault(about, set()).add(machine["date"])
    return [dict(about) | {"dates": sorted({min(dates), max(dates)})} for about, dates in found.items()]


def _description(machine: dict) -> str:
    return (
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {machine['jobs']} runs at a time, torch "
        f"{machine['torch']}, {' to '.join(machine['dates'])}"
    )


def markdown(results: dict) -> str:
    """Return the table of a study, with notes on how to read it."""
    runs = results["runs"]
    head = "trained with|arm|top-1 (%)|compared with the first (paired)|95 % interval|effect size|seeds|time (s)"
    body = []
    for row in summary(runs):
        compared = row.get("compared")
        difference = _plus_minus(compared["difference"], compared["std"], "+") if compared else ""
        interval = "{:+.2f} to {:+.2f}".format(*compared["interval"]) if compared and compared["interval"] else ""
        effect = f"{compared['effect']:+.1f}" if compared and compared["effect"] is not None else ""
        seconds = f"{row['pretrain_seconds']:.0f} + {row['finetune_seconds']:.0f}"
        accuracy = _plus_minus(row["mean"], row["std"])
        body.append([row["labels"], row["arm"], accuracy, difference, interval, effect, len(row["seeds"]), seconds])
    images = runs[0]["images"]
    low, high = wilson(runs[0]["accuracy"] / 100 * images, images)
    return "\n".join(
        [
            table(head.split("|"), *body),
            "",
            f"Accuracy after the last epoch on {images:,} images of val/, mean ± sample standard deviation over seeds; "
            "the best epoch is not looked for. Drawing other images would move a single one by about "
            f"{(high - low) / 2:.1f} (95 %). Paired: the differences of equal seeds. 95 % interval: of their mean over "
            "seeds, by Student's t. Effect size (Cohen's d): the difference over the root of the mean variance of both "
            f"arms. Time: of pretraining + finetuning a run. Budget {results['budget']}.",
            "",
            f"{'; '.join(map(_description, results['machines']))}.",
            "",
        ]
    )


def _plus_minus(mean: float, std: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.2f}" + ("" if std is None else f" ± {std:.2f}")


def draw(runs: list[dict]) -> Figure:
    """Draw a row for each set of labels: accuracies with mean and standard deviation, and accuracy over epochs."""
    found = groups(runs)
    curves = any(len(run["curve"]) > 1 for run in runs)
    heights = [max(2.6 if curves else 0, 0.38 * len(arms) + 1.2) for arms in found.values()]
    figure = Figure(figsize=(10 if curves else 6, sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), 2 if curves else 1, squeeze=False, height_ratios=heights)
    for axes, (labels, arms) in zip(panels, found.items(), strict=True):
        _draw_accuracy(axes[0], labels, arms)
        if curves and any(len(run["curve"]) > 1 for of_arm in arms.values() for run in of_arm):
            _draw_curves(axes[1], labels, arms)
        elif curves:
            axes[1].remove()
    return figure


def _draw_accuracy(axis: Axes, labels: str, arms: dict[str, list[dict]]) -> None:
    for number, of_arm in enumerate(arms.values()):
        accuracy = [run["accuracy"] for run in of_arm]
        mean, std = mean_std(accuracy)
        colour = f"C{number}"
        axis.plot(accuracy, [number] * len(accuracy), "o", color=colour, alpha=0.45, markersize=6, mew=0)
        if std is not None:
            axis.errorbar(mean, number, xerr=std, color=colour, capsize=4, linewidth=1.5)
        axis.plot(mean, number, "|", color=colour, markersize=16, markeredgewidth=2)
    axis.set(title=labels, xlabel="top-1 after the last epoch (%)", ylim=(len(arms) - 0.5, -0.5))
    axis.set_yticks(range(len(arms)), list(arms))
    axis.grid(axis="x", alpha=0.3)


def _draw_curves(axis: Axes, labels: str, arms: dict[str, list[dict]]) -> None:
    for number, of_arm in enumerate(arms.values()):
        epochs = range(1, len(of_arm[0]["curve"]) + 1)
        for run in of_arm:
            axis.plot(epochs, run["curve"], color=f"C{number}", alpha=0.3, linewidth=1)
        mean = [statistics.fmean(values) for values in zip(*(run["curve"] for run in of_arm), strict=True)]
        axis.plot(epochs, mean, "o-", color=f"C{number}", markersize=4)
    axis.set(title=labels, xlabel="epoch of finetuning", ylabel="top-1 on val (%)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
