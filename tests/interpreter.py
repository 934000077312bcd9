"""Triton's interpreter, told to change triton.language once a kernel, not again at each call of a function within it."""

from __future__ import annotations

from importlib.util import find_spec
from types import FunctionType
from typing import Any


def patch_once_a_kernel() -> None:
    """What the kernel's start has changed, its functions find as they would make it; half of the interpreter's time goes there.

    A release of triton whose interpreter is written otherwise stays as it is.
    """
    if find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    patch, scopes = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scopes is None:
        return
    patched: set[int] = set()  # of the two that it changes, those that the running kernel has changed

    class Scope(scopes):
        def restore(self) -> None:
            super().restore()
            patched.clear()

    def once(function: FunctionType) -> Any:
        seen = {id(value) for value in function.__globals__.values() if value is language or value is language.core}
        if seen and seen <= patched:
            return Scope()
        scope = patch(function)
        patched.update(seen)
        return scope

    interpreter._LangPatchScope = Scope  # type: ignore[misc]
    interpreter._patch_lang = once
