"""Which arguments change a run's result, torchrun's variables, and what the command line imports."""

import pytest
from training_helpers import SCRIPTS

from Detection import main_detect
from Segmentation import main_segment
from util.distributed.processes import init_device
from util.errors import UserError
from util.training.run_state import FREE

# Flags that change the result of a run: a checkpoint is not resumed if they differ. The others are in FREE.
CHANGE_THE_RESULT = set(
    """
    model input_size patch_size in_chans embed_dim depth dec_embed_dim dec_depth directions global_pool nb_classes
    freeze
    objective order taps norm_pix_loss cluster_size
    epochs warmup_epochs lr min_lr weight_decay layer_decay clip_grad drop_path ema_decay smoothing seed
    loader scale hflip mean std exif aa color_jitter reprob remode recount
    mixup mixup_mode mixup_prob mixup_switch_prob cutmix cutmix_minmax
    eval_loader eval_resize boxes_only head head_channels head_dropout ignore_label max_share distort inference
    """.split()
)


def flags_of(script):
    return {action.dest for action in script.get_args_parser()._actions} - {"help"}


TRAINING = [*(script for script, _, _ in SCRIPTS.values()), main_detect, main_segment]


@pytest.mark.parametrize("script", TRAINING)
def test_every_flag_is_classified(script):
    """A new flag must be added to FREE, or to the list above."""
    assert flags_of(script) - FREE - CHANGE_THE_RESULT == set()


def test_every_classified_name_is_a_flag():
    flags = set().union(*map(flags_of, TRAINING))
    assert not FREE & CHANGE_THE_RESULT
    assert (FREE | CHANGE_THE_RESULT) - flags == {"world_size", "category_ids"}  # of torchrun, of annotations


@pytest.mark.parametrize("text", ["many", "", "-1", "0", "1.5", "2 "])
def test_variables_of_torchrun_that_are_no_numbers(text, monkeypatch, run_script, image_folder, tmp_path, capsys):
    """Each ends in one line that names the variable, on every script and before any work."""
    script, _, tiny = SCRIPTS["pretrain"]
    for variable in ("WORLD_SIZE", *(("RANK", "LOCAL_RANK") if text != "0" else ())):
        monkeypatch.setenv(variable, text)
        with pytest.raises(SystemExit) as exit_info:
            run_script(script, *tiny, "--data_path", image_folder, "--output_dir", tmp_path / "out")
        assert exit_info.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"error: the environment variable {variable} is {text!r}, not an integer of at least" in line
        assert not (tmp_path / "out").exists()
        monkeypatch.delenv(variable)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE"):
        init_device("cuda")
