from studies.study import Arm, Study

STUDY = Study(
    question="How large should the clusters be that are predicted one after the other?",
    arms={
        "4 x 4 patches": Arm("--cluster_size 4", budgets=("imagenet",)),
        "2 x 2 patches": Arm("--cluster_size 2"),
        "1 x 1 patch": Arm("--cluster_size 1"),
        "3 x 3 patches": Arm("--cluster_size 3"),
        "6 x 6 patches": Arm("--cluster_size 6", budgets=("imagenet",)),
    },
)
