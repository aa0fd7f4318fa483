"""Compare the training throughput of this repository with the released composition, on random data, in one run.

    python benchmarks/bench_train.py
    python benchmarks/bench_train.py --cases pretrain_base --profile
    python benchmarks/bench_train.py --switches none cuda_graph all

In each case both compositions train the same model on the same random images on the device. Ours trains through
`util.training.loop.train_epoch` (compiled blocks, fused AdamW, no waiting for the device), the released one through
released.py (mamba-ssm's kernels on flipped copies, eager, a wait after every step). Where mamba-ssm is missing, the
torch backend takes its place; no ratio is printed then, as it says nothing about the released code. The time is the
median of several rounds after a warm-up, by CUDA events on a GPU. `--backend`, `--no_compile` and `--released_loop`
describe a single composition: `--backend mamba_ssm --no_compile --released_loop` is the released one. `--cuda_graph`,
`--no_cuda_graph` and `--fused_ops` apply wherever our loop trains. `--switches` compares kernels of `SWITCHES`
instead, each alone, to decide on their defaults.

"busy" is the time in which the GPU computes in a step: the union of the intervals of all kernels and copies in a trace
of one more round. The GPU waits for the host in the rest of the step.

Model FLOP utilisation is 3 x F x images/s / peak. F are the floating-point operations of the matrix products and
convolutions in one image's forward pass, as `torch.utils.flop_counter` counts them; the backward pass takes twice as
many. The scan is not counted. Peak is the data sheet's dense bfloat16 rate, without sparsity.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine_pretrain
import models_arm
import ops
from benchmarks import bench_ops, released
from benchmarks.command_line import fitting, make_parser
from Finetuning import engine_finetune
from models_classifier import ARMClassifier
from models_pretrain import PretrainModel
from ops import BackendUnavailable, fused, kernel_choice
from ops.cuda_graph import captures
from util import cli, hardware
from util.data.device_loader import DeviceLoader
from util.distributed.processes import init_device
from util.errors import as_user_error
from util.files import output_file, write_text
from util.lr_decay import param_groups_layer_decay
from util.tracking.run_log import Log
from util.training.run_state import Run

PEAK = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12, "B200": 2250e12}  # bf16, dense


class Case(NamedTuple):
    """A model to train; `sizes` are keyword arguments of it."""

    task: str
    model: str
    batch_size: int
    img_size: int
    sizes: dict = {}  # noqa: RUF012


TOY = {"patch_size": 8, "embed_dim": 64, "depth": 4}
CASES = {
    "pretrain_base": Case("pretrain", "arm_base_pz16", 256, 192),
    "pretrain_large": Case("pretrain", "arm_large_pz16", 128, 192),
    "pretrain_huge": Case("pretrain", "arm_huge_pz16", 128, 192),
    "finetune_base": Case("finetune", "arm_base_pz16", 128, 224),
    "finetune_large": Case("finetune", "arm_large_pz16", 32, 224),
    "pretrain_toy": Case("pretrain", "arm_tiny_pz16", 8, 64, {**TOY, "dec_embed_dim": 64, "dec_depth": 2}),
    "finetune_toy": Case("finetune", "arm_tiny_pz16", 8, 64, {**TOY, "num_classes": 10}),
}


class Composition(NamedTuple):
    """Kernels and loop that train a case."""

    backend: str
    compiled: bool
    released_loop: bool
    cuda_graph: bool
    fused_ops: list[str]


KERNELS = ("cuda_graph", "cuda", *bench_ops.OPERATORS, "casts")
SWITCHES = ("none", *KERNELS, "all", "released")
PRINTED = Path("-")
PROFILE = "Profiles of bench_train.py"  # the first line of their file


class RandomBatches(DeviceLoader):
    """A loader that yields the same random images and labels, on the device, `steps` times."""

    sampler = SimpleNamespace(set_epoch=lambda epoch, start: None)

    def __init__(self, batch_size: int, size: int, classes: int, steps: int, device: torch.device) -> None:
        imgs = torch.randn(batch_size, 3, size, size, device=device)
        self.batch, self.steps = [imgs, torch.randint(classes, (batch_size,), device=device)], steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Tensor]]:
        for _ in range(self.steps):
            yield [tensor.clone() for tensor in self.batch]  # mixup works in place


def build(case: Case, backend: str, device: torch.device) -> PretrainModel | ARMClassifier:
    """Build the model of a case, as the recipes train it."""
    sizes = {"img_size": case.img_size, "scan_backend": backend, **case.sizes}
    torch.manual_seed(0)
    with device:
        if case.task == "pretrain":
            return models_arm.create_pretrain_model(case.model, norm_pix_loss=True, **sizes)
        rate = 0.3 if "large" in case.model else 0.1
        return models_arm.create_classifier(case.model, drop_path_rate=rate, **sizes)


def loop_args(case: Case, cuda_graph: bool = False, lr: float = 1e-5) -> argparse.Namespace:
    """Return the arguments that `train_epoch` reads, for one epoch at a constant learning rate."""
    return argparse.Namespace(
        lr=lr, min_lr=lr, warmup_epochs=0, epochs=1, accum_iter=1, seed=0, output_dir="", start_epoch=None,
        batch_size=case.batch_size, clip_grad=3.0 if case.task == "pretrain" else None, save_every_steps=None,
        max_nonfinite=3, cuda_graph=cuda_graph,
    )  # fmt: skip


def flops_per_image(case: Case) -> int:
    """Count the floating-point operations of the products in one image's forward pass, on the meta device."""
    meta = torch.device("meta")
    fused.use(["none"], meta)  # it counts products of torch alone
    model = build(case, "torch", meta)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, case.img_size, case.img_size, device=meta))
    return counter.get_total_flops()


