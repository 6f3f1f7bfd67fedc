"""The model card of an exported checkpoint: what it is, what it kept of dense, how it was made."""

from __future__ import annotations

from typing import Any, cast

from recover.config.recipe import Recipe, dump_recipe
from recover.config.tasks import USES, Figure, headline_figures
from recover.models.site import SUBLAYERS, Site, pack_sites, zeroed_partners
from recover.report import plan_text
from recover.report.data import Plan


def card(
    recipe: Recipe, plan: dict[str, Any], headlines: dict[str, dict[str, float | None]], facts: dict[str, Any]
) -> str:
    """Markdown with the header that model hubs read.

    `headlines`: dense, pruned and recovered, each as `recover.measure.tasks.headline` gives it.
    `facts`: shown as they are, one a line (tokens, seconds, seed, versions).
    """
    source = recipe.model.source
    base = "" if source.startswith(("/", ".", "embedded:")) or source.endswith(".gguf") else f"base_model: {source}\n"
    lines = [
        f"---\n{base}library_name: transformers\npipeline_tag: text-generation\ntags: [pruned, recover]\n---",
        f"# {recipe.name}",
        f"A pruned and recovered version of `{_shown(source)}`. {_what_was_pruned(plan)}",
        "It loads as any checkpoint of its class does: `AutoModelForCausalLM.from_pretrained(folder)`.",
        "## Figures\n\nGenerative and non-generative figures are apart: one average over both would hide a collapse.",
        _table(headlines),
        "## How it was made\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "## Limits\n\nOnly the tasks of the recipe were measured; other domains, languages and longer texts may have "
        "suffered unseen. Licence and intended use are those of the dense model.",
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe).rstrip()}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def plain_card(name: str, plan: dict[str, Any]) -> str:
    """As `card`, of a model that was exported without a run: what was pruned, and no figures."""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [pruned, recover]\n---\n\n"
        f"# {name}\n\nA pruned model. {_what_was_pruned(plan)}\n\n"
        "It loads as any checkpoint of its class does: `AutoModelForCausalLM.from_pretrained(folder)`.\n"
    )


def _shown(source: str) -> str:
    """The source without the folders of the machine it was made on."""
    return source.rsplit("/", 1)[-1] if source.startswith("/") else source


def _what_was_pruned(plan: dict[str, Any]) -> str:
    became = f"{plan['parameters_dense']:,} parameters became {plan['parameters_pruned']:,}."
    if sites := plan_text.sites(cast(Plan, plan)):
        return f"Of its {plan['blocks']} blocks these are dropped: {sites}. {became}{_zeroed(plan)}"
    if plan.get("config"):
        return f"Every block is narrower ({plan_text.sizes(cast(Plan, plan))}). {became}"
    if not plan["masks"]:
        return f"Its weights were changed by {plan['kind']}. {became}"
    weights = sum(mask["shape"][0] * mask["shape"][1] for mask in plan["masks"].values())
    zeros = sum(mask["zeros"] for mask in plan["masks"].values())
    patterns = ", ".join(sorted({mask["pattern"] for mask in plan["masks"].values()}))
    return (
        f"{zeros:,} of {weights:,} weights in the blocks' linear layers are zero ({zeros / weights:.1%}, {patterns}). "
        "They are stored as ordinary dense tensors: no smaller and no faster in stock kernels."
    )


def _zeroed(plan: dict[str, Any]) -> str:
    """What a depth plan stores for nothing, if anything."""
    kept = {
        Site(block, part)
        for part in SUBLAYERS
        for block in range(plan["blocks"])
        if block not in plan_text.gone(cast(Plan, plan), part)
    }
    zeroed = zeroed_partners(pack_sites(kept))
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
