"""A pass forward and backward as one CUDA graph: on a GPU, Python starts kernels of small images slower than they run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet_fast.ops import backend

_WARM_UP = 3  # passes: libraries choose their kernels, and Triton compiles its own


class GraphedPass:
    """``run(x, y)``, always the same, which gives a loss and adds to the gradients of ``model``: captured once and replayed.

    It is captured anew where shapes or dtypes change, modes of modules, what of the model is trained, or gradients are other
    tensors: ``optimizer.zero_grad(set_to_none=False)`` keeps them. Blocks run on the fused kernels, whose launches cost a graph
    nothing. ``run`` may not wait for the GPU; what it draws at random follows torch's generator, as without a graph. The loss is
    overwritten by the next call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._key: tuple | None = None
        self._gradients: list[tuple[Tensor, Tensor | None]] = []  # of parameters, where the graph adds to them
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None

    def __call__(self, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        trained = tuple(parameter.requires_grad for parameter in self._model.parameters())
        modes = tuple(module.training for module in self._model.modules())
        key = x.shape, x.dtype, y.shape, y.dtype, trained, modes
        if key != self._key or any(parameter.grad is not gradient for parameter, gradient in self._gradients):
            self._capture(run, x, y)
            self._key = key
        assert self._graph is not None and self._loss is not None
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()
        return self._loss

    def _capture(self, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        """Without a trace in the model: buffers, gradients and the generator are as they were, but that gradients there will be are
        there, as zeros."""
        self._key, self._graph, self._loss = None, None, None  # the old graph's memory is free for the new one
        self._x, self._y = torch.empty_like(x), torch.empty_like(y)
        self._x.copy_(x)
        self._y.copy_(y)
        parameters = list(self._model.parameters())
        new = [parameter for parameter in parameters if parameter.grad is None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kept = {tensor: tensor.detach().clone() for tensor in (*self._model.buffers(), *gradients)}
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        try:
            with torch.random.fork_rng([x.device]), backend("native"), torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    run(self._x, self._y)
                # thread_local: a loader's thread that pins memory meanwhile is no part of it.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._loss = run(self._x, self._y)
        finally:
            torch.cuda.current_stream(x.device).wait_stream(stream)
            with torch.no_grad():
                for tensor, value in kept.items():
                    tensor.copy_(value)
                for parameter in new:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
        self._graph, self._gradients = graph, [(parameter, parameter.grad) for parameter in parameters]
