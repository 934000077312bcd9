"""The class that an accelerated block has: a cached subclass of its own class, under the same name, that finds its parts."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from effnet_fast.nn.fused import FusedBlock
from effnet_fast.nn.parts import BlockParts, ConvNormAct, SqueezeExciteParts, has_hooks

_FUSED: dict[type[nn.Module], type[PeerBlock]] = {}
_MADE_OF: dict[type, tuple[type[nn.Module], type[PeerBlock]]] = {}


class PeerBlock(FusedBlock):
    """Comes before a peer's block class in the accelerated subclass. An adapter adds ``parts`` and the forward's own signature.

    ``parts`` is also called with a block that is not accelerated yet, so it uses nothing but the block's attributes.
    """

    def forward_children(self, *args: Any, **kwargs: Any) -> Tensor:
        return super(FusedBlock, self).forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the block's own class and the adapter, which can be found by name, not the class made of them, which cannot."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        function, arguments, *rest = reduced
        if type(self) not in _MADE_OF or function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return function, arguments, *rest
        return _rebuild, (*_MADE_OF[type(self)], *arguments[1:]), *rest


def fused_class(cls: type[nn.Module], adapter: type[PeerBlock]) -> type[PeerBlock]:
    """The accelerated subclass of ``cls``: one for each class, of the same name and module."""
    if cls not in _FUSED:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        fused = type(cls.__name__, (adapter, cls), names)
        _MADE_OF[fused] = cls, adapter
        _FUSED[cls] = fused
    return _FUSED[cls]


def original_class(cls: type) -> type[nn.Module] | None:
    """The block's own class of an accelerated one; None for any other."""
    return _MADE_OF[cls][0] if cls in _MADE_OF else None


def _rebuild(cls: type[nn.Module], adapter: type[PeerBlock], *arguments: Any) -> Any:
    fused = fused_class(cls, adapter)
    return fused.__new__(fused, *arguments)


def block_parts(
    expand: ConvNormAct | str | None,
    depthwise: ConvNormAct | str | None,
    excite: SqueezeExciteParts | str | None,
    project: ConvNormAct | str,
    residual: bool,
    drop: Callable[[Tensor], Tensor] | None,
) -> BlockParts | str:
    """The block made of its parts, or the first reason why one of them is not fused."""
    for part in (expand, depthwise, excite, project):
        if isinstance(part, str):
            return part
    return BlockParts(expand, depthwise, excite, project, residual, drop)  # type: ignore[arg-type]


def hooked(*modules: nn.Module) -> str | None:
    """The reason not to fuse where calling one of ``modules`` would do more than its forward."""
    return "a hook sits on a child" if any(has_hooks(module) for module in modules) else None
