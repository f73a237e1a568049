"""Dapji: run, adapt, prove and ship open language models on hardware that you control.

    import dapji
    model = dapji.load("smollm2-135m")
    for text in model.chat([{"role": "user", "content": "Hello!"}]):
        print(text, end="")

Importing this needs neither torch nor a compiler, and takes milliseconds: parts load when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dapji.model import Model, load

__all__ = ["Model", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        import dapji.model

        return getattr(dapji.model, name)
    raise AttributeError(f"module 'dapji' has no attribute {name!r}")
