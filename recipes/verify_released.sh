#!/bin/bash
# Measure the released weights on ImageNet, and compare them with the paper's figures on one page.
#
# Recipe: evaluates each file of the hub: weights and EMA, 224 and 384 pixels, both resizes; probes those of pretraining.
# Reaches: not measured: neither the released weights nor ImageNet were at hand here.
# Takes: not measured.
#
#     recipes/verify_released.sh /path/to/ImageNet [hf://OliverRen/ARM] [ARGUMENTS]
#
# Run it from the repository, on one GPU or a CPU; LAUNCH='torchrun --standalone --nproc_per_node=8' takes eight GPUs.
# The same command continues a run that was killed. A folder of checkpoints can stand in place of hf://OliverRen/ARM.

set -eu
read -ra launch <<<"${LAUNCH:-python}"
exec "${launch[@]}" Evaluation/verdict.py --data_path "$@"
