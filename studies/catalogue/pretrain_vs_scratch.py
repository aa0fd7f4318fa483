from studies.study import Arm, Study

STUDY = Study(
    question="Does autoregressive pretraining help, with few labels and with all of them?",
    arms={
        # all layers of random weights have as much to learn
        "random weights": Arm(pretrain=None, finetune="--layer_decay 1"),
        "pretrained": Arm(),
    },
    labels=("few", "all"),
)
