"""Training: recipes, a loop over any batches, and runs that can be stopped and resumed exactly. ``data`` needs torchvision,
and a teacher its library."""

from effnet_fast.training.batches import Batches
from effnet_fast.training.distillation import distillation_loss
from effnet_fast.training.loop import Scores, Trainer, evaluate
from effnet_fast.training.optimizer import RMSpropTF, build_optimizer, layers, parameter_groups, schedule
from effnet_fast.training.recipes import PRESETS, Recipe
from effnet_fast.training.run import Stopped, train
from effnet_fast.training.teachers import load_teacher
from effnet_fast.training.transfer import freeze, freeze_batch_norm, head_of, unfreeze
from effnet_fast.training.trial import Trial

__all__ = [
    "PRESETS",
    "Batches",
    "RMSpropTF",
    "Recipe",
    "Scores",
    "Stopped",
    "Trainer",
    "Trial",
    "build_optimizer",
    "distillation_loss",
    "evaluate",
    "freeze",
    "freeze_batch_norm",
    "head_of",
    "layers",
    "load_teacher",
    "parameter_groups",
    "schedule",
    "train",
    "unfreeze",
]
