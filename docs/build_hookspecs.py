"""Write `docs/hookspecs.md` from the docstrings of the hook specs: `python docs/build_hookspecs.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import FunctionType

from adapterkit.contract import hookspecs

PAGE = Path(__file__).parent / "hookspecs.md"


def specs() -> dict[str, FunctionType]:
    """Every hook's spec by name, in the order of the module."""
    return {
        name: value
        for name, value in vars(hookspecs).items()
        if isinstance(value, FunctionType) and hasattr(value, f"{hookspecs.PROJECT}_spec")
    }


def signature(name: str, spec: FunctionType) -> str:
    """The spec's head on one line, as it is in the module."""
    arguments = ", ".join(f"{p.name}: {p.annotation}" for p in inspect.signature(spec).parameters.values())
    return f"{name}({arguments}) -> {spec.__annotations__['return']}"


def page() -> str:
    """The whole page."""
    parts = [
        "# Hook specifications",
        "Generated from `core/adapterkit/contract/hookspecs.py` by `docs/build_hookspecs.py`. Change them there.",
        inspect.getdoc(hookspecs) or "",
    ]
    for name, spec in specs().items():
        parts += [f"## `{name}`", f"```python\n{signature(name, spec)}\n```", inspect.getdoc(spec) or ""]
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