def epoch_runner(
    case: Case, how: Composition, steps: int, device: torch.device, lr: float = 1e-5, log: Log | None = None
) -> Callable[[], object]:
    """Return a function that trains `steps` updates; our loop logs to `log`, if given."""
    log = log or Log()
    torch._dynamo.reset()
    gc.collect()  # reference cycles hold the previous model
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    fused.use(how.fused_ops or ["none"], device)
    model = build(case, how.backend, device)
    classes = 1 if isinstance(model, PretrainModel) else model.num_classes
    loader = RandomBatches(case.batch_size, case.img_size, classes, steps, device)
    args = loop_args(case, how.cuda_graph, lr)
    if case.task == "pretrain":
        groups, betas, ema = param_groups_weight_decay(model, 0.05), (0.9, 0.95), None
    else:
        groups, betas = param_groups_layer_decay(model, 0.05, 0.65), (0.9, 0.999)
        ema = ModelEmaV3(model, decay=0.99992, foreach=not how.released_loop)
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=classes)
        criterion = SoftTargetCrossEntropy()
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=not how.released_loop)
    if how.released_loop:
        released.use_released_blocks(model)

        def compute_loss(imgs: Tensor, labels: Tensor) -> Tensor:
            if case.task == "pretrain":
                return model(imgs).mean()
            imgs, targets = mixup(imgs, labels)
            return criterion(model(imgs), targets)

        model.train()
        return lambda: released.train_steps(model, loader, compute_loss, optimizer, args.clip_grad, ema)
    if how.compiled:
        model.compile(**fused.compile_options())
    graphs = kernel_choice.block_graphs(args, model)
    run = Run(args, model, optimizer, ema, graphs=graphs)

    def epoch() -> None:
        run.samples = 0
        if case.task == "pretrain":
            engine_pretrain.train_one_epoch(model, loader, run, device, log)
        else:
            engine_finetune.train_one_epoch(
                model, engine_finetune.loss_of(model, criterion, mixup), loader, run, device, log
            )
        if graphs is not None and not graphs.calls:
            raise RuntimeError("no block could be captured in CUDA graphs")

    return epoch


