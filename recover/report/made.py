"""What each stage of a run was made with, by its stamp, and in words what of a run does not belong together.

A recipe may be changed, a file edited or a package upgraded between two calls; stages that were not done again since
are of before. Their figures are shown all the same, and what is mixed is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recover.base import artifacts, earlier
from recover.base.artifacts import DONE
from recover.base.products import peek
from recover.config.recipe import completed
from recover.report import words
from recover.report.data import Json, Made, PageData

# Stages that made what is shown, in their order, and the folder in which each leaves its stamp.
FOLDERS = {name: name for name in ("dense", "prune", "before", "train", "after")} | {
    "export": "deploy",
    "deploy": "gguf",
}
SHOWN_FIELDS = 3  # of a difference, in one sentence
DIGITS = 12  # of a digest
LIBRARIES = ("torch", "transformers")  # named in the table; all are in report.json
SERVED = ("deployed", "alternative")  # models that are files of stage deploy
NOT_FIELDS = ("inputs", "stages", "carried")  # of a fingerprint


def made(root: Path, recipe: Json) -> list[Made]:
    """Each stage that is done: when, the fields of the recipe it was made with, versions, digests of its inputs.

    `differs`: the fields that are not those of `recipe`, as `prune.count: 4, and 7 in recipe.yaml`.
    """
    found: list[Made] = []
    asked = (recipe.get("deploy") or {}).get("quantize") is not None
    for stage, folder in FOLDERS.items():
        if stage == "deploy" and not asked:  # done for an earlier recipe; nothing of it is shown
            continue
        stamp = earlier.stamp(peek(earlier.place(root, folder) / DONE))
        fingerprint = stamp.get("fingerprint") if isinstance(stamp, dict) else None
        if not isinstance(stamp, dict) or not isinstance(fingerprint, dict):
            continue
        fields = {name: value for name, value in fingerprint.items() if name not in NOT_FIELDS}
        environment = stamp.get("made") or {}
        found.append(
            {
                "stage": stage,
                "finished": str(stamp.get("finished")),
                "recipe": fields,
                "differs": list(_differing(completed(fields), recipe)),
                "versions": {"recover": environment.get("recover"), **(environment.get("versions") or {})},
                "machine": environment.get("machine"),
                "inputs": dict(fingerprint.get("inputs") or {}),
                "stages": dict(fingerprint.get("stages") or {}),
            }
        )
    return found


def _differing(fields: Json, recipe: Json) -> Iterator[str]:
    now = dict(artifacts.leaves(artifacts.plain(completed({name: _at(recipe, name) for name in fields}))))
    then = dict(artifacts.leaves(fields))
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            was, has = (side.get(name, "absent").replace('"', "") for side in (then, now))
            yield f"{name}: {was}, and {has} in recipe.yaml"


def _at(recipe: Json, name: str) -> Any:
    value: Any = recipe
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def mixed(stages: list[Made]) -> list[str]:
    """A sentence for each way in which the stages of a run do not belong together; none where they do."""
    return [*_of_recipes(stages), *_of_stages(stages), *_of_inputs(stages), *_of_versions(stages)]


def _of_recipes(stages: list[Made]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for stage in stages:
        if stage["differs"]:
            more = len(stage["differs"]) - SHOWN_FIELDS
            shown = "; ".join(stage["differs"][:SHOWN_FIELDS]) + (f"; and {more} more" if more > 0 else "")
            groups.setdefault(shown, []).append(stage["stage"])
    for differs, names in groups.items():
        yield f"Stage {_listed(names)} was made with another recipe than recipe.yaml has now ({differs})."


def _of_stages(stages: list[Made]) -> Iterator[str]:
    finished = {stage["stage"]: stage["finished"] for stage in stages}
    for stage in stages:
        old = [name for name, time in stage["stages"].items() if time is not None and finished.get(name) != time]
        if old:
            gone = "is not done now" if old[0] not in finished else "was done again since"
            yield f"Stage {stage['stage']} was made from an earlier {_listed(old)}, which {gone}."


def _of_inputs(stages: list[Made]) -> Iterator[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(name for stage in stages for name in stage["inputs"]):
        digests: dict[str, list[str]] = {}
        for stage in stages:
            if name in stage["inputs"]:
                digests.setdefault(stage["inputs"][name], []).append(stage["stage"])
        if len(digests) > 1:
            groups.setdefault(tuple(_listed(names) for names in digests.values()), []).append(name)
    for sides, names in groups.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        yield f"{names[0]}{more} was changed within this run: {' read one, and '.join(sides)} another."


def _of_versions(stages: list[Made]) -> Iterator[str]:
    for package in dict.fromkeys(name for stage in stages for name in stage["versions"]):
        versions: dict[str, list[str]] = {}
        for stage in stages:
            if version := stage["versions"].get(package):
                versions.setdefault(version, []).append(stage["stage"])
        if len(versions) > 1:
            who = "; ".join(f"{version}: {_listed(names)}" for version, names in versions.items())
            yield f"Stages were made with different versions of {package} ({who})."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def added(root: Path) -> tuple[list[Json], list[str]]:
    """Records of tasks that were measured later, beside those of the recipe, in the order of their names.

    Those that were measured on another pruning, training or epoch are left out, each with a sentence; of those that
    were measured on other files of stage deploy, the columns of these files.
    """
    stamps = {stage: peek(earlier.place(root, stage) / DONE) or {} for stage in ("prune", "train")}
    finished = {stage: stamp.get("finished") for stage, stamp in stamps.items()}
    served = (peek(root / FOLDERS["deploy"] / DONE) or {}).get("finished")
    best = peek(root / "after" / "best.json") or peek(earlier.place(root, "train/best.json")) or {}
    found, left_out = [], []
    for path in sorted((root / "more").glob("*.json")):
        record = peek(path)
        if not isinstance(record, dict) or not isinstance(record.get("models"), dict):
            continue
        stages = earlier.keys(record.get("stages") or {})
        of_files = stages.pop("deploy", None)
        if stages == finished and record.get("epoch") == best.get("epoch"):
            old = [model for model in SERVED if model in record["models"]] if of_files != served else []
            models = {model: task for model, task in record["models"].items() if model not in old}
            found.append({**record, "models": models})
            if old:
                left_out.append(
                    f"Task {record.get('task')} was measured later on earlier files of stage deploy, and their "
                    f"columns are left out: measure it again (recover measure {root} --tasks ...)."
                )
        else:
            left_out.append(
                f"Task {record.get('task')} was measured later, on an earlier state of this run, and is left out: "
                f"measure it again (recover measure {root} --tasks ...), or delete more/{path.name}."
            )
    return found, left_out


def stage_rows(data: PageData) -> list[tuple[Any, ...]]:
    """A row a stage: when it was done, with which versions, and where its recipe differs from the one shown."""
    return [
        (
            stage["stage"],
            stage["finished"][:16].replace("T", " "),
            stage["versions"].get("recover") or words.NOT_MEASURED,
            ", ".join(f"{name} {stage['versions'].get(name) or '–'}" for name in LIBRARIES),
            "; ".join(stage["differs"]) or "as shown",
        )
        for stage in data["made"]
    ]


def input_rows(data: PageData) -> list[tuple[Any, ...]]:
    """A row for each input in each state in which it was read: its name, the beginning of its digest, the stages."""
    found: dict[tuple[str, str], list[str]] = {}
    for stage in data["made"]:
        for name, digest in stage["inputs"].items():
            found.setdefault((name, str(digest)), []).append(stage["stage"])
    return [(name, short(digest), ", ".join(names)) for (name, digest), names in sorted(found.items())]


def short(digest: str) -> str:
    """The beginning of a sha256 or of a commit; what else an input is known by, as it is."""
    plain = len(digest) >= 40 and all(letter in "0123456789abcdef" for letter in digest)
    return digest[:DIGITS] if plain else digest
