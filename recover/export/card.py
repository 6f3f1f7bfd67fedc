"""The model card of an exported checkpoint: what it is, what it kept of dense, how it was made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import yaml

from recover.base import artifacts
from recover.base.artifacts import JsonObject
from recover.base.errors import RecipeError
from recover.config import yaml_values
from recover.config.paths import without_folders
from recover.config.recipe import Model, Recipe
from recover.config.tasks import USES, Figure, headline_figures
from recover.export.write import CARD
from recover.models.plan import PlanRecord
from recover.models.site import SUBLAYERS, Site, packed_as, zeroed_partners
from recover.models.source import kind_of
from recover.report import words
from recover.report.data import Plan

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
SNAPSHOT = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")  # of a hub model in the cache
LONGEST = 2**16  # characters of a model card that are looked at
MASKED = (
    "Its zeros stay only while nobody writes them: a LoRA adapter that is trained on this model and merged with stock "
    "tools fills them (W + BA has none), and so does full fine-tuning. Apply the masks again after a merge."
)


def origin(cfg: Model) -> dict[str, str]:
    """What the header of a card says of the dense model: `base_model` where it has an id on a hub, and its licence.

    From its id, or from what its folder says of itself: the card's header, the config. A hub that cannot be reached
    leaves the licence unknown.
    """
    if cfg.source.startswith("embedded:"):
        return {"license": "apache-2.0"}
    kind = kind_of(cfg.source)
    said = _said(_card_of(cfg, kind))
    found = {key: said[key] for key in ("license", "license_name", "license_link") if key in said}
    base = cfg.source if kind == "hub" else _id_of(Path(cfg.source), said)
    return ({"base_model": base} if base else {}) | ({"license": "unknown"} | found)


def _id_of(folder: Path, said: dict[str, str]) -> str | None:
    """The hub id of a model on disk, or of what it was made from, if its files tell."""
    if cached := SNAPSHOT.search(f"{folder.absolute()}/"):
        return f"{cached[1]}/{cached[2]}"
    config = artifacts.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    names = (config.get("_name_or_path"), said.get("base_model"))
    ids = [name for name in names if isinstance(name, str) and re.fullmatch(HUB_ID, name)]
    return next((name for name in ids if not Path(name).exists()), None)


def _card_of(cfg: Model, kind: str) -> str:
    """The dense model's own card, empty where there is none to be had."""
    if kind == "hub":
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(cfg.source, CARD, revision=cfg.revision))
        except Exception:  # no card, no network, no rights: the licence is then unknown
            return ""
    else:
        path = Path(cfg.source).expanduser() / CARD
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(LONGEST)


def _said(text: str) -> dict[str, str]:
    """What the header of a card says in words: lists are taken by their first entry."""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        values = yaml_values.load(header[1], CARD) if header else {}
    except RecipeError:
        values = {}
    pairs = values.items() if isinstance(values, dict) else ()
    first = {str(key): value[0] if isinstance(value, list) and value else value for key, value in pairs}
    return {key: value for key, value in first.items() if isinstance(value, str)}