def measure(case: Case, how: Composition, args: argparse.Namespace) -> dict[str, float | None]:
    """Return images/s, busy time, MFU and peak memory of one composition."""
    gpu = args.device.type == "cuda"
    run = epoch_runner(case, how, args.steps, args.device)
    start_up, _ = hardware.time_once(run, args.device)
    times = [hardware.time_once(run, args.device)[0] for _ in range(args.rounds)]
    busy = busy_seconds(run) if gpu else None
    if args.profile is not None:
        show_profile(run, args)
    speed = case.batch_size * args.steps / statistics.median(times)
    name = torch.cuda.get_device_name(args.device) if gpu else ""
    peak = next((rate for key, rate in PEAK.items() if key in name), None)
    return {
        "images_per_second": speed,
        "ms_per_step": 1000 * case.batch_size / speed,
        "ms_per_step_of_rounds": [1000 * seconds / args.steps for seconds in times],
        "busy_ms_per_step": busy and 1000 * busy / args.steps,
        "mfu": peak and 3 * flops_per_image(case) * speed / peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated(args.device) / 1e9 if gpu else None,
        "first_epoch_seconds": start_up,  # with compilation
    }


def measure_or_overflow(case: Case, how: Composition, args: argparse.Namespace) -> dict:
    """Return what `measure` does, or `out_of_memory`."""
    try:
        return measure(case, how, args)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def busy_seconds(run: Callable[[], object]) -> float:
    """Return the seconds in which the GPU computes while `run` runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))  # only here are annotations, which span gaps, told apart
        events = json.loads(path.read_text())["traceEvents"]
    works = ("kernel", "gpu_memcpy", "gpu_memset")
    return union((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in works) / 1e6


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of the intervals (start, end)."""
    covered, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def show_profile(run: Callable[[], object], args: argparse.Namespace) -> None:
    """Print the 30 kernels (or operators, on a CPU) that take most of the time, or write all of them to a file."""
    gpu = args.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as recorded:
        run()
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows, width = (30, 70) if args.profile == PRINTED else (-1, 150)
    table = recorded.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=width)
    if args.profile == PRINTED:
        print(table)
    else:
        args.profiles.append(f"{args.now}, {args.steps} steps\n{table}")
        write_text(args.profile, "\n\n".join(args.profiles))


def unavailable(switch: str, device: torch.device) -> str | None:
    """Return why a switch, "cuda_graph", "cuda" or a fused operator, cannot be turned on here; None if it can."""
    if switch == "cuda":
        return "there is no such backend" if switch not in ops.BACKENDS else ops.unavailable(switch)
    if switch == "casts":
        return None if device.type == "cuda" else "the compiler fuses small kernels on a GPU only"
    if switch != "cuda_graph":
        try:
            return bench_ops.missing(switch, device)
        except Exception as error:  # of this operator only
            return f"it fails: {hardware.failure(error)}"
    try:
        captures(True, device)
    except ValueError as error:
        return f"it {error}"
    return None


def switched(name: str, device: torch.device, compiled: bool, without: Sequence[str] = ()) -> Composition | str:
    """Return the composition with one of `SWITCHES` on ("all": those that work here), or why there is none.

    Kernels of `without` stay off.
    """
    if name == "released":
        backend = "mamba_ssm" if device.type == "cuda" else "torch"
        return ops.unavailable(backend) or Composition(backend, False, True, False, [])
    asked = {"none": (), "all": KERNELS}.get(name, (name,))
    reasons = {switch: "--without it" if switch in without else unavailable(switch, device) for switch in asked}
    if reason := reasons.get(name):
        return reason
    on = [switch for switch, reason in reasons.items() if reason is None]
    plain = "triton" if device.type == "cuda" else "auto"
    backend = "cuda" if "cuda" in on else plain
    return Composition(backend, compiled, False, "cuda_graph" in on, [switch for switch in on if switch in fused.FUSED])


def compositions(args: argparse.Namespace) -> dict[str, Composition | str]:
    """Return the compositions to compare by name; instead of one that is not possible here, the reason."""
    gpu = args.device.type == "cuda"
    compiled = gpu and not args.no_compile
    if args.switches:
        return {name: switched(name, args.device, compiled, args.without) for name in args.switches}
    backend, kernels_of_ours = args.backend or "auto", (args.cuda_graph, args.fused_ops)
    if args.released_loop:
        return {"by hand": Composition(backend, False, True, False, [])}
    if args.backend:
        return {"by hand": Composition(backend, compiled, False, *kernels_of_ours)}
    yardstick = "mamba_ssm" if gpu and ops.unavailable("mamba_ssm") is None else "torch"
    return {
        "ours": Composition("auto", compiled, False, *kernels_of_ours),
        f"released ({yardstick})": Composition(yardstick, False, True, False, []),
    }


