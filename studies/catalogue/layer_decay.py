from studies.study import Arm, Study

STUDY = Study(
    question="Should lower layers learn more slowly in finetuning, with pretraining and without?",
    arms={
        "pretrained, 0.7 a layer": Arm("", "--layer_decay 0.7"),
        "pretrained, equal rates": Arm("", "--layer_decay 1"),
        "random weights, 0.7 a layer": Arm(None, "--layer_decay 0.7"),
        "random weights, equal rates": Arm(None, "--layer_decay 1"),
    },
)
