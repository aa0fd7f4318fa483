#!/bin/bash
# Finetune ARM-base from pretrain_base.sh with UperNet on ADE20K: 512 pixels, 127 epochs, effective batch size 16.
#
# Recipe: the field's, not the paper's: UperNet on plain encoders as MAE and BEiT train it, 160,000 steps of 16 images,
# which are 127 epochs of 20,210. The schedule is a cosine with one epoch of warm-up, not polynomial with 1,500 steps.
# Reaches: not measured: it was not run here. The paper has a table of UperNet on ADE20K, which could not be read here.
# Takes: not measured.
#
#     recipes/segment_ade20k.sh /path/to/ADEChallengeData2016 [ARGUMENTS]
#
# Run it from the repository, on one machine with 8 GPUs. LAUNCH='sbatch --nodes 2 slurm/train.sbatch' submits it to
# Slurm instead; on 16 GPUs --batch_size 1 keeps the effective batch size.

set -eu
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=8}"
exec "${launch[@]}" Segmentation/main_segment.py \
  --model arm_base_pz16 --finetune ./out_b/checkpoint-1599.pth --batch_size 2 --input_size 512 \
  --epochs 127 --warmup_epochs 1 --blr 1.6e-3 --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 \
  --resume auto --output_dir ./out_segment_b/ --data_path "$@"
