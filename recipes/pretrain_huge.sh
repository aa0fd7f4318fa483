#!/bin/bash
# Pretraining of ARM-huge: 192 pixels, 1,600 epochs, batch 1,024.
#
# Recipe: not published as a command; these are the arguments of pretrain_large.sh, which nobody has tried here.
# Reaches: not known. The paper reports 85.0 % top-1 on ImageNet-1k for this size, at 384 pixels 85.5 %.
# Takes: not measured.
#
#     recipes/pretrain_huge.sh /path/to/ImageNet [ARGUMENTS]
#
# from the repository, on one machine of 8 GPUs; LAUNCH='sbatch --nodes 2 slurm/train.sbatch' runs it on a cluster
# instead, where --batch_size 64 keeps the batch on 16 GPUs.

set -eu
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=8}"
exec "${launch[@]}" main_pretrain.py \
  --model arm_huge_pz16 --norm_pix_loss --batch_size 128 \
  --epochs 1600 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \
  --resume auto --output_dir ./out_h/ --data_path "$@"
