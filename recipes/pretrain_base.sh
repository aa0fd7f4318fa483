#!/bin/bash
# Pretrain ARM-base: 192 pixels, 1,600 epochs, effective batch size 2,048.
#
# Recipe: published.
# Reaches: after finetune_base.sh, 83.2 % top-1 on ImageNet-1k (the paper's figure, not repeated here).
# Takes: not measured.
#
#     recipes/pretrain_base.sh /path/to/ImageNet [ARGUMENTS]
#
# Run it from the repository, on one machine with 8 GPUs. LAUNCH='sbatch --nodes 2 slurm/train.sbatch' submits it to
# Slurm instead; on 16 GPUs --batch_size 128 keeps the effective batch size.

set -eu
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=8}"
exec "${launch[@]}" main_pretrain.py \
  --model arm_base_pz16 --norm_pix_loss --batch_size 256 \
  --epochs 1600 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \
  --resume auto --output_dir ./out_b/ --data_path "$@"
