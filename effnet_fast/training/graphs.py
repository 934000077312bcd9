"""A pass forward and backward as one CUDA graph: on a GPU, Python starts kernels of small images slower than they run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet_fast.ops import backend

_WARM_UP = 3  # passes: libraries choose their kernels, and Triton compiles its own


class GraphedPass:
    """``run(x, y)``, always the same, which gives a loss and adds to the gradients of ``model``: captured once and replayed.

    It is captured anew where shapes or dtypes change, or what of the model is trained. Gradients must stay the tensors that they
    are: ``optimizer.zero_grad(set_to_none=False)``. Blocks run on the fused kernels, whose launches cost a graph nothing. ``run``
    may not wait for the GPU; what it draws at random follows torch's generator, as without a graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._key: tuple | None = None

    def __call__(self, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        trained = tuple(parameter.requires_grad for parameter in self._model.parameters())
        key = x.shape, x.dtype, y.shape, y.dtype, trained
        if key != self._key:
            self._capture(run, x, y)
            self._key = key
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()
        return self._loss

    def _capture(self, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        """Without a trace in the model: buffers, gradients and the generator are as they were."""
        self._key = None
        self._x, self._y = torch.empty_like(x), torch.empty_like(y)
        self._x.copy_(x)
        self._y.copy_(y)
        for parameter in self._model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        kept = {tensor: tensor.detach().clone() for tensor in (*self._model.buffers(), *gradients)}
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.random.fork_rng([x.device]), backend("native"), torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run(self._x, self._y)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._loss = run(self._x, self._y)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        with torch.no_grad():
            for tensor, value in kept.items():
                tensor.copy_(value)
