"""The kinds of task: what a file of each may say, which figures it gives, and what the report calls them.

A kind is one `TaskKind` here and one module of `measure/kinds/`, which makes its items and measures them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from recover.base import console
from recover.base.process import TooSlow, within
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
    kind: str
    about: str | None = Field(None, description="what it is, for whoever reads the file")
    data: str = Field(
        description="a file beside the task, package:..., reasoning_gym:..., or a hub data set; or `sources`, a list, "
        "of which the first that can be had is taken"
    )
    subset: str | None = Field(None, description="of a hub data set")
    split: str = Field("test", description="of a hub data set")
    revision: str | None = Field(None, description="of a hub data set: branch, tag or commit")
    license: str | None = Field(None, description="of the data")
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


HARD = tuple(letter * 64 + end for letter in ("a", "1", " ", "\n", "a ", "1,") for end in ("!", "a!"))


def _refuse_slow(pattern: str) -> None:
    """Raise ValueError for a pattern that backtracks without end: a model that loops writes just such texts."""
    for text in HARD:
        try:
            with within(1.0):
                for _ in re.finditer(pattern, text, re.IGNORECASE):
                    pass
        except TooSlow:
            raise ValueError(
                f"{pattern!r} takes more than a second on {text[:4]!r} repeated: a repetition repeats, as in (a+)+; "
                "write it with one of them"
            ) from None


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
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"not a regular expression: {pattern!r}: {error}") from None
            _refuse_slow(pattern)
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

    What follows the line of `{text}` is its tests. They run in another process than the program, and get data from it.
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


class InstructionsFile(WritingFile):
    """The model writes a text that follows instructions of IFEval's 25 types, which a program checks.

    Right: a text that follows all of its item's, as it stands (strict).
    """

    kind: Literal["instructions"]
    instructions: str = Field(
        "instruction_id_list", description="column: types, as length_constraints:number_words, a list"
    )
    details: str = Field(
        "kwargs", description="column: a mapping for each type, as {relation: at least, num_words: 300}"
    )

    @model_validator(mode="after")
    def _examples_are_complete(self) -> InstructionsFile:
        if self.fewshot is not None and self.fewshot.completion is None:
            raise ValueError("fewshot.completion is missing: an instructions task has no right answer to show")
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
class Figure:
    """One figure of a task's record: how to word it and which way is better (`same`: as near to dense as can be).

    `main` figures are those of verdicts; `against_dense` ones compare with dense, which has none itself. `meaning`
    explains the label to a reader of the report.
    """

    key: str
    label: str
    form: str
    better: str
    main: bool = False
    against_dense: bool = False
    meaning: str = ""

    def worded(self, value: float) -> str:
        """The value for a table in the terminal."""
        if self.form == "perplexity":
            return console.perplexity(value)
        return f"{value:.1%}" if self.form == "percent" else f"{value:.4g}"


@dataclass(frozen=True)
class Use:
    """What a model is used for, and verdicts are given on; `score`: what its headline figure is."""

    name: str
    adjective: str
    question: str
    score: str


@dataclass(frozen=True)
class TaskKind:
    """A kind of task, all that is known of it without a model.

    `work`: the module whose `WORK` (`recover.measure.model.Work`) makes and measures its items. `figures`: the
    main one first. `words`: what the main figure is called in short. `use`: whose headline figure its main figure goes
    into, in the mean; None: it has a headline figure under its own name, pooled by `WORK`.
    """

    name: str
    file: type[TaskFile]
    work: str
    words: str
    figures: tuple[Figure, ...]
    use: str | None = None
    runs_code: bool = False

    @property
    def main(self) -> Figure:
        """The figure that verdicts and headlines are made of."""
        return self.figures[0]

    @property
    def headline(self) -> str:
        """Where its main figure goes in a record's `headline`."""
        return self.use or self.name


USES: dict[str, Use] = {}
KINDS: dict[str, TaskKind] = {}


def register(entry: Use | TaskKind) -> None:
    """Make a use or a kind known, to everything that reads, measures and reports tasks.

    Raises:
        ValueError: there is one of that name, or the kind is of a use that is not known.
    """
    known: dict[str, Any] = USES if isinstance(entry, Use) else KINDS
    if entry.name in known:
        raise ValueError(f"{type(entry).__name__} {entry.name!r}: there is one of that name: give another")
    if isinstance(entry, TaskKind) and entry.use is not None and entry.use not in USES:
        raise ValueError(f"task kind {entry.name!r}: use {entry.use!r}: expected one of {', '.join(USES)}")
    known[entry.name] = entry


def headline_figures() -> dict[str, tuple[str, Figure]]:
    """Of each headline figure: what it is called in short, and how it is worded; uses first."""
    first: dict[str, tuple[str, Figure]] = {}
    for kind in sorted(KINDS.values(), key=lambda kind: kind.use is None):
        first.setdefault(kind.headline, (kind.words, kind.main))
    return {name: first[name] for name in [*USES, *first] if name in first}


