"""optimize_for_inference: a frozen copy of a network for serving."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from effnet_fast import ops
from effnet_fast.inference import chain
from effnet_fast.inference.graphs import GRAPHS, CudaPool, Few, Graphs, InPieces
from effnet_fast.inference.joining import Unplannable, run_joined
from effnet_fast.inference.pixels import image_batch, mean_and_std, scale_and_shift, wrong_images
from effnet_fast.inference.plan import NativePlan, return_memory
from effnet_fast.inference.recording import Recording
from effnet_fast.interop import accelerate
from effnet_fast.models import ResNet
from effnet_fast.nn.fused import FusedBlock, is_traced
from effnet_fast.ops.backends import is_tracing, tracing
from effnet_fast.ops.conv.reference import normalised
from effnet_fast.weights.preprocessing import Preprocessing

PLANS = 256  # that a copy keeps, of image shapes and layouts, the least recently used goes first: one is 40 KB for B0, 125 for B7
COMPARED = 3  # images, with which a plan is held against the blocks: more than one, as a model may make something of a batch
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# By how much of its largest value a result may be off because a plan rounds otherwise: what is recorded wrongly is off by far more.
AGREES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    cuda_graphs: bool = True,
    one_launch: bool = False,
) -> InferenceModel:
    """A frozen copy of ``model`` in evaluation mode, with the same call, for serving.

    model          a net of ours (what its ResNets' kernels would be, and those of another norm or activation than ours have, is
                   PyTorch's), an EfficientNet of timm, torchvision or efficientnet_pytorch that :func:`effnet_fast.accelerate`
                   takes, or a module with one in it
    dtype          what it computes in, float32, bfloat16 or float16: by default the model's own
    preprocessing  its mean and std normalise uint8 images: by default the model's own where it carries them (ours, timm's), else
                   ImageNet's
    cuda_graphs    on CUDA, capture the kernels of a pass as a CUDA graph; without, every call starts them one by one
    one_launch     for graphs of up to four images in half precision, try all that the network is of our kernels as one, which
                   stays on the GPU throughout, and keep it where it is right and faster. No GPU has run it yet: by default it is
                   not tried, and a kernel is started for each part of a block

    On the CPU one native call runs the whole network, with its norms folded and its weights packed: an image a thread, or an image
    for all threads where there are fewer. It is planned for the first image, and anew for each other shape and layout at the second
    call with it: those that come once only run block by block, which is sooner done than a plan. The last 256 are kept. Operators
    that no kernel of ours is for run before, after or between native calls: the normalisation in a model, a softmax, a decoder's
    upsampling. Where a model does something else with three images than with each, or something that depends on what is in
    them, its blocks run one by one: ``print(copy)`` tells. What Python makes of how many more there are is not seen. On CUDA a
    graph is captured for each shape and layout of a batch, its size included, at the first call with it, and the last 16 are
    kept: pad odd batches, or give :meth:`InferenceModel.warmup` the sizes.

    What comes later to the model does not change the copy. Weights that are loaded into the copy, or into a module of it, count
    from then on, and those of a :func:`torch.func.functional_call` that lends it others for all of its own; what is written to some
    in place, or lent for some, does so where there is a plan only if an operator of PyTorch's reads them. A hook on a module of it
    is called where the copy is planned or captured, and not again. Traced by torch.jit, exported, and transformed by torch.func it
    is its blocks, as the model is.

    Raises TypeError or ValueError, naming the argument, for what cannot be copied so.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_for_inference: model is a {type(model).__name__}; a torch.nn.Module would do")
    for name, module in model.named_modules():
        if isinstance(module, InferenceModel):
            where = f"model.{name}" if name else "model"
            raise TypeError(
                f"optimize_for_inference: {where} is an InferenceModel, frozen already; the model that it was made from would do"
            )
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtype is None and len(dtypes) != 1:
        raise ValueError(
            f"optimize_for_inference: dtype is None and the model's are {sorted(map(str, dtypes))}; naming one would do"
        )
    dtype = dtype or dtypes.pop()
    if dtype not in DTYPES:
        raise ValueError(f"optimize_for_inference: dtype is {dtype}; one of {', '.join(map(str, DTYPES))} would do")
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise TypeError(f"optimize_for_inference: preprocessing is a {type(preprocessing).__name__}; a Preprocessing would do")
    try:
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TypeError(
            f"optimize_for_inference: model cannot be copied: {told}; one that torch.nn.utils.prune.remove or"
            " remove_weight_norm has made plain would do"
        ) from error
    if callable(set_swish := getattr(frozen, "set_swish", None)):
        set_swish(memory_efficient=False)  # efficientnet_pytorch's other form is two operators, to keep less for backward
    try:
        accelerate(frozen)
    except ValueError:
        if not any(isinstance(module, (FusedBlock, ResNet)) for module in frozen.modules()):  # ours run without, too
            raise
    for module in frozen.modules():
        if not isinstance(module, _BatchNorm):  # which stay as they are: every kernel folds them in float32
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
    return InferenceModel(frozen, dtype, scale_and_shift(frozen, preprocessing), cuda_graphs, one_launch)


