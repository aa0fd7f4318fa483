"""Evaluate a classifier's checkpoint."""

import argparse

import torch

from models_classifier import ARMClassifier
from pretrained import Checkpoint
from util import arguments
from util.checkpoints import checkpoint_file
from util.data.class_names import known_names, match_classes
from util.data.datasets import ImageDataset
from util.data.loaders import eval_loader
from util.tracking.run_log import Log
from util.training.evaluation import describe_result, evaluate


def evaluate_checkpoint(
    args: argparse.Namespace, found: Checkpoint, model: ARMClassifier, val: ImageDataset, device: torch.device, log: Log
) -> None:
    """Print the accuracy of a checkpoint's weights and of their EMA, or of `args.model_key` alone.

    Raises:
        UserError: the checkpoint does not fit the model, or val has classes that it does not know.
    """
    keys = [args.model_key] if args.model_key else checkpoint_file.weight_keys(found.content)
    loader = eval_loader(val, args, device)
    model.to(device)
    if args.compile:
        model.compile()
    source = val.source
    names, assumed = known_names(found.class_names, args.nb_classes, source, found.name)
    for line in [assumed] * bool(assumed) + match_classes(source, names, found.name):
        log.say(line)
    pooling = "mean of the patches" if args.global_pool else "class token"
    classes, size = len(set(source.labels.tolist())), " x ".join(map(str, arguments.image_size(args)))
    log.say(
        f"{len(val)} images of {classes} classes, resized to {size} ({args.eval_resize}); {args.nb_classes} outputs, "
        f"{args.directions} directions, {pooling}"
    )
    for key in keys or [None]:  # a bare state dict
        Checkpoint(found.name, found.content, key).load_into(model)
        result = evaluate(model, loader, device, log)
        log.say(f"{key or 'weights'}: {describe_result(result)}")
