"""What a task file may say, kind by kind, and what one item of each kind is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from recover.config.base import Config
from recover.config.recipe import Sampling

Row = dict[str, Any]

STOP_CHARACTERS = 256  # of all stops together: a GPU follows them by a table with a row for each
SHOTS = 5  # examples of a few-shot prompt that does not say how many
Stop = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class TaskFile(Config):
    """What every kind of task names."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: str = Field(description="a file beside the task, package:..., reasoning_gym:..., or a hub data set")
    subset: str | None = Field(None, description="of a hub data set")
    split: str = Field("test", description="of a hub data set")
    arguments: dict[str, Any] = Field(default={}, description="of a reasoning_gym data set")
    once: str | None = Field(None, description="column whose value names an item: rows that repeat one are passed over")
    limit: int | None = Field(None, ge=1, description="items used, the first ones; default: all")


class Fewshot(Config):
    """Worked examples before each question, the same ones in the same order: the first rows of `data`, or `rows`.

    A row that asks what the item asks is passed over, and the next one taken. With a chat template, examples and
    question are one turn of the user.
    """

    data: str | None = Field(None, description="as a task's `data`; default: that of the task itself")
    subset: str | None = Field(None, description="of a hub data set; default: the task's")
    split: str | None = Field(None, description="of a hub data set, such as train; default: the task's")
    rows: tuple[Row, ...] | None = Field(None, description="the examples themselves, instead of `data`")
    count: int | None = Field(None, ge=1, description="default: 5, or all of `rows`")
    completion: str | None = Field(
        None, description="what follows the prompt in an example, as ' {answer}'; default: a space and the right answer"
    )
    separator: str = Field("\n\n", description="behind each example")
    description: str = Field("", description="before the first example, with the separator between")

    @model_validator(mode="after")
    def _one_source(self) -> Fewshot:
        if self.rows is not None and (self.data or self.subset or self.split):
            raise ValueError("both rows and data, subset or split: the examples come from one of them; leave one out")
        if self.rows is not None and len(self.rows) < (self.count or 1):
            raise ValueError(f"found {len(self.rows)} rows, expected {self.count or 1} or more")
        return self

    @property
    def number(self) -> int:
        """Examples before each question."""
        return self.count or (len(self.rows) if self.rows is not None else SHOTS)


class PromptFile(TaskFile):
    """A task that asks with a prompt, `{column}`s filled in."""

    prompt: str = Field(description="columns in braces: '{question}', '{doc[title]}'")
    fewshot: Fewshot | None = Field(None, description="worked examples before each question; null: none")
    chat: Literal["auto", "never"] = Field("auto", description="auto: the chat template, if the tokenizer has one")

    @property
    def wraps(self) -> bool | None:
        """As `chat` arguments take it: None = if there is a template."""
        return None if self.chat == "auto" else False


class WritingFile(PromptFile):
    """A task whose answer the model writes."""

    stop: tuple[Stop, ...] = Field(
        (), description='such as ["\\n\\n", "Question:"]: a text ends before the first of them'
    )
    max_new_tokens: int | None = Field(None, ge=1, description="default, and at most: the recipe's")
    samples: int | None = Field(None, ge=1, description="texts drawn for each prompt, for pass@k; null: no pass@k")
    sampling: Sampling | None = Field(None, description="how they are drawn; null: as the recipe's `measure.sampling`")

    @model_validator(mode="after")
    def _sampling_is_of_samples(self) -> WritingFile:
        if self.sampling is not None and self.samples is None:
            raise ValueError("sampling says how `samples` are drawn, and samples is missing: set it, as samples: 8")
        return self

    @field_validator("stop")
    @classmethod
    def _fits(cls, strings: tuple[str, ...]) -> tuple[str, ...]:
        if sum(map(len, strings)) > STOP_CHARACTERS:
            raise ValueError(
                f"{sum(map(len, strings))} characters together, expected at most {STOP_CHARACTERS}: shorten them"
            )
        return strings


class Reading(Config):
    """How an answer is found in a text, and compared with what is right."""

    answer: str | None = Field(
        None, description="regular expression: its match is the answer, or its first group that holds something"
    )
    take: Literal["last", "first"] = Field("last", description="which match in the text is the answer")
    match: Literal["exact", "contains"] = Field("exact", description="contains: the answer has a right one in it")
    ignore: tuple[str, ...] | None = Field(
        None,
        description="regular expressions, taken out of answer and target before they are compared by letter; "
        "null: numbers are compared as numbers, and outer punctuation does not count; case never does",
    )

    @field_validator("answer", "ignore")
    @classmethod
    def _compiles(cls, patterns: Any) -> Any:
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {pattern!r}: {error}") from None
        return patterns


class GenerateFile(Reading, WritingFile):
    """The model writes; its answer is the last match of `answer` (default: all of the text)."""

    kind: Literal["generate"]
    target: str = Field("answer", description="column: what is right, a text, a number, or a list of either")
    also: dict[Name, Reading] = Field(
        {}, description="name -> another Reading of the same texts, whose exact match is shown beside the task's own"
    )


class ChoiceFile(PromptFile):
    """The model's log-likelihood chooses among `options` (a column of lists); `target` is the right one's index."""

    kind: Literal["choice"]
    options: str | tuple[str, ...] = Field("options", description="column of lists, or one column for each option")
    target: str = Field("label", description="column: index of the right option, from 0")
    labels: str | None = Field(None, description="column of lists in which `target` stands, where it is no index")
    separator: str = Field(" ", description="between prompt and option, in plain text")


class CodeFile(WritingFile):
    """The model writes code, which passes if `program`, with its `{text}` and columns filled in, runs to its end.

    The code is the first fenced block of the text, else all of it. A stop ends no text that has opened such a block.
    """

    kind: Literal["code"]
    program: str = Field(description="lists are filled in one element a line")
    seconds: float = Field(10.0, gt=0, description="for each program")

    @model_validator(mode="after")
    def _examples_are_complete(self) -> CodeFile:
        if self.fewshot is not None and self.fewshot.completion is None:
            raise ValueError("fewshot.completion is missing: a code task has no right answer to show, say what is")
        return self


class RetrievalFile(TaskFile):
    """Mean-pooled hidden states rank documents by cosine; a relevant one should come first."""

    kind: Literal["retrieval"]
    query: str = "query"
    documents: str = Field("documents", description="column of lists, or of the one relevant text if candidates is all")
    relevant: str = Field("relevant", description="column: index of the relevant document, or a list of them")
    candidates: Literal["own", "all"] = Field("own", description="documents ranked: the row's, or those of all rows")
    length: int = Field(512, ge=2, description="tokens read of each text")


class PerplexityFile(TaskFile):
    """Nats per token of each `text`, of its first `length` tokens."""

    kind: Literal["perplexity"]
    text: str = "text"
    length: int = Field(512, ge=2)


@dataclass(frozen=True)
class Question:
    """One item of a generate task."""

    prompt: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """One item of a choice task; `label` is the index of the right option."""

    prompt: str
    options: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Problem:
    """One item of a code task; `columns` fill in the program."""

    prompt: str
    columns: Row


@dataclass(frozen=True)
class Search:
    """One item of a retrieval task; `relevant` are indices of documents."""

    query: str
    documents: tuple[str, ...]
    relevant: tuple[int, ...]


AnyFile = GenerateFile | ChoiceFile | CodeFile | RetrievalFile | PerplexityFile


FILES: dict[str, type[AnyFile]] = {
    "generate": GenerateFile,
    "choice": ChoiceFile,
    "code": CodeFile,
    "retrieval": RetrievalFile,
    "perplexity": PerplexityFile,
}
