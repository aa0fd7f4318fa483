#!/bin/bash
# Finetune ARM-large from pretrain_large.sh: 224 pixels, 100 epochs, effective batch size 1,024.
#
# Recipe: published.
# Reaches: the accuracy of this size is not known here.
# Takes: not measured.
#
#     recipes/finetune_large.sh /path/to/ImageNet [ARGUMENTS]
#
# Run it from the repository, on one machine with 8 GPUs. LAUNCH='sbatch --nodes 2 slurm/train.sbatch' submits it to
# Slurm instead; on 16 GPUs --accum_iter 2 keeps the effective batch size.

set -eu
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=8}"
exec "${launch[@]}" Finetuning/main_finetune.py \
  --model arm_large_pz16 --finetune ./out_l/checkpoint-1599.pth --batch_size 32 --accum_iter 4 \
  --epochs 100 --global_pool True --blr 5e-4 --layer_decay 0.75 --ema_decay 0.99992 \
  --weight_decay 0.05 --drop_path 0.3 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval \
  --resume auto --output_dir ./out_finetune_l/ --data_path "$@"
