"""The loop: steps of an epoch, and scores on held-out images. Nothing here knows of files, or of torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from effnet_fast.modes import evaluation
from effnet_fast.ops import backend
from effnet_fast.training import distributed
from effnet_fast.training.batches import Batches, seed_of
from effnet_fast.training.distillation import Loss
from effnet_fast.training.graphs import GraphedPass
from effnet_fast.training.optimizer import build_optimizer, schedule
from effnet_fast.training.recipes import Recipe
from effnet_fast.training.transfer import freeze_batch_norm, frozen

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Diverged(ValueError):
    """The training loss is not finite."""


class Scores(NamedTuple):
    """On held-out images: the mean cross entropy, and the shares with the label first, and among the first five of more classes."""

    loss: float
    top1: float
    top5: float | None
    images: int


class Trainer:
    """A model between two steps of its training; :func:`effnet_fast.training.train` drives it and saves it.

    model    any classifier x [N, C, H, W] -> logits [N, K]; it is changed in place
    batches  what it learns from, of this process
    device   that the model is moved to (default: where it is)
    augment  of a batch on that device, such as MixUp: (x, labels [N]) -> (x, labels [N] or their shares [N, K]); a recipe with
             ``mixup_off_epoch`` ends it after so many epochs
    teacher  see :class:`effnet_fast.training.distillation.Loss`

    torch's generators are seeded at every step from (seed, epoch, step, rank), so that dropout and ``augment`` follow from those.
    Where there is a process group, gradients are shared as DistributedDataParallel does. What the model has frozen stays frozen.

    Raises ValueError where the batches or the model are not what the recipe wants, or nothing of the model would train.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        batches: Batches,
        *,
        augment: Augment | None = None,
        teacher: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.recipe, self.batches, self.augment = recipe, batches, augment
        self.device = _device_of(model) if device is None else torch.device(device)
        self.steps = len(batches) // recipe.grad_accum_steps
        if self.steps == 0:
            raise ValueError(
                f"grad_accum_steps is {recipe.grad_accum_steps}, and an epoch has {len(batches)} batches; as many at most would do"
            )
        for name in ("batch_size", "seed"):
            if getattr(batches, name) != getattr(recipe, name):
                raise ValueError(
                    f"the batches' {name} is {getattr(batches, name)}; {getattr(recipe, name)}, as the recipe's, would do"
                )
        if recipe.cuda_graph and (self.device.type != "cuda" or distributed.processes() > 1):
            where = f"on {self.device} in {distributed.processes()} processes"
            raise ValueError(f"cuda_graph is True, {where}; one process on a CUDA device, or False, would do")
        if recipe.cuda_graph and recipe.grad_checkpointing:
            raise ValueError("cuda_graph and grad_checkpointing are True: a graph cannot run a forward again; one of them would do")
        if teacher is not None and not {p for p in model.parameters() if p.requires_grad}.isdisjoint(teacher.parameters()):
            raise ValueError("the teacher has parameters of the model, which would not train; a copy would do")
        none_trains = "no parameter of the model trains: all have requires_grad False; unfreeze(), or True for some, would do"
        _check_trains(model, none_trains)
        self.model = model.to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as gradients come, so DDP copies none
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        _configure(model, recipe)
        _check_trains(model, none_trains)  # norms may be all that did
        if teacher is not None:
            teacher.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = Loss(recipe, teacher)
        self.head_alone = self.whole = distributed.parallel(model, self.device)
        if recipe.freeze_epochs > 0:
            with frozen(model):
                _check_trains(model, f"freeze_epochs is {recipe.freeze_epochs}, and the classifier is frozen itself; 0 would do")
                self.head_alone = distributed.parallel(model, self.device)
        if recipe.sync_bn:
            distributed.synchronise_norms(model)
        self.ema = AveragedModel(model, use_buffers=True) if recipe.model_ema else None
        self.optimizer = build_optimizer(model, recipe, distributed.processes())
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.factor = schedule(recipe, self.steps, distributed.processes())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp and recipe.amp_dtype == "float16")
        self.graph = GraphedPass(model) if recipe.cuda_graph else None
        self.epoch, self.step = 0, 0
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)  # of this epoch's losses

    @property
    def lr(self) -> float:
        """The highest learning rate of the last step."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def forward(self) -> nn.Module:
        """The model, which shares the gradients of what trains in this epoch."""
        return self.head_alone if self.epoch < self.recipe.freeze_epochs else self.whole

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated and saved: the average where one is kept."""
        return self.model if self.ema is None else self.ema.module

    def run_epoch(self) -> Iterator[None]:
        """The rest of an epoch, a step at each turn."""
        each = self.recipe.grad_accum_steps
        batches = self.batches.of_epoch(self.epoch, self.step * each)
        with frozen(self.model) if self.epoch < self.recipe.freeze_epochs else nullcontext():
            self.model.train()
            while self.step < self.steps:
                taken = [next(batches) for _ in range(each)]
                torch.manual_seed(seed_of(self.recipe.seed, self.epoch, self.step, distributed.rank()))
                self._take_step(taken)
                self.step += 1
                yield

    def end_epoch(self) -> float:
        """Go on to the next epoch; returns the mean loss of this one over all processes."""
        mean = self.finite_total() / (self.steps * distributed.processes())
        self.epoch, self.step = self.epoch + 1, 0
        self.total.zero_()
        distributed.share_buffers(self.judged)
        return mean

    def finite_total(self) -> float:
        """The sum of this epoch's losses so far over all processes, each of which calls this; Diverged where it is not finite."""
        total = float(distributed.summed(self.total.clone()))
        if not math.isfinite(total):
            raise Diverged(f"the training loss of epoch {self.epoch + 1} is {total}; a smaller lr, or clip_grad, would do")
        return total

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on exactly, tensors and plain values; the weights under timm's names.

        Every process calls this. Raises ValueError where the loss is not finite: there is nothing to go on with.
        """
        averaged = {} if self.ema is None else {"state_dict_ema": self.ema.module.state_dict()}
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "scaler")}
        return {
            "state_dict": self.model.state_dict(),
            **averaged,
            **parts,
            "epoch": self.epoch,
            "step": self.step,
            "total": self.finite_total(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["state_dict"])
        for name in ("optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.step = state["epoch"], state["step"]
        # The sum is of all processes, which share one file.
        self.total.fill_(state["total"] if distributed.rank() == 0 else 0.0)
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"])
            self.ema.n_averaged.fill_(self.epoch * self.steps + self.step)

    def _take_step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        done = self.epoch * self.steps + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor(done)
        self.optimizer.zero_grad(set_to_none=not self.recipe.cuda_graph)
        for number, (x, y) in enumerate(batches, start=1):
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            if self.augment is not None and not 0 < self.recipe.mixup_off_epoch <= self.epoch:
                x, y = self.augment(x, y)
            with self._context(shares=number == len(batches)):
                self.total += self._pass(x, y) if self.graph is None else self.graph(self._pass, x, y)
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.multi_avg_fn = get_ema_multi_avg_fn(ema_decay(self.recipe.model_ema_decay, done + 1))
            self.ema.update_parameters(self.model)

    def _pass(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward and backward of a batch: its part of a step's loss."""
        with self.autocast():
            loss = self.loss(x, self.forward(x), y) / self.recipe.grad_accum_steps
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _context(self, shares: bool) -> AbstractContextManager:
        """``shares``: gradients with the other processes, which wait for that till the last batch of a step."""
        stack = ExitStack()
        if isinstance(self.forward, DistributedDataParallel):
            if not shares:
                stack.enter_context(self.forward.no_sync())
            if self.recipe.sync_bn and self.device.type == "cpu":
                stack.enter_context(backend("native"))  # PyTorch has no SyncBatchNorm on a CPU
        return stack

    def autocast(self) -> AbstractContextManager:
        """Mixed precision as the recipe says."""
        return torch.autocast(self.device.type, getattr(torch, self.recipe.amp_dtype)) if self.recipe.amp else nullcontext()


