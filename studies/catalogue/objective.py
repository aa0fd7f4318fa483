from studies.study import Arm, Study

STUDY = Study(
    question="What should pretraining predict: next clusters or masked patches, normalised pixels or pixels?",
    arms={
        "next cluster, normalised pixels": Arm(),
        "next cluster, pixels": Arm("--target pix"),
        "masked patches, normalised pixels": Arm("--objective mae"),
    },
)
