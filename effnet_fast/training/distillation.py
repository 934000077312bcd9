"""What a student is held to: the labels, and where there is a teacher its answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.training.recipes import Recipe


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the student's distribution from the teacher's, both softened, times temperature squared.

    student, teacher  logits [N, K]; the mean over N. "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2.
    """
    ours, theirs = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


class Loss:
    """(x, logits [N, K], labels [N] or their shares [N, K]) -> the mean loss, in float32; ValueError for fewer than 2 classes.

    teacher  any module x -> logits [N, K] that was trained on images as x has them; it is put in eval mode
    """

    def __init__(self, recipe: Recipe, teacher: nn.Module | None = None) -> None:
        self.recipe, self.teacher = recipe, teacher
        self.of_labels = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"the model's answer is {list(logits.shape)}; logits [N, K] of K >= 2 classes would do")
        logits = logits.float()
        loss = self.of_labels(logits, y)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            theirs = self.teacher(x).float()
        if theirs.shape != logits.shape:
            raise ValueError(f"the teacher has {theirs.shape[1]} classes; {logits.shape[1]}, as the student, would do")
        share = self.recipe.distill
        return (1 - share) * loss + share * distillation_loss(logits, theirs, self.recipe.temperature)
