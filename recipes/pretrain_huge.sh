#!/bin/bash
# Pretrain ARM-huge: 192 pixels, 1,600 epochs, effective batch size 1,024.
#
# Recipe: not published as a command; these are the arguments of pretrain_large.sh, which have not been tried here.
# Reaches: not measured. The paper reports 85.0 % top-1 on ImageNet-1k for this size, at 384 pixels 85.5 %.
# Takes: not measured.
#
#     recipes/pretrain_huge.sh /path/to/ImageNet [ARGUMENTS]
#
# Run it from the repository, on one machine with 8 GPUs. LAUNCH='sbatch --nodes 2 slurm/train.sbatch' submits it to
# Slurm instead; on 16 GPUs --batch_size 64 keeps the effective batch size.

set -eu
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=8}"
exec "${launch[@]}" main_pretrain.py \
  --model arm_huge_pz16 --norm_pix_loss --batch_size 128 \
  --epochs 1600 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \
  --resume auto --output_dir ./out_h/ --data_path "$@"