def main(args: argparse.Namespace) -> None:
    """Train every case with every composition, print a table, write everything as JSON."""
    args.device = init_device(args.device)  # as the training scripts set it up
    with as_user_error(ValueError, prefix="--cuda_graph "):
        args.cuda_graph = captures(args.cuda_graph, args.device)
    with as_user_error(ValueError, BackendUnavailable, prefix=f"--fused_ops {' '.join(args.fused_ops)}: "):
        args.fused_ops = fused.use(args.fused_ops, args.device)
    report = hardware.Report("train", args.device, args.output, steps=args.steps)
    if args.profile not in (None, PRINTED):
        output_file(args.profile, lambda path: path.read_text(errors="replace").startswith(PROFILE), flag="--profile")
        args.profiles = [PROFILE]
    print(f"{'case, composition':<{hardware.WIDTH}}{'images/s':>10}{'ms/step':>10}{'busy':>8}", end="")
    print(f"{'MFU':>8}{'GB':>8}{'start s':>9}{'x':>7}")
    speeds: dict[tuple[str, str], float] = {}
    chosen = compositions(args)
    todo = [(name, kind) for name in args.cases for kind in chosen]
    if args.switches:  # the first switches of all cases count more than the last of one
        todo = [(name, kind) for kind in args.switches for name in args.cases]
    for name, kind in todo:
        case = CASES[name]._replace(batch_size=args.batch_size or CASES[name].batch_size)
        args.now = title = f"{name}, {kind}"
        how = chosen[kind]
        row: dict = {"case": name, "composition": kind}
        work = how if isinstance(how, str) else partial(measure_or_overflow, case, how, args)
        if not isinstance(how, str):
            row |= {"batch_size": case.batch_size, **how._asdict()}
        if not report.add(title, row, work):
            continue
        if "out_of_memory" in row:
            print(f"{title:<{hardware.WIDTH}}out of memory", flush=True)
            continue
        speeds[name, kind] = speed = row["images_per_second"]
        busy = f"{row['busy_ms_per_step']:.1f}" if row["busy_ms_per_step"] else "-"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        memory = f"{row['peak_memory_gb']:.1f}" if row["peak_memory_gb"] else "-"
        fair = kind == "released (mamba_ssm)" and (name, "ours") in speeds
        ratio = f"{speeds[name, 'ours'] / speed:.2f}" if fair else ""
        numbers = f"{speed:>10.1f}{row['ms_per_step']:>10.1f}{busy:>8}{mfu:>8}{memory:>8}"
        print(f"{title:<{hardware.WIDTH}}{numbers}{row['first_epoch_seconds']:>9.1f}{ratio:>7}", flush=True)
    report.close()


def add_without(parser: argparse.ArgumentParser) -> None:
    """Add `--without`, which leaves out kernels that are known to be wrong, in "all" too."""
    parser.add_argument("--without", nargs="+", choices=KERNELS, default=[], help="leave these kernels off")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    numbers = {
        "batch_size": (None, "instead of the recipe's"),
        "steps": (20, "updates in a round"),
        "rounds": (3, "timed rounds, after one more"),
    }
    parser = make_parser("bench_train.py", __doc__, numbers)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=fitting(CASES), help="default: %(default)s")
    parser.add_argument("--backend", choices=ops.BACKENDS, help="train with this scan backend alone")
    parser.add_argument("--no_compile", action="store_true", help="run the blocks eagerly")
    kernel_choice.add_arguments(parser)
    text = "compare these, each alone: none, all, released, or a kernel"
    parser.add_argument("--switches", nargs="+", choices=SWITCHES, help=text)
    add_without(parser)
    parser.add_argument("--released_loop", action="store_true", help="train with the released composition's loop alone")
    text = "also show where the time goes; all rows in a file"
    parser.add_argument("--profile", type=Path, nargs="?", const=PRINTED, metavar="FILE", help=text)
    return parser


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