LOOPS = Figure(
    "loop_rate",
    "loop rate",
    "percent",
    "lower",
    meaning="texts that end in a run of tokens repeated at least three times over 24 tokens or more",
)
ENDED = Figure(
    "ended", "answers that end", "percent", "higher", meaning="texts that the model ended itself, within the limit"
)
EXACT_TEXT = Figure(
    "exact_text",
    "texts equal to dense",
    "percent",
    "higher",
    against_dense=True,
    meaning="greedy texts that are the dense model's from first to last token",
)
AGREEMENT = Figure(
    "agreement",
    "tokens equal to dense",
    "percent",
    "higher",
    against_dense=True,
    meaning="places of a text that hold the token that dense wrote there",
)
LENGTH = Figure("length", "length, tokens", "number", "same", meaning="mean length of a text")
TRUNCATED = Figure(
    "truncated", "cut at the limit, texts", "count", "lower", meaning="texts that ran into the limit of new tokens"
)

register(Use("generation", "generative", "Can it write answers?", "exact match of written answers"))
register(Use("choice", "choice", "Can it pick among given options?", "accuracy among given options"))
register(Use("retrieval", "retrieval", "Can it rank documents?", "ranking score"))
register(
    TaskKind(
        "generate",
        GenerateFile,
        "recover.measure.kinds.generate",
        "exact match",
        (
            Figure(
                "exact_match",
                "exact match",
                "percent",
                "higher",
                main=True,
                meaning="answers read off the greedy text that equal the right one",
            ),
            Figure(
                "sampled_exact_match",
                "exact match, sampled",
                "percent",
                "higher",
                meaning="the same of texts drawn at random instead of greedily",
            ),
            EXACT_TEXT,
            AGREEMENT,
            ENDED,
            LOOPS,
            Figure(
                "repetition",
                "repeated 4-grams",
                "percent",
                "lower",
                meaning="runs of four tokens that stood in the same text before",
            ),
            Figure(
                "longest_repeat",
                "longest repeat, tokens",
                "number",
                "lower",
                meaning="the longest run of tokens that occurs twice in a text, in the mean",
            ),
            Figure(
                "distinct_2",
                "distinct 2-grams",
                "percent",
                "same",
                meaning="different pairs of neighbouring tokens among all pairs of a text",
            ),
            LENGTH,
            TRUNCATED,
        ),
        use="generation",
    )
)
register(
    TaskKind(
        "choice",
        ChoiceFile,
        "recover.measure.kinds.choice",
        "accuracy",
        (
            Figure(
                "accuracy",
                "accuracy",
                "percent",
                "higher",
                main=True,
                meaning="items whose right option is the likeliest, by the sum of log-probabilities of its tokens",
            ),
            Figure(
                "accuracy_normalised",
                "accuracy, by length",
                "percent",
                "higher",
                meaning="the same with that sum divided by the option's length in bytes",
            ),
            Figure(
                "margin",
                "margin, nats",
                "number",
                "higher",
                meaning="log-probability of the right option less that of the best wrong one, in the mean",
            ),
        ),
        use="choice",
    )
)
register(
    TaskKind(
        "code",
        CodeFile,
        "recover.measure.kinds.code",
        "pass@1",
        (
            Figure(
                "pass_at_1",
                "programs that pass their tests",
                "percent",
                "higher",
                main=True,
                meaning="greedy programs that pass all tests of their item",
            ),
            ENDED,
            LOOPS,
            LENGTH,
            TRUNCATED,
        ),
        use="generation",
        runs_code=True,
    )
)
register(
    TaskKind(
        "instructions",
        InstructionsFile,
        "recover.measure.kinds.instructions",
        "instructions followed",
        (
            Figure(
                "prompt_strict",
                "prompts followed in all",
                "percent",
                "higher",
                main=True,
                meaning="greedy texts that follow every instruction of their prompt",
            ),
            Figure(
                "prompt_loose",
                "the same, loosely",
                "percent",
                "higher",
                meaning="the same, where a first line, a last line and asterisks may be taken away",
            ),
            Figure(
                "instruction_strict",
                "instructions followed",
                "percent",
                "higher",
                meaning="single instructions that the greedy text follows, of all prompts together",
            ),
            Figure(
                "instruction_loose",
                "instructions, loosely",
                "percent",
                "higher",
                meaning="the same, where a first line, a last line and asterisks may be taken away",
            ),
            EXACT_TEXT,
            AGREEMENT,
            ENDED,
            LOOPS,
            LENGTH,
            TRUNCATED,
        ),
        use="generation",
    )
)
register(
    TaskKind(
        "retrieval",
        RetrievalFile,
        "recover.measure.kinds.retrieval",
        "nDCG@10",
        (
            Figure(
                "score",
                "ranking score",
                "percent",
                "higher",
                main=True,
                meaning="nDCG@10: how near to the top of ten the relevant documents stand; 100%: all first",
            ),
            Figure(
                "accuracy",
                "relevant document first",
                "percent",
                "higher",
                meaning="queries whose nearest document is a relevant one",
            ),
        ),
        use="retrieval",
    )
)
register(
    TaskKind(
        "perplexity",
        PerplexityFile,
        "recover.measure.kinds.perplexity",
        "perplexity",
        (
            Figure(
                "perplexity",
                "perplexity",
                "perplexity",
                "lower",
                main=True,
                meaning="exp of a token's mean negative log-probability: a choice among so many equally likely tokens",
            ),
        ),
    )
)
