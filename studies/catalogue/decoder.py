from studies.study import Arm, Study

STUDY = Study(
    question="How deep and how wide should the decoder be, and which blocks of the encoder should it read?",
    arms={
        "4 blocks": Arm(),
        "1 block": Arm("--dec_depth 1"),
        "2 blocks": Arm("--dec_depth 2"),
        "twice as wide": Arm("--dec_embed_dim 128", budgets=("cpu", "gpu", "smoke")),
        "half as wide": Arm("--dec_embed_dim 256", budgets=("imagenet",)),
        "4 blocks, all read the last encoder block": Arm("--taps last"),
    },
)
