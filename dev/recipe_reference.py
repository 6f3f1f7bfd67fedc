"""Write docs/recipe.md, the reference of every recipe field, from the models in recover/config/recipe.py."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from recover.config import named, recipe, yaml_values
from recover.config.base import Config
from recover.config.tasks import KINDS, Fewshot, Reading

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
HEAD = """# Recipe reference

Every field of a recipe, from `recover/config/` (`python dev/recipe_reference.py` writes this page; a test holds it).
Fields without a default must be given. Relative files are looked up from the recipe's folder; `embedded:NAME` is
shipped with the package. On the command line any field is set as
`recover run RECIPE train.lr=1e-3 train.data.0.share=2`. The section `train` was called `recover` before; that name is
still read, with a word.
"""
CONFIGS = [
    recipe.Recipe,
    recipe.Model,
    recipe.Depth,
    recipe.Magnitude,
    recipe.Wanda,
    recipe.Width,
    recipe.Experts,
    recipe.Calibration,
]
CONFIGS += [recipe.SparseGpt]
CONFIGS += [recipe.Probe, recipe.Train, recipe.DenseText, recipe.PrunedText, recipe.GivenText, recipe.TeacherText]
CONFIGS += [recipe.Lora, recipe.Loss, recipe.Focus, recipe.StopEarly, recipe.Cache]
CONFIGS += [recipe.Measure, recipe.Sampling, recipe.Export, recipe.Deploy]
DATA = """## Data

Rows: JSONL (`.jsonl`, `.ndjson`), JSON, CSV and TSV, each gzipped too (`.gz`), parquet, Arrow, a folder that `datasets`
reads, or a data set of the hub (`subset` names its configuration). A sheet holds lists, as messages, as JSON. What each
part of a recipe reads from a line, other columns being ignored:

| part | columns | a line |
|---|---|---|
| calibration, `data` | `text`, or `column` (messages too) | `{"text": "Text as the model will meet it."}` |
| `train.data`, kinds `dense` and `pruned`; `probe.prompts` | `prompt` | `{"prompt": "What is 12 times 12?"}` |
| `train.data`, kind `given` | as `columns` says, by default `text` | `{"text": "..."}` |
| ... with `columns: {prompt: prompt, completion: completion}` | these | `{"prompt": "...", "completion": "..."}` |
| ... with `columns: {messages: messages}` | `messages` | `{"messages": [{"role": "user", "content": "..."}, ...]}` |
| a task's `data` | as the task says | below |

Prompts go through the tokenizer's chat template where there is one; give the bare question. Of messages (system
prompts, several turns) the last answer is written anew by kinds `dense` and `pruned`. Rows that hold nothing are left
out and counted; a row that is broken or of another type is refused by file and line. Tools and thoughts (`<think>`)
that the template does not show are refused with the reason.

What is measured should not stand in what the run is made with. `recover plan` looks for each measured item in the first
100,000 texts of each source and of the calibration, and says how many are there: word for word, or with 60% of their
runs of five words in common, every number counting as the same word. Runs that more than 5% of a task's items share are
its template, and do not count. The report shows the counts, with examples. A question in other words is not found.

## Tasks