class Memory(NamedTuple):
    """Bytes that an :class:`InferenceModel` holds.

    weights  of the frozen network
    plans    of weights packed for the CPU, and of what flows between kernels there
    graphs   of the CUDA graphs' pool, ``static`` of them in the graphs' images and results
    """

    weights: int
    plans: int
    graphs: int
    static: int

    def __str__(self) -> str:
        names = ("weights", "plans", "graphs", "their images and results")
        return "holds " + ", ".join(f"{held / 1e6:.1f} MB of {name}" for name, held in zip(names, self, strict=True) if held)


class InferenceModel(nn.Module):
    """What :func:`optimize_for_inference` gives, in ``dtype``.

    It takes normalised images [N, C, H, W] of any floating type, or uint8 ones, [N, C, H, W] or [N, H, W, C], told apart by which
    has the network's channels (both: the former). The network's first convolution normalises those as it reads them.

    Any number of threads and CUDA streams may call it at the same time. Results are the caller's to keep. Where memory on CUDA does
    not suffice for a batch it runs in smaller pieces, and a warning names the sizes. A copy, a pickle and a move to another device
    leave plans and graphs behind, which are made anew. :func:`effnet_fast.explain` tells what runs in them.

    It stays in evaluation mode, whatever :meth:`train` asks of it or of what holds it. What the network says of itself
    (``num_classes``, ``feature_info``, ``default_cfg``) it says too; methods and modules are ``frozen``'s alone, where they run
    without plans and graphs.
    """

    pixels: Tensor

    def __init__(
        self, frozen: nn.Module, dtype: torch.dtype, pixels: Tensor, cuda_graphs: bool = True, one_launch: bool = False
    ) -> None:
        super().__init__()
        self.frozen, self.dtype, self.cuda_graphs, self.one_launch = frozen, dtype, cuda_graphs, one_launch
        self.register_buffer("pixels", pixels, persistent=False)
        self._watch()
        super().train(False)
        self._start()

    def _watch(self) -> None:
        """Start anew whenever weights are loaded into ``frozen`` or a module of it."""
        for module in self.frozen.modules():
            for number, hook in list(module._load_state_dict_post_hooks.items()):
                if isinstance(hook, _OnLoad) and hook.watching() is None:
                    del module._load_state_dict_post_hooks[number]
            module.register_load_state_dict_post_hook(_OnLoad(self))

    def _start(self) -> None:
        """Without plans and graphs, where the weights are now."""
        if graphs := self.__dict__.get("_graphs"):
            graphs.clear()
        self.device = next(self.frozen.parameters()).device
        self.__dict__["_weight"] = next(self.frozen.parameters())  # no parameter of this module's own
        self._plans: OrderedDict[tuple, Future[NativePlan | str]] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()  # once, and not planned
        self._lock, self._planning = threading.Lock(), threading.Lock()
        self._planner: int | None = None  # the thread that makes a plan
        self._run_joined = functools.partial(run_joined, self.frozen, pixels=self.pixels, dtype=self.dtype)
        few = None
        if self.one_launch and self._no_chain() is None:
            few = Few(chain.Chains(self.frozen, self.pixels, self.dtype), _agree)
        self._graphs = Graphs(self._run_joined, self.dtype, functools.partial(CudaPool, self.device), few)
        self._in_pieces = InPieces(self._graphs if self.cuda_graphs else self._run_blocks, self._graphs.clear)

    def _no_chain(self) -> str | None:
        return chain.why_not(self.device, self.dtype) if self.cuda_graphs else "it is for CUDA graphs"

    def __getstate__(self) -> dict[str, Any]:
        made = ("device", "_weight", "_plans", "_seen", "_lock", "_planning", "_planner", "_run_joined", "_graphs", "_in_pieces")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()
        self._start()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceModel:
        changed = fn(torch.empty(0, dtype=self.dtype)).dtype
        if changed != self.dtype:
            raise TypeError(
                f"InferenceModel: it computes in {self.dtype} and cannot be made {changed};"
                f" optimize_for_inference(model, {changed}) would do"
            )
        super()._apply(fn, recurse)
        self._start()
        return self

    def __getattr__(self, name: str) -> Any:  # called for what this module does not have
        frozen = self.__dict__.get("_modules", {}).get("frozen")
        told = None if name.startswith("_") else getattr(frozen, name, None)
        if told is None or isinstance(told, Tensor) or callable(told):
            return super().__getattr__(name)
        return told

    def train(self, mode: bool = True) -> InferenceModel:
        return self

    def forward(self, x: Tensor) -> Any:
        if is_traced(x):
            with torch.autocast(self.device.type, enabled=False):
                return self._run_blocks(x)
        x = self._checked(x)
        # The dtype is the copy's, whoever calls it; and what is kept outlives the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            try:
                lent = next(self.frozen.parameters()) is not self._weight  # by torch.func.functional_call
                if lent or len(x) == 0:
                    return self._run_blocks(x)
                return self._on_cuda(x) if x.is_cuda else self._on_cpu(x)
            except (ValueError, RuntimeError) as error:
                # Asked only here: a network may make its first convolution's channels of others.
                channels = self.pixels.shape[1]
                if x.shape[1] == channels or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ValueError(f"{wrong_images(x, channels)}; the network says: {str(error).splitlines()[0]}") from error

    def _on_cuda(self, x: Tensor) -> Any:
        if is_tracing() and self.cuda_graphs:  # a graph tells nothing
            return self._run_joined(x if x.dtype == torch.uint8 else x.to(self.dtype))
        return self._run_blocks(x) if torch.cuda.is_current_stream_capturing() else self._in_pieces(x)

    def _on_cpu(self, x: Tensor) -> Any:
        x = x if x.dtype == torch.uint8 else x.to(self.dtype)
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        key = x.dtype, x.shape[1:], x.stride()[1:]
        plan = self._plan(key, x)
        if plan is None or isinstance(plan, str):
            try:
                return self._run_blocks(x)
            except Exception:
                with self._lock:  # no images of the network's
                    if plan is not None:
                        self._plans.pop(key, None)
                    self._seen.pop(key, None)
                raise
        try:
            if is_tracing():  # a plan tells nothing
                with ops.backend("native"):
                    return Recording(x, self.pixels, self.dtype).joined(self.frozen, x)
            return plan(x)
        except Exception as error:  # with so many images it does something else
            reason: Future[NativePlan | str] = Future()
            reason.set_result(f"with {len(x)} images {type(error).__name__}: {error}".splitlines()[0])
            result = self._run_blocks(x)
            with self._lock:
                self._plans[key] = reason
            return result

    def _run_blocks(self, x: Tensor) -> Any:
        return self.frozen(normalised(x, self.pixels, self.dtype) if x.dtype == torch.uint8 else x.to(self.dtype))

    def _checked(self, x: Any) -> Tensor:
        x = image_batch(x, self.pixels.shape[1])
        if x.device != self.device:
            raise ValueError(
                f"InferenceModel: x is on {x.device} and the weights on {self.device}; x.to({str(self.device)!r}) would do"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("InferenceModel: x asks for a gradient, which a frozen copy does not give; x.detach() would do")
        return x

    def _plan(self, key: tuple, x: Tensor) -> NativePlan | str | None:
        """The plan for such images, made now if need be, or why there is none. Others run theirs meanwhile.

        None: they come for the first time, others have come before, and to plan takes longer than to run the blocks; perhaps they
        never come again. Or a hook of the model calls the copy while it is planned.
        """
        if self._planner == threading.get_ident():
            return None
        with self._lock:
            if self._plans and key not in self._plans and key not in self._seen:
                self._seen[key] = None
                while len(self._seen) > PLANS:
                    self._seen.popitem(last=False)
                return None
            self._seen.pop(key, None)
            waited = self._plans.get(key)
            future = self._plans[key] = waited or Future()
            self._plans.move_to_end(key)
            while len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        if waited is None:
            try:
                with self._planning:  # one at a time: each finds the weights that another has packed
                    self._planner = threading.get_ident()
                    try:
                        future.set_result(self._make_plan(x))
                    finally:
                        self._planner = None
            except BaseException as error:
                with self._lock:
                    self._plans.pop(key, None)
                future.set_exception(error)
        return future.result()

    def _make_plan(self, x: Tensor) -> NativePlan | str:
        """Of an image, and right for others: what a model makes of that image, or does with a batch, would not be."""
        like = next((plan for _, plan in self._made_plans() if isinstance(plan, NativePlan)), None)
        image = x[:1].clone(memory_format=torch.preserve_format)
        others = _unlike(self._graphs.key(x)._replace(shape=torch.Size((COMPARED, *x.shape[1:]))).noise(x.device))
        try:
            with tracing():  # whoever traces a call is told what runs in it, and not twice
                plan = NativePlan(self.frozen, image, self.pixels, self.dtype, like)
                agree = _agree(plan(others.clone()), self._run_blocks(others.clone()))
        except Unplannable as reason:
            return str(reason)
        except Exception as error:  # of the model, which may not take one image, or so many: the caller's are for the blocks
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            return_memory()  # which every result of the recording had
        return plan if agree else "its plan gives another result than its blocks do"

    def _made_plans(self) -> list[tuple[tuple, NativePlan | str]]:
        with self._lock:
            futures = list(self._plans.items())
        return [(key, future.result()) for key, future in futures if future.done() and future.exception() is None]

    def warmup(
        self,
        shapes: Iterable[Sequence[int]] | Sequence[int],
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Plan or capture now what calls with such batches would first.

        shapes         of batches, [N, C, H, W] each, at most as many as are kept; or one such shape
        dtype          of their images: by default the copy's
        memory_format  of their images, contiguous or channels_last

        Do it before other threads use the GPU: a capture fails where another thread synchronizes all of the device meanwhile.
        Raises ValueError, naming the shape, for one that the network does not take.
        """
        given: list[Any] = list(shapes)
        alone = bool(given) and all(isinstance(size, int) for size in given)
        wanted: list[tuple[int, ...]] = [tuple(shape) for shape in ([given] if alone else given)]
        for shape in wanted:
            if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape):
                raise ValueError(f"warmup: a shape is {shape}; four numbers > 0 (N, C, H, W) would do")
        kept = GRAPHS if self.device.type == "cuda" else PLANS
        if len(wanted) > kept:
            raise ValueError(f"warmup: there are {len(wanted)} shapes; {kept}, as many as are kept, would do")
        for shape in wanted:
            try:
                images = torch.empty(shape, dtype=dtype or self.dtype, device=self.device, memory_format=memory_format)
                for _ in range(2):  # a plan is made at the second call
                    self(images.zero_())
            except (ValueError, TypeError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ValueError(f"warmup: the network does not take {shape}: {error}") from error

    def memory(self) -> Memory:
        weights = {t.data_ptr(): t.nbytes for t in (*self.parameters(), *self.buffers())}
        plans = next((plan.held() for _, plan in self._made_plans() if isinstance(plan, NativePlan)), 0)
        return Memory(sum(weights.values()), plans, self._graphs.bytes(), self._graphs.static_bytes())

    def __str__(self) -> str:
        plans = self._made_plans()
        lines = [f"{type(self.frozen).__name__} for inference in {self.dtype} on {self.device}, {len(plans)} plans"]
        for (dtype, shape, _), plan in plans:
            told = f"run block by block: {plan}" if isinstance(plan, str) else str(plan)
            lines.append(f"  {'x'.join(map(str, shape))} of {dtype}: {told}")
        if self.one_launch and (reason := self._no_chain()) is not None:
            lines.append(f"  more than one launch: {reason}")
        lines += [*self._graphs.lines(), f"  uint8 images: {mean_and_std(self.pixels)}", f"  {self.memory()}"]
        return "\n".join(lines)

    __repr__ = __str__


class _OnLoad:
    """A hook of modules, by which an InferenceModel knows of a load while it lives. A copy or a pickle of one watches for none."""

    def __init__(self, model: InferenceModel | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def watching(self) -> InferenceModel | None:
        return None if self._model is None else self._model()

    def __call__(self, *_: Any) -> None:
        if (model := self.watching()) is not None:
            model._start()

    def __reduce__(self) -> tuple:
        return _OnLoad, ()


def _unlike(images: Tensor) -> Tensor:
    """Three images, each brighter and of more contrast than the one before, so that it shows where one reaches another."""
    contrast, light = torch.tensor([0.4, 0.7, 1.0]), torch.tensor([-0.5, 0.0, 0.5])
    if images.dtype == torch.uint8:
        contrast, light = 0.5 * contrast, 100 + 50 * light
    unlike = images * contrast[:, None, None, None] + light[:, None, None, None]
    return torch.empty_like(images).copy_(unlike)


def _agree(made: Any, expected: Any) -> bool:
    """Whether two results of a network are the same but for rounding. What is not finite is not looked at, but where only the first
    has it, or all is. Whole numbers, as of classes, are the same."""
    for a, b in zip(tree_flatten(made)[0], tree_flatten(expected)[0], strict=True):
        if (
            a.shape != b.shape
            or a.dtype != b.dtype
            or (b.isfinite() & ~a.isfinite()).any()
            or (b.numel() and not b.isfinite().any())
        ):
            return False
        if b.numel() == 0 or not b.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif (a - b).abs().nan_to_num(posinf=0).max() > AGREES.get(b.dtype, 1e-3) * b.abs().nan_to_num(posinf=0).max():
            return False
    return True
