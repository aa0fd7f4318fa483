#!/bin/bash
# What is pretraining worth? 200 epochs of it on Imagenette (ten classes of ImageNet, 9,469 training and 3,925 validation
# images), then probes of the frozen encoder and 20 epochs of finetuning, against the same from random weights.
#
# Recipe: not published, and not run here on Imagenette or on a GPU. Batch sizes, learning rates and layer decay are those
#   of the study pretrain_vs_scratch on GPUs (docs/studies.md), which has a smaller model and smaller images.
# Reaches: not measured.
# Takes: not measured; the aim is a quarter of an hour for 29,400 updates of pretraining and 11,800 of finetuning.
#
#     recipes/imagenette.sh OUTPUT [ARGUMENTS]
#
# Run it from the repository, on one GPU, after pip install datasets. The same command continues an interrupted run. The
# ARGUMENTS go to pretraining and to both finetunings. The images come from the Hugging Face hub; DATA=/path/to/images
# takes others, of at most ten classes.

set -eu
out=${1:?recipes/imagenette.sh OUTPUT [ARGUMENTS]}
shift
data=${DATA:-hfds:frgfm/imagenette@4b23ffb92a8029db9958bdfdbd6978427d09b1a0/160px}

run() {
  printf '\n$ python %s\n' "$*"
  python "$@"
}

pretrain() {
  run main_pretrain.py --model arm_tiny_pz16 --input_size 144 --patch_size 12 --norm_pix_loss --batch_size 64 \
    --epochs 200 --lr 2e-3 --save_freq 200 --resume auto --data_path "$data" --output_dir "$out/$1" "${@:2}"
}

finetune() {
  run Finetuning/main_finetune.py --model arm_tiny_pz16 --input_size 144 --patch_size 12 --nb_classes 10 \
    --batch_size 32 --epochs 20 --lr 1e-3 --aa none --reprob 0 --save_freq 20 --resume auto --data_path "$data" \
    --output_dir "$out/$1" "${@:2}"
}

pretrain pretrained "$@"
pretrain random "$@" --epochs 1 --warmup_epochs 0 --lr 0 # a rate of 0 leaves the same initial weights as they are
for weights in pretrained random; do
  run Evaluation/probe.py "$out/$weights/checkpoint-last.pth" --k 20 --data_path "$data"
done
finetune finetuned --finetune "$out/pretrained/checkpoint-last.pth" --layer_decay 0.7 "$@"
finetune finetuned_random --layer_decay 1 "$@" # equal rates suit random weights better: the study layer_decay

python - "$out" <<'END'
import json
import sys
from pathlib import Path

from Evaluation.tables import table
from tools import plot_log

rows = []
for weights, run in (("pretrained", "finetuned"), ("random", "finetuned_random")):
    probe = Path(sys.argv[1], weights, "checkpoint-last.probe.json")
    found = {row["probe"]: row["acc1"] for row in json.loads(probe.read_text())["results"]}
    last = plot_log.read(Path(sys.argv[1], run))[-1]
    found[f"finetuned for {last['epoch'] + 1} epochs"] = last["test_acc1"]
    rows.append([f"{weights} weights", *(f"{value:.1f}" for value in found.values())])
print(f"\n{table(['top-1 (%)', *found], *rows)}")
END
