"""The sizes of studies, by hardware and dataset."""

from studies.study import Budget

# 24 x 24 pixels are 6 x 6 patches in 3 x 3 clusters: as many clusters as ARM-base has on ImageNet.
# Batches of 32 would be faster by a quarter on a CPU, but have half as many updates.
SMALL = "--model arm_tiny_pz16 --embed_dim 64 --depth 6 --input_size 24 --patch_size 4 --batch_size 16 --scale 0.6 1"
PRETRAIN = "--cluster_size 2 --dec_embed_dim 64 --norm_pix_loss --vis_freq 0 --lr 1e-3 --warmup_epochs 0"
# RandAugment and erasing need more epochs than these.
FINETUNE = "--lr 1e-3 --warmup_epochs 1 --layer_decay 0.7 --aa none --reprob 0 --dist_eval"

BUDGETS = {
    "cpu": Budget(
        common=f"{SMALL} --save_every_steps 200",
        pretrain=f"{PRETRAIN} --epochs 4",
        finetune=FINETUNE,
        few="--epochs 3",
        all="--epochs 1 --warmup_epochs 0",  # a warm-up of one epoch would be the whole run
    ),
    "gpu": Budget(
        common=f"{SMALL} --no_compile",  # to compile takes about as long as a run
        pretrain=f"{PRETRAIN} --batch_size 64 --epochs 3 --lr 2e-3",
        finetune=FINETUNE,
        few="--epochs 3",
        all="--epochs 1 --warmup_epochs 0 --batch_size 32",
        runs_per_gpu=12,  # the model is too small to keep a GPU busy
    ),
    # The published recipes of ARM-base, with fewer epochs.
    "imagenet": Budget(
        common="--model arm_base_pz16 --patch_size 16 --weight_decay 0.05 --save_every_steps 500",
        pretrain="--input_size 192 --cluster_size 4 --norm_pix_loss --batch_size 2048 --epochs 100 "
        "--warmup_epochs 10 --blr 1.5e-4",
        finetune="--input_size 224 --batch_size 1024 --blr 5e-4 --layer_decay 0.65 --drop_path 0.1 --reprob 0.25 "
        "--mixup 0.8 --cutmix 1.0 --dist_eval",
        few="--epochs 10 --warmup_epochs 1",
        all="--epochs 100 --warmup_epochs 5",
        labels=("all",),
        per_class=13,  # 1 %
        one_run=True,
    ),
    # Tests that every command is valid.
    "smoke": Budget(
        common=f"{SMALL} --embed_dim 32 --batch_size 8 --save_every_steps 1 --no_compile",
        pretrain=f"{PRETRAIN} --epochs 2",
        finetune=FINETUNE,
        few="--epochs 2",
        all="--epochs 2",
        per_class=2,
        repeats=2,
        images_per_class=8,
    ),
}
