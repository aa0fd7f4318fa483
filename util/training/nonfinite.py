"""Write the batches and the checkpoint of an update with a non-finite gradient, for `tools/replay_nonfinite.py`."""

import os
import re
from pathlib import Path
from typing import NoReturn

import torch

from util.checkpoints.checkpoint_folder import on_host
from util.data.device_loader import DeviceLoader
from util.distributed.parallel import join_gather
from util.distributed.processes import barrier, is_main, rank, world_size
from util.errors import RunError, as_user_error
from util.training.run_state import Run

STATE = "state.pth"


def batch_file(folder: Path, of_rank: int) -> Path:
    """Return the file of a rank's batches."""
    return folder / f"batches-rank{of_rank}.pth"


def ranks_in(folder: Path) -> list[int]:
    """Return the ranks whose batches are in a folder, in order; raises UserError where it cannot be listed."""
    with as_user_error(OSError):
        found = [re.fullmatch(r"batches-rank([0-9]{1,9})\.pth", name) for name in os.listdir(folder)]
    return sorted(int(match[1]) for match in found if match)


def dump_nonfinite(run: Run, loader: DeviceLoader, first: int, output_dir: Path) -> NoReturn:
    """Write a checkpoint from before an update and each rank's batches of it, and end the run. All processes call it.

    Args:
        run: its weights are those before the update.
        loader: of the epoch; the batches are loaded again.
        first: first batch of the update in the epoch.
        output_dir: gets a folder with these files.

    Raises:
        RunError: always; says where the files are, or that the weights were not finite before the update.
    """
    run.check_finite()
    folder = output_dir / f"nonfinite-epoch{run.epoch}-batch{first}"
    batches = on_host(loader.again(run.epoch, first, run.args.accum_iter))
    run.samples, run.skipped_in_a_row = first * run.args.batch_size * world_size(), 0
    message = (
        f"the gradient was not finite in {run.args.max_nonfinite} updates in a row, from batch {first} of epoch "
        f"{run.epoch}; all of them were skipped. "
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"batches": batches, "epoch": run.epoch, "first": first}, batch_file(folder, rank()))
        if is_main():
            torch.save(on_host(run.content()), folder / STATE)
        else:
            join_gather(run.content())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise RunError(f"{message}Their batches could not be written to {folder}: {error}") from error
    barrier()
    raise RunError(
        f"{message}Weights and batches of the first are in {folder}: python tools/replay_nonfinite.py {folder} shows "
        f"where it breaks. --resume {folder / STATE} with a lower --blr and --allow_changed_args resumes before it"
    )
