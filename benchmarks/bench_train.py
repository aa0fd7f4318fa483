"""Training throughput on random data: this repository beside the released composition, in one run.

    python benchmarks/bench_train.py
    python benchmarks/bench_train.py --cases pretrain_base --profile

For each case both compositions train the same model on the same random images, which lie on the device: ours through
`util.train_loop.train_epoch` (compiled blocks, fused AdamW, no waiting), the released one through released.py
(mamba-ssm's kernels on flipped copies, eager, a wait after every step; where mamba-ssm is missing, the torch backend in
their place, which says nothing about the released code: no ratio is shown).
After a warm-up the median of several rounds counts, by CUDA events on a GPU. `--backend`, `--no_compile` and
`--released_loop` make up one composition by hand: `--backend mamba_ssm --no_compile --released_loop` is the released
one. `--cuda_graph` and `--no_cuda_graph` decide about CUDA graphs wherever our loop trains.

Model FLOP utilisation is 3 x F x images/s / peak. F are the floating-point operations of the matrix products and
convolutions of one image's forward pass, as `torch.utils.flop_counter` counts them; the backward pass takes twice as
many. The scan is left out. Peak is the data sheet's dense bfloat16 rate, without sparsity.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "Finetuning"))

import engine_finetune
import engine_pretrain
import models_arm
import ops
from benchmarks import released
from util import cli, machine
from util.cuda_graph import captures
from util.dist import init_device
from util.errors import as_user_error
from util.lr_decay import param_groups_layer_decay
from util.metrics import SilentLog
from util.run import Run

PEAK = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12, "B200": 2250e12}  # bf16, dense


class Case(NamedTuple):
    """What is trained; `sizes` are keyword arguments of the model beyond its name."""

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
    """How it is trained."""

    backend: str
    compiled: bool
    released_loop: bool
    cuda_graph: bool


class RandomBatches:
    """Stands in for a loader: the same random images and labels, on the device, `steps` times."""

    def __init__(self, case: Case, classes: int, steps: int, device: torch.device) -> None:
        imgs = torch.randn(case.batch_size, 3, case.img_size, case.img_size, device=device)
        self.batch, self.steps = [imgs, torch.randint(classes, (case.batch_size,), device=device)], steps
        self.sampler = SimpleNamespace(set_epoch=lambda epoch, start: None)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Tensor]]:
        for _ in range(self.steps):
            yield [tensor.clone() for tensor in self.batch]  # mixup works in place


def build(case: Case, backend: str, device: torch.device) -> nn.Module:
    """The model of a case, as the recipes train it."""
    sizes = {"img_size": case.img_size, "scan_backend": backend, **case.sizes}
    torch.manual_seed(0)
    with device:
        if case.task == "pretrain":
            return models_arm.create_pretrain_model(case.model, norm_pix_loss=True, **sizes)
        rate = 0.3 if "large" in case.model else 0.1
        return models_arm.create_classifier(case.model, drop_path_rate=rate, **sizes)


def loop_args(case: Case, cuda_graph: bool) -> argparse.Namespace:
    """The arguments that `train_epoch` looks at, for one epoch at a constant learning rate."""
    return argparse.Namespace(
        lr=1e-5, min_lr=1e-5, warmup_epochs=0, epochs=1, accum_iter=1, seed=0, output_dir="", start_epoch=None,
        batch_size=case.batch_size, clip_grad=3.0 if case.task == "pretrain" else None, save_every_steps=None,
        max_nonfinite=3, cuda_graph=cuda_graph,
    )  # fmt: skip


def flops_per_image(case: Case) -> int:
    """Floating-point operations of the products in one image's forward pass; nothing is computed for it."""
    meta = torch.device("meta")
    model = build(case, "torch", meta)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, case.img_size, case.img_size, device=meta))
    return counter.get_total_flops()


def epoch_runner(case: Case, how: Composition, steps: int, device: torch.device) -> Callable[[], object]:
    """What trains `steps` updates when it is called."""
    model = build(case, how.backend, device)
    classes = 1 if case.task == "pretrain" else model.head.out_features
    loader = RandomBatches(case, classes, steps, device)
    args = loop_args(case, how.cuda_graph)
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

        def after_update() -> None:
            if ema is not None:
                ema.update(model)

        model.train()
        return lambda: released.train_steps(model, loader, compute_loss, optimizer, args.clip_grad, after_update)
    if how.compiled:
        model.compile()
    run = Run(args, model, optimizer, ema)

    def epoch() -> None:
        run.samples = 0
        common = (loader, run, device, SilentLog())
        if case.task == "pretrain":
            engine_pretrain.train_one_epoch(model, *common)
        else:
            engine_finetune.train_one_epoch(model, criterion, *common, mixup)

    return epoch


