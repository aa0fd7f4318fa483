#!/bin/bash
# Finetune ARM-base from pretrain_base.sh: 224 pixels, 100 epochs, effective batch size 1,024.
#
# Recipe: published.
# Reaches: 83.2 % top-1 on ImageNet-1k (the paper's figure, not repeated here).
# Takes: not measured.
#
#     recipes/finetune_base.sh /path/to/ImageNet [ARGUMENTS]
#
# Run it from the repository, on one machine with 8 GPUs. LAUNCH='sbatch --nodes 2 slurm/train.sbatch' submits it to
# Slurm instead; on 16 GPUs --batch_size 64 keeps the effective batch size.

set -eu
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=8}"
exec "${launch[@]}" Finetuning/main_finetune.py \
  --model arm_base_pz16 --finetune ./out_b/checkpoint-1599.pth --batch_size 128 \
  --epochs 100 --global_pool True --blr 5e-4 --layer_decay 0.65 --ema_decay 0.99992 \
  --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval \
  --resume auto --output_dir ./out_finetune_b/ --data_path "$@"
