from studies.study import Arm, Study

STUDY = Study(
    question="What should pretraining predict: next clusters or masked patches, normalised pixels or pixels?",
    arms={
        "random weights": Arm(None, "--layer_decay 1"),
        "next cluster, normalised pixels": Arm(),
        "next cluster, pixels": Arm("--no_norm_pix_loss"),
        "masked patches, normalised pixels": Arm("--objective mae"),
    },
)
