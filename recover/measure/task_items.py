"""One item from one row, each kind its own way; what is wrong with a row is told by file and line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from recover.base.errors import DataError
from recover.config.tasks import (
    Choice,
    ChoiceFile,
    CodeFile,
    GenerateFile,
    PerplexityFile,
    Problem,
    Question,
    RetrievalFile,
    Row,
    Search,
)
from recover.measure.task_rows import column, filled


def _question(file: GenerateFile, row: Row, where: str) -> Question:
    found = column(row, file.target, where)
    targets = tuple(str(target).strip() for target in (found if isinstance(found, list) else [found]))
    if not targets or not all(targets):
        raise DataError(f"{where}: column '{file.target}' is empty, expected the right answer or a list of them")
    return Question(filled(file.prompt, row, where), targets)


def _choice(file: ChoiceFile, row: Row, where: str) -> Choice:
    if isinstance(file.options, str):
        options, name = column(row, file.options, where), file.options
    else:
        options, name = [column(row, each, where) for each in file.options], ", ".join(file.options)
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(each, str) and each for each in options):
        raise DataError(f"{where}: column '{name}': found {options!r}, expected a list of two or more texts")
    label = _label(file, row, where)
    if isinstance(label, bool) or not str(label).isdecimal() or int(label) >= len(options):
        raise DataError(
            f"{where}: column '{file.target}': found {label!r}, expected the index of the right option, "
            f"0 to {len(options) - 1}"
        )
    return Choice(filled(file.prompt, row, where), tuple(options), int(label))


def _label(file: ChoiceFile, row: Row, where: str) -> Any:
    """The target, or its place among `labels`."""
    found = column(row, file.target, where)
    if file.labels is None:
        return found
    labels = column(row, file.labels, where)
    if not isinstance(labels, list) or found not in labels:
        raise DataError(f"{where}: column '{file.target}': found {found!r}, expected one of {labels!r}")
    return labels.index(found)


def _problem(file: CodeFile, row: Row, where: str) -> Problem:
    problem = Problem(filled(file.prompt, row, where), row)
    program(file, problem, "", where)
    return problem


def program(file: CodeFile, problem: Problem, text: str, where: str = "") -> str:
    """The program that tests `text`, the code that a model wrote."""
    return filled(file.program, {**_joined(problem.columns), "text": text}, where, "program")


def _joined(value: Any) -> Any:
    """Lists as text, one element a line, in whatever they lie."""
    if isinstance(value, dict):
        return {name: _joined(each) for name, each in value.items()}
    return "\n".join(map(str, value)) if isinstance(value, list) else value


def _search(file: RetrievalFile, row: Row, where: str) -> Search:
    query, documents = column(row, file.query, where), column(row, file.documents, where)
    if file.candidates == "all" and isinstance(documents, str):
        documents, relevant = [documents], [0]
    else:
        found = column(row, file.relevant, where)
        relevant = found if isinstance(found, list) else [found]
    if not isinstance(query, str) or not query.strip():
        raise DataError(f"{where}: column '{file.query}': found {query!r}, expected a text")
    least = 2 if file.candidates == "own" else 1
    texts = isinstance(documents, list) and all(isinstance(each, str) and each.strip() for each in documents)
    if not texts or len(documents) < least:
        raise DataError(f"{where}: column '{file.documents}': found {documents!r}, expected a list of {least}+ texts")
    if not relevant or any(isinstance(at, bool) or at not in range(len(documents)) for at in relevant):
        raise DataError(
            f"{where}: column '{file.relevant}': found {relevant!r}, expected indices from 0 to {len(documents) - 1}"
        )
    return Search(query, tuple(documents), tuple(relevant))


def among_all(items: list[Search]) -> list[Search]:
    """Each query among the documents of all of them, each text once."""
    documents = tuple(dict.fromkeys(text for item in items for text in item.documents))
    place = {text: index for index, text in enumerate(documents)}
    if len(documents) < 2:
        raise DataError("candidates: all, but all rows have the same document: nothing is ranked")
    return [
        replace(item, documents=documents, relevant=tuple(sorted({place[item.documents[at]] for at in item.relevant})))
        for item in items
    ]


def _text(file: PerplexityFile, row: Row, where: str) -> str:
    text = column(row, file.text, where)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: column '{file.text}': found {text!r}, expected a text")
    return text


MAKERS: dict[str, Callable[..., Any]] = {
    "generate": _question,
    "choice": _choice,
    "code": _problem,
    "retrieval": _search,
    "perplexity": _text,
}
