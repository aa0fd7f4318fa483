#!/bin/bash
# Finetune ARM-base from pretrain_base.sh as Mask R-CNN on COCO: 1,024 pixels, 36 epochs, effective batch size 64.
#
# Recipe: the field's, not the paper's: that of ViTDet (Li et al. 2022) for a base encoder, with a cosine in place of
# steps and 36 epochs in place of 100. --epochs 12 is the field's short schedule.
# Reaches: not measured: it was not run here. The paper has a table of Mask R-CNN on COCO, which could not be read here.
# Takes: not measured.
#
#     recipes/detect_coco.sh coco:/path/to/coco [ARGUMENTS]
#
# Run it from the repository, on one machine with 8 GPUs. LAUNCH='sbatch --nodes 2 slurm/train.sbatch' submits it to
# Slurm instead; on 16 GPUs --batch_size 4 keeps the effective batch size. Where memory is short, add
# --grad_checkpointing, or --batch_size 4 --accum_iter 2.

set -eu
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=8}"
exec "${launch[@]}" Detection/main_detect.py \
  --model arm_base_pz16 --finetune ./out_b/checkpoint-1599.pth --batch_size 8 --input_size 1024 \
  --epochs 36 --blr 4e-4 --layer_decay 0.7 --weight_decay 0.1 --drop_path 0.1 --ema_decay 0.9998 \
  --resume auto --output_dir ./out_detect_b/ --data_path "$@"