A task is a YAML file: what is asked, and what is right; some go by [a name](#names). Its `data` lies beside it
(`.jsonl`, `.jsonl.gz`, `.parquet`, `.arrow`) or in an installed package (`package:NAME/path`), is made up
(`reasoning_gym:NAME`), or is a hub data set.
Generation is what recovery is judged by, so a recipe wants at least one `generate` (or `code`) task:

```yaml
name: sums                    # my_task.yaml
kind: generate
data: sums.jsonl              # {"question": "What is 12 times 12?", "answer": "144"}
prompt: "{question}"          # columns in braces: {column}, {column[key]}; a brace itself is written twice
target: answer                # column: what is right; a text, a number, or a list of either
answer: '-?\\d+'               # the last match in what the model writes is its answer; without this, all of the text
```

```yaml
name: quiz
kind: choice
data: quiz.jsonl              # {"question": "Fish live in", "options": ["trees", "water"], "label": 1}
prompt: "{question}"
```

Instructions that a program checks, of the 25 types of IFEval (kind `instructions`; the named task is `ifeval`). A text
is right if it follows all of them as it stands; `prompt_loose` forgives a first or last line and asterisks, and
`by_instruction` in `measure.json` has each type. Types that ask for a language need `pip install 'recover[ifeval]'`:

```yaml
name: manners
kind: instructions
data: manners.jsonl           # {"prompt": "Say hello in 3 words or more, without a comma.",
                              #  "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                              #  "kwargs": [{}, {"relation": "at least", "num_words": 3}]}
prompt: "{prompt}"
```

What ends an answer is the model's end token, or one of the strings of `stop`: a base model goes on with a next question
of its own otherwise. A text that runs into `max_new_tokens` has not ended, and is counted as such:

```yaml
chat: never                   # the bare prompt, though the tokenizer may have a chat template
stop: ["\\n\\n", "Question:"]  # in double quotes, where \\n is a line feed
```

A base model is shown worked examples first (few-shot), and one text may be read in more ways than one. GSM8K as
lm-evaluation-harness asks and reads it, with `sampler: first_n`:

```yaml
name: gsm8k
kind: generate
data: gsm8k_test.jsonl        # {"question": "...", "answer": "... 5 * 3 = 15.\\n#### 15"}
prompt: "Question: {question}\\nAnswer:"
chat: never
fewshot: {data: gsm8k_train.jsonl, count: 5}    # an example is the prompt, a space, and the answer
stop: ["Question:", "</s>", "<|im_end|>"]
answer: '#### (-?[0-9.,]+)'   # strict match
take: first
ignore: &ignore [',', '\\$', '(?s).*#### ', '\\.$']
also:
  flexible: {answer: '(-?[$0-9.,]{2,})|(-?[0-9]+)', ignore: *ignore}    # the last number
```

With `samples: 8` a `generate` or `code` task draws eight texts for each prompt beside the greedy one, and `pass_at_k`
is the unbiased estimate of pass@1, 2, 4 and 8. They take eight times as long as the greedy texts, after each epoch too
(`measure.epoch_limit`).

A wrong text is counted by its first mistake of form (it ends in a loop, does not end, holds no answer, or is code that
does not parse), else as well formed and wrong; `measure.json` (`mistakes`, `examples`, `loop_rate`) and the report have
this of dense, pruned and recovered, and `epochs.jsonl` after each epoch.

The dense model must be able to do it: where it scores next to nothing (or chance), nothing can be lost, and `run`
says so.
"""
NAMES = """## Names

`measure.tasks`, and `recover measure MODEL --tasks`, take these names beside files, and `--suite` takes a list of them.
`blend:NAME` stands where prompts are asked for (`train.data.*.prompts`, `prune.calibration.data` with
`column: prompt`), and `blend:math+code` for both. Each is a YAML file in `recover/named/`, to be copied and changed.
Its data is not shipped: it comes from the first of its sources that can be had, packages pinned by sha256, data sets of
the hub by commit. What is missing is said with what would bring it.
"""
TASKS: list[type[BaseModel]] = [*(kind.file for kind in KINDS.values()), Fewshot, Reading]


def shown_type(annotation: Any) -> str:
    """An annotation as a user would say it."""
    if isinstance(annotation, types.NoneType) or annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return shown_type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(shown_type(part) for part in arguments)
    if origin is tuple:
        return f"list of {shown_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    )


def shown_default(field: Any) -> str:
    """The default, or a dash where the field must be given."""
    if field.default is PydanticUndefined:
        return "-"
    value = field.default
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    if isinstance(value, str) and (not value or "\n" in value):
        return f"`{json.dumps(value)}`"
    return "`null`" if value is None else f"`{value}`"


def rows(cfg: type[BaseModel]) -> Iterator[str]:
    """One line of a table for each field."""
    for name, field in cfg.model_fields.items():
        annotation = field.annotation
        default = "-" if name == "kind" else shown_default(field)  # which has one in Python alone
        yield f"| `{name}` | {shown_type(annotation)} | {default} | {field.description or ''} |"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *sections(CONFIGS), DATA, *sections(TASKS), NAMES, *names(), *sections([named.Source])])


def names() -> Iterator[str]:
    """Tables of tasks, suites and blends, with licence and sources of their data."""
    yield "| task | kind | what it is | licence | sources, the first that can be had |\n|---|---|---|---|---|"
    for name in named.task_names():
        path = named.task_path(name)
        tree = yaml_values.read(path)
        sources = named.read_sources(tree["sources"], path)
        about = tree["about"]
        yield f"| `{name}` | {tree['kind']} | {about} | {_licences(sources)} | {_places(sources)} |"
    yield "\n| suite | tasks | what it is |\n|---|---|---|"
    for name, suite in named.lists().suites.items():
        yield f"| `{name}` | {', '.join(suite.tasks)} | {suite.about} |"
    yield "\n| blend | prompts | licence | sources, the first that can be had |\n|---|---|---|---|"
    for name in named.blend_names():
        for part in named.read_blend(named.blend_paths(f"blend:{name}")[0]).parts:
            about = f"only without the above: {part.about}" if part.instead else part.about
            yield f"| `{name}` | {about} | {_licences(part.sources)} | {_places(part.sources)} |"
    yield ""


def _licences(sources: Sequence[named.Source]) -> str:
    return ", ".join(dict.fromkeys(source.license or "?" for source in sources))


def _places(sources: Sequence[named.Source]) -> str:
    return ", ".join(
        f"hub: {source.data}" if source.revision else f"`{source.pip or source.data}`" for source in sources
    )


def sections(leaves: list[type[BaseModel]]) -> Iterator[str]:
    """A heading, what is promised, and the table, of each."""
    for cfg in leaves:
        # What all leaves are is no news of one that says nothing itself.
        about = inspect.cleandoc(next((each.__doc__ for each in cfg.__mro__ if each.__doc__), ""))
        about = "" if about == inspect.cleandoc(Config.__doc__ or "") else f"{about}\n\n"
        table = ["| field | value | default | meaning |", "|---|---|---|---|", *rows(cfg)]
        yield f"## {cfg.__name__}\n\n{about}" + "\n".join(table) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
