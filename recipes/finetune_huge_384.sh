#!/bin/bash
# Finetune ARM-huge from pretrain_huge.sh: 384 pixels, 100 epochs, effective batch size 1,024.
#
# Recipe: not published; these are the arguments of finetune_large.sh at 384 pixels, which have not been tried here.
# Reaches: not measured. The paper reports 85.5 % top-1 on ImageNet-1k for this size and resolution.
# Takes: not measured.
#
#     recipes/finetune_huge_384.sh /path/to/ImageNet [ARGUMENTS]
#
# Run it from the repository, on one machine with 8 GPUs. LAUNCH='sbatch --nodes 2 slurm/train.sbatch' submits it to
# Slurm instead; on 16 GPUs --accum_iter 8 keeps the effective batch size.

set -eu
read -ra launch <<<"${LAUNCH:-torchrun --standalone --nproc_per_node=8}"
exec "${launch[@]}" Finetuning/main_finetune.py \
  --model arm_huge_pz16 --finetune ./out_h/checkpoint-1599.pth --batch_size 8 --accum_iter 16 --input_size 384 \
  --epochs 100 --global_pool True --blr 5e-4 --layer_decay 0.75 --ema_decay 0.99992 \
  --weight_decay 0.05 --drop_path 0.3 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval \
  --resume auto --output_dir ./out_finetune_h_384/ --data_path "$@"
