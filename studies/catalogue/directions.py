from studies.study import Arm, Study

STUDY = Study(
    question="Does the classifier need four directions, with pretraining and without?",
    arms={
        "pretrained, four directions": Arm(),
        "pretrained, one direction": Arm(finetune="--directions 1"),
        "random weights, four directions": Arm(None, "--layer_decay 1"),
        "random weights, one direction": Arm(None, "--layer_decay 1 --directions 1"),
    },
)