def ema_decay(decay: float, step: int) -> float:
    """Of the average after ``step`` steps: less in the first ones, as TensorFlow's average has it when it is told the step."""
    return min(decay, (1 + step) / (10 + step))


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _configure(model: nn.Module, recipe: Recipe) -> None:
    if recipe.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = recipe.bn_momentum
    if recipe.freeze_bn:
        freeze_batch_norm(model)
    if recipe.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"grad_checkpointing: {type(model).__name__} has no set_grad_checkpointing(); False would do")
        model.set_grad_checkpointing(True)  # type: ignore[operator]


def _check_trains(model: nn.Module, otherwise: str) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(otherwise)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str | None = None) -> Scores:
    """The scores of a model, in eval mode for the while, over all processes' batches (x [N, C, H, W], labels [N])."""
    device = _device_of(model) if device is None else device
    classes, sums = 0, torch.zeros(4, dtype=torch.float64, device=device)
    with evaluation(model):
        for x, y in batches:
            logits, y = model(x.to(device, non_blocking=True)).float(), y.to(device, non_blocking=True)
            classes = logits.shape[1]
            right = logits.topk(min(5, classes), 1).indices == y[:, None]
            loss = F.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack([loss.double(), right[:, 0].sum().double(), right.sum().double(), loss.new_tensor(len(y)).double()])
    loss_sum, first, among, images = distributed.summed(sums).tolist()
    return Scores(loss_sum / images, first / images, among / images if classes > 5 else None, int(images))
