"""Write docs/api.md, the reference of the Python API, from signatures and docstrings of `recover`'s public names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import recover
from recover import api

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# Python API

What `import recover` offers, from the docstrings (`python dev/api_reference.py` writes this page; a test holds it).
Names are imported when they are first used: `import recover` costs nothing. `docs/notebook.ipynb` is a whole job.

```python
import recover

model, tokenizer = recover.load("embedded:fable-2m")
twin = recover.prune(model, tokenizer, recover.Depth(count=2), text="embedded:tasks/calibration.jsonl")
recover.measure(twin, tokenizer, ["embedded:stories"])["headline"]
```

Every error that a caller can mend is a `recover.RecoverError`. The exit codes of the command line are theirs.
"""
METHODS = {"Twin": ("dense", "replan", "closed", "folded"), "Plan": ("none", "kept", "dropped", "summary")}


def _plain(each: Any) -> str:
    """A signature or parameter with its annotations as they are written, not as the strings that they are kept as."""
    text = str(each).replace("pathlib.", "")
    return re.sub(r"\"([^\"]*)\"|'([^']*)'", lambda found: (found[1] or found[2]).replace("'", '"'), text)


def signature(name: str, function: Any) -> str:
    """A call as it is written, a parameter a line where there are many."""
    text = _plain(inspect.signature(function))
    if len(text) < 100:
        return f"recover.{name}{text}"
    parameters = [_plain(each) for each in inspect.signature(function).parameters.values()]
    kinds = [each.kind for each in inspect.signature(function).parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returns = text.rpartition("->")[2]
    return f"recover.{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f") ->{returns}"


def of_function(name: str, function: Any, level: str = "##") -> str:
    """A heading, the call, and what is promised."""
    return f"{level} {name}\n\n```python\n{signature(name, function)}\n```\n\n{inspect.getdoc(function)}\n"


def of_class(name: str, kind: Any) -> Iterator[str]:
    """What it is; of a config, where its fields are; of others, the methods that a job needs."""
    yield f"## {name}\n\n{inspect.getdoc(kind)}\n"
    if issubclass(kind, BaseModel):
        yield f"Fields: [recipe.md](recipe.md#{name.lower()}). All are keyword arguments; `kind` need not be given.\n"
    for method in METHODS.get(name, ()):
        value = inspect.getattr_static(kind, method)
        about = inspect.getdoc(getattr(kind, method)) if not isinstance(value, property) else inspect.getdoc(value)
        yield f"### {name}.{method}\n\n{about}\n"


def page() -> str:
    """The whole page."""
    functions = [of_function(name, getattr(api, name)) for name in recover.FUNCTIONS]
    others = [name for name in recover.__all__ if name not in recover.FUNCTIONS]
    classes = [part for name in others for part in of_class(name, getattr(recover, name))]
    return "\n".join([HEAD, *functions, *classes])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
