"""Helpers of the tests: golden values, small images and models, scripts run on several processes."""

import argparse
import io
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sitecustomize  # noqa: F401
import torch
from fork_server import run_forked
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

REPOSITORY = Path(__file__).resolve().parents[1]

SCRIPTS_BY_PATH = [
    "main_pretrain.py", "Finetuning/main_finetune.py", "Detection/main_detect.py", "Segmentation/main_segment.py",
    "Evaluation/probe.py", "Evaluation/robustness.py", "Evaluation/segment_knn.py",
    "Evaluation/verdict.py",
    *(f"tools/{name}.py" for name in ("export", "compare", "visualize", "replay_nonfinite", "pack_images", "plot_log")),
    "tools/predict.py",
]  # fmt: skip


# Folders, files and functions of tests that `make check` leaves out: real processes, training runs, exports, studies.
SLOW = set(
    """
    faults studies test_a_full_disk_behind_stdout_does_not_end_a_run test_a_full_shared_memory test_a_memory_limit
    test_a_pretraining_run test_a_run_killed_inside_an_epoch_logs_each_step_once test_a_run_that_resumes
    test_a_second_packer_is_refused test_a_third_objective test_a_whole_block_is_one_graph
    test_a_worker_that_is_killed_or_hangs_ends_the_run test_accumulation_equals_the_large_batch
    test_all_processes_find_nonfinite_weights_together test_all_processes_skip_together
    test_an_accuracy_that_cannot_be_printed_is_an_error test_an_unreadable_file_ends_packing
    test_an_untrusted_or_damaged_compiled_file_is_built_again
    test_broken_images_of_two_processes_are_counted_together test_cache_without_a_hub
    test_casts_are_an_option_of_the_compiler test_compiled_blocks test_compiled_run_equals_the_eager_one
    test_derivatives_beyond_those_of_the_kernels test_directions_images_and_widths
    test_each_step_is_logged_once_after_going_back test_each_update_is_logged_once_after_going_back
    test_ema_of_two_processes test_evaluation_by_name test_evaluation_counts_every_image_once
    test_evaluation_stops_at_broken_images_or_counts_them_as_wrong test_export test_exported test_fork_server
    test_fsdp test_fuzz_images test_fuzz_shards test_help_and_mistakes_import_little test_imagenette::test_imagenette
    test_instructions_per_step
    test_kernels_run_on_the_threads_of_torch test_live_bar_on_a_terminal test_names_that_an_output_cannot_show
    test_no_fused_multiply_adds test_no_spills test_operation_on_small_images test_outputs_that_end_early
    test_packing_resumes test_packing_resumes_after_a_kill_at_any_moment test_randaugment
    test_random_batches_against_timm test_registers_spills_and_instructions test_runs test_runs_are_compared
    test_sharded_pretraining test_switches::test_compiled test_the_line_that_starts_timms_scripts
    test_three_processes_for_two_images test_training_and_a_probe_without_linux test_triton
    test_two_processes test_two_processes_equal_one test_two_processes_have_one_order
    test_under_torchrun_one_process_speaks test_whole_model test_detection_export test_it_learns_two_images
    test_predictions_are_those_of_the_evaluation test_a_resumed_run_equals_the_uninterrupted_one
    test_main_segment test_a_comparison test_the_code_of_a_card_runs test_web test_a_killed_run_continues
""".split()
)


GOLDEN = REPOSITORY / "tests" / "golden"


# A model of seconds: 3 x 2 clusters of 2 x 2 patches of 8 pixels.
TINY = "--model arm_tiny_pz16 --embed_dim 32 --depth 4 --patch_size 8 --device cpu --num_workers 0".split()


TINY_PRETRAIN = [*TINY, *"--input_size 48 32 --cluster_size 2 --dec_embed_dim 64 --dec_depth 2".split()]


TINY_FINETUNE = [*TINY, *"--input_size 48 32 --nb_classes 3 --drop_path 0".split()]


class Golden:
    """An .npz file of golden values as tensors."""

    def __init__(self, name: str) -> None:
        self.file = np.load(GOLDEN / f"{name}.npz")

    def __getitem__(self, key: str) -> torch.Tensor:
        array = self.file[key]
        return torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array)

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.file.files if key.startswith(prefix)}


def golden_json(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference as a fraction of the largest wanted value."""
    return ((got - want).abs().max() / want.abs().max()).item()


def noise_images(root: Path, train: int, height: int) -> Path:
    """Write three classes of coloured noise: `train` images each to train, 7 in all to validate, ever higher ones."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (train, train, train)), ("val", (3, 2, 2))):
        for label, count in enumerate(counts):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(100 + 40 * label, 40, (height + i, 53, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Batches:
    """Stands in for a loader: batches of tensors, the same in every epoch."""

    def __init__(self, *batches: list[torch.Tensor]) -> None:
        self.batches, self.start = batches, 0
        self.sampler = SimpleNamespace(set_epoch=self._set_epoch)

    def _set_epoch(self, epoch: int, start: int = 0) -> None:
        self.start = start // len(self.batches[0][0])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        return iter(self.batches[self.start :])

    def again(self, epoch: int, first: int, count: int) -> list[list[torch.Tensor]]:
        return list(self.batches[first : first + count])


def loop_args(**changes: object) -> argparse.Namespace:
    """The arguments that `train_epoch` looks at."""
    args = {"lr": 1.0, "min_lr": 1.0, "warmup_epochs": 0, "epochs": 1, "accum_iter": 1, "clip_grad": None, "seed": 0}
    args |= {"batch_size": 1, "start_epoch": None, "save_every_steps": None, "max_nonfinite": 3, "output_dir": "out"}
    args |= {"cuda_graph": False}
    return argparse.Namespace(**{**args, **changes})


def end_of_torchrun(script: str, *argv: object, processes: int = 2, **how: object) -> subprocess.CompletedProcess:
    """Run a script on several processes, whether it fails or not; `how` are arguments of `run_forked`."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, REPOSITORY / script, *argv]
    return run_forked(words, **how)


def torchrun(script: str, *argv: object, processes: int = 2) -> str:
    """Run a script on several processes; returns what it prints."""
    done = end_of_torchrun(script, *argv, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_log(folder: Path) -> list[dict]:
    """The lines of log.txt without the values of time, which differ from run to run."""
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    times = "images_per_second", "val_share", "probe_share"
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def finetune_args(**changes):
    args = {"scale": [0.08, 1.0], "hflip": 0.5, "color_jitter": None, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25}
    return argparse.Namespace(**{**args, "remode": "pixel", "recount": 1, **changes})


def loader_args(**changes):
    args = {"batch_size": 4, "num_workers": 0, "pin_mem": True, "accum_iter": 1, "seed": 3, "worker_timeout": 60}
    return argparse.Namespace(**{**args, "max_bad_samples": None, "dist_eval": False, "eval_bad": "stop", **changes})


def assert_one_line(capsys: pytest.CaptureFixture, exit_info: pytest.ExceptionInfo, message: str) -> None:
    """Assert that a script has ended by a user's mistake, stated in one line."""
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"main_\w+\.py: error: .{,2000}\n", err), err
    assert re.search(message, err), err
    assert "epoch 0" not in out