def measure(case: Case, how: Composition, args: argparse.Namespace) -> dict[str, float | None]:
    """Images/s, MFU and peak memory of one composition."""
    gpu = args.device.type == "cuda"
    torch._dynamo.reset()
    gc.collect()  # the model before this one is held in cycles
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    run = epoch_runner(case, how, args.steps, args.device)
    start_up, _ = machine.time_once(run, args.device)
    times = [machine.time_once(run, args.device)[0] for _ in range(args.rounds)]
    if args.profile:
        show_profile(run, args)
    speed = case.batch_size * args.steps / statistics.median(times)
    name = torch.cuda.get_device_name(args.device) if gpu else ""
    peak = next((rate for key, rate in PEAK.items() if key in name), None)
    return {
        "images_per_second": speed,
        "ms_per_step": 1000 * case.batch_size / speed,
        "mfu": peak and 3 * flops_per_image(case) * speed / peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated(args.device) / 1e9 if gpu else None,
        "first_epoch_seconds": start_up,  # with what is compiled at first use
    }


def show_profile(run: Callable[[], object], args: argparse.Namespace) -> None:
    """Print where the time of `args.steps` steps goes, by kernel on a GPU, by operator elsewhere."""
    gpu = args.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as recorded:
        run()
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70))


def compositions(args: argparse.Namespace) -> dict[str, Composition]:
    """What is compared, by name: ours and the released one, or the one that the flags make up."""
    gpu = args.device.type == "cuda"
    if args.backend or args.released_loop:
        compiled = gpu and not args.no_compile and not args.released_loop
        graphs = args.cuda_graph and not args.released_loop
        return {"by hand": Composition(args.backend or "auto", compiled, args.released_loop, graphs)}
    yardstick = "mamba_ssm" if gpu and ops.unavailable("mamba_ssm") is None else "torch"
    return {
        "ours": Composition("auto", gpu and not args.no_compile, False, args.cuda_graph),
        f"released ({yardstick})": Composition(yardstick, False, True, False),
    }


def main(args: argparse.Namespace) -> None:
    """Train every case with every composition, print a table, write everything as JSON."""
    args.device = init_device(args.device)  # as the training scripts set it up
    with as_user_error(ValueError, prefix="--cuda_graph "):
        args.cuda_graph = captures(args.cuda_graph, args.device)
    about = machine.describe(args.device)
    output = machine.result_file("train", about, args.output)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'case':<16}{'composition':<24}{'images/s':>10}{'ms/step':>10}{'MFU':>8}{'GB':>8}{'start s':>9}{'x':>7}")
    results = []
    for name in args.cases:
        speeds = {}
        for kind, how in compositions(args).items():
            case = CASES[name]._replace(batch_size=args.batch_size or CASES[name].batch_size)
            try:
                row = measure(case, how, args)
            except torch.OutOfMemoryError:
                print(f"{name:<16}{kind:<24}{'out of memory':>20}", flush=True)
                results.append({"case": name, "composition": kind, **how._asdict(), "out_of_memory": True})
                continue
            speeds[kind] = row["images_per_second"]
            results.append({"case": name, "composition": kind, "batch_size": case.batch_size, **how._asdict(), **row})
            mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
            memory = f"{row['peak_memory_gb']:.1f}" if row["peak_memory_gb"] else "-"
            fair = kind == "released (mamba_ssm)" and "ours" in speeds
            ratio = f"{speeds['ours'] / speeds[kind]:.2f}" if fair else ""
            numbers = f"{speeds[kind]:>10.1f}{row['ms_per_step']:>10.1f}{mfu:>8}{memory:>8}"
            print(f"{name:<16}{kind:<24}{numbers}{row['first_epoch_seconds']:>9.1f}{ratio:>7}", flush=True)
    machine.write(output, {**about, "steps": args.steps, "results": results})


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    device = machine.default_device()
    toys = [name for name in CASES if "toy" in name]
    cases = toys if device.type == "cpu" else [name for name in CASES if name not in toys]
    parser = cli.Parser("bench_train.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=cli.filled, help="cuda or cpu (default: cuda where there is a GPU)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=cases, help="default: %(default)s")
    parser.add_argument("--batch_size", type=cli.batch, help="instead of the recipe's")
    parser.add_argument("--steps", type=cli.positive, default=20, help="updates in a round (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=cli.positive, default=3, help="timed rounds, after one more (default: %(default)s)"
    )
    parser.add_argument("--backend", choices=ops.BACKENDS, help="train with this scan backend alone")
    parser.add_argument("--no_compile", action="store_true", help="run the blocks eagerly")
    cli.add_cuda_graph(parser)
    parser.add_argument("--released_loop", action="store_true", help="train with the released composition's loop alone")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results/)")
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