def card(
    recipe: Recipe, plan: PlanRecord, headlines: dict[str, dict[str, float | None]], facts: dict[str, str | int]
) -> str:
    """Markdown with the header that model hubs read.

    `headlines`: dense, pruned and recovered, each as `recover.measure.tasks.headline` gives it.
    `facts`: shown as they are, one a line (tokens, seconds, seed, versions).
    """
    found = origin(recipe.model)
    shown = yaml_values.dump(without_folders(recipe.model_dump(mode="json"))).rstrip()
    lines = [
        _header(found, _data_sets(recipe)),
        f"# {recipe.name}",
        f"A pruned and recovered version of `{_shown(found.get('base_model', recipe.model.source))}`. "
        f"{_what_was_pruned(plan)}",
        "It loads as any checkpoint of its class does: `AutoModelForCausalLM.from_pretrained(folder)`.",
        "## Figures\n\nGenerative and non-generative figures are apart: one average over both would hide a collapse.",
        _table(headlines),
        "## How it was made\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "## Limits\n\nOnly the tasks of the recipe were measured; other domains, languages and longer texts may have "
        f"suffered unseen. Licence and intended use are those of the dense model.{_masked(plan)}",
        f"## Recipe\n\n```yaml\n{shown}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def plain_card(name: str, plan: PlanRecord, source: str = "") -> str:
    """As `card`, of a model that was exported without a run: what was pruned, and no figures.

    `source`: where the dense model was loaded from, if that is known.
    """
    there = source and (Path(source).exists() or re.fullmatch(HUB_ID, source))
    found = origin(Model(source=source)) if there else {"license": "unknown"}
    loads = "It loads as any checkpoint of its class does: `AutoModelForCausalLM.from_pretrained(folder)`."
    return f"{_header(found, [])}\n\n# {name}\n\nA pruned model. {_what_was_pruned(plan)}\n\n{loads}{_masked(plan)}\n"


def _header(found: dict[str, str], data_sets: list[str]) -> str:
    values: JsonObject = {**found, "library_name": "transformers", "pipeline_tag": "text-generation"}
    values |= {"datasets": data_sets} if data_sets else {}
    values["tags"] = ["pruned", "recover"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _data_sets(recipe: Recipe) -> list[str]:
    """Hub ids of the data sets that the model was pruned and recovered on."""
    calibration = getattr(recipe.prune, "calibration", None)
    named = [getattr(calibration, "data", None)]
    named += [getattr(source, "prompts", None) or getattr(source, "source", None) for source in recipe.train.data]
    return sorted({name for name in named if isinstance(name, str) and re.fullmatch(HUB_ID, name)})


def _masked(plan: PlanRecord) -> str:
    return f"\n\n{MASKED}" if plan["masks"] else ""


def _shown(source: str) -> str:
    """The source without the folders of the machine it was made on."""
    return source.rsplit("/", 1)[-1] if source.startswith("/") else source


def _what_was_pruned(plan: PlanRecord) -> str:
    became = f"{plan['parameters_dense']:,} parameters became {plan['parameters_pruned']:,}."
    if sites := words.plan_sites(cast(Plan, plan)):
        return f"Of its {plan['blocks']} blocks these are dropped: {sites}. {became}{_zeroed(plan)}"
    if plan.get("config"):
        return f"Every block is narrower ({words.plan_sizes(cast(Plan, plan))}). {became}"
    if not plan["masks"]:
        return f"Its weights were changed by {plan['kind']}. {became}"
    weights = sum(mask["shape"][0] * mask["shape"][1] for mask in plan["masks"].values())
    zeros = sum(mask["zeros"] for mask in plan["masks"].values())
    patterns = ", ".join(sorted({mask["pattern"] for mask in plan["masks"].values()}))
    return (
        f"{zeros:,} of {weights:,} weights in the blocks' linear layers are zero ({zeros / weights:.1%}, {patterns}). "
        "They are stored as ordinary dense tensors: no smaller and no faster in stock kernels."
    )


def _zeroed(plan: PlanRecord) -> str:
    """What a depth plan stores for nothing, if anything."""
    kept = {
        Site(block, part)
        for part in SUBLAYERS
        for block in range(plan["blocks"])
        if block not in words.plan_gone(cast(Plan, plan), part)
    }
    zeroed = zeroed_partners(packed_as(plan.get("parallel", False))(kept))
    return f" Of these, {zeroed} sublayers are zeroed partners of lone ones: they add nothing." if zeroed else ""


def _table(headlines: dict[str, dict[str, float | None]]) -> str:
    rows = ["| | " + " | ".join(headlines) + " |", "|---|" + "---:|" * len(headlines)]
    for key, (called, figure) in headline_figures().items():
        title = f"{key} ({called})" if key in USES else f"{key} (lower is better)" if figure.better == "lower" else key
        values = [headline.get(key) for headline in headlines.values()]
        if any(value is not None for value in values):
            rows.append(f"| {title} | " + " | ".join(_number(figure, value) for value in values) + " |")
    return "\n".join(rows)


def _number(figure: Figure, value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.1%}" if figure.form == "percent" else f"{value:.2f}"
