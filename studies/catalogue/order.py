from studies.study import Arm, Study

STUDY = Study(
    question="In which order should the clusters be predicted?",
    arms={
        "rows": Arm(),
        "rows, backwards": Arm("--order row_reverse"),
        "columns": Arm("--order column"),
        "columns, backwards": Arm("--order column_reverse"),
        "random, the same for all images": Arm("--order random"),
        "random, another for every image": Arm("--order random_per_image"),
    },
)
