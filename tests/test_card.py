"""A model card is one that a hub takes; it says what the dense model's says, and nothing of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from recover.config import recipe
from recover.export.write import card, origin, plain_card
from recover.models.plan import MaskRecord, Plan

HEADLINES: dict[str, dict[str, float | None]] = {name: {} for name in ("dense", "pruned", "recovered")}
DEPTH = Plan("depth", 6, sites=(2,)).to_json()
MASKS = Plan("wanda", 6, masks={"a": MaskRecord((4, 8), 16, "2:4")}).to_json()
OWN = "---\nlicense: {licence}\nlicense_name: gemma\nbase_model:\n- org/base\ntags: [a]\n---\n# Mine\n"


def model_folder(folder: Path, config: dict | None = None, own_card: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    if own_card:
        (folder / "README.md").write_text(own_card)
    return folder


def a_recipe(folder: Path, source: str) -> recipe.Recipe:
    (folder / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "mine",
                "model": {"source": source},
                "prune": {"kind": "depth", "count": 1, "calibration": {"data": "text.jsonl"}},
                "train": {
                    "data": [
                        {"kind": "dense", "prompts": "prompts.jsonl"},
                        {"kind": "given", "source": "org/texts"},
                        {"kind": "given", "source": "/elsewhere/given.jsonl"},
                    ]
                },
                "measure": {"tasks": ["sums.yaml", "embedded:facts"]},
            }
        )
    )
    return recipe.load_recipe(folder / "mine.yaml")


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_the_header_is_one_that_a_hub_reads(tmp_path):
    source = model_folder(tmp_path / "dense", {"_name_or_path": "org/model-7b"}, OWN.format(licence="other"))
    text = card(a_recipe(tmp_path, str(source)), DEPTH, HEADLINES, {"seed": 0})
    found = header(text)
    assert found["base_model"] == "org/model-7b" and found["datasets"] == ["org/texts"]
    assert (found["license"], found["license_name"]) == ("other", "gemma") and "tags" in found
    assert ModelCard(text).data.to_dict()["library_name"] == "transformers"
    assert "version of `org/model-7b`" in text


def test_no_folder_of_the_machine_is_told(tmp_path):
    source = model_folder(tmp_path / "secret" / "dense")
    text = card(a_recipe(tmp_path, str(source)), DEPTH, HEADLINES, {"seed": 0})
    assert str(tmp_path) not in text and "secret" not in text and "/elsewhere" not in text
    for name in ("source: dense", "data: text.jsonl", "prompts: prompts.jsonl", "source: given.jsonl", "- sums.yaml"):
        assert name in text, name
    assert "embedded:facts" in text and "version of `dense`" in text and "base_model" not in header(text)
    assert str(tmp_path) not in plain_card("mine", DEPTH, str(source))


@pytest.mark.parametrize(
    ("folder", "config", "own_card", "expected"),
    [
        ("a", {}, "", {"license": "unknown"}),
        ("a", {}, OWN.format(licence="mit"), {"base_model": "org/base", "license": "mit", "license_name": "gemma"}),
        ("hub/models--org--some-7b/snapshots/0a1b", {}, "", {"base_model": "org/some-7b", "license": "unknown"}),
        ("a", {"_name_or_path": "/home/me/org/model"}, "", {"license": "unknown"}),
        ("a", {"_name_or_path": "./model"}, "---\nlicense: [mit\n---", {"license": "unknown"}),
        ("a", {"_name_or_path": 7}, "---\n- a list\n---", {"license": "unknown"}),
        (
            "a",
            {},
            '---\nlicense: "mit\\n---\\n# theirs"\nlicense_name: a\n---',
            {"license": "unknown", "license_name": "a"},
        ),
        ("a", {}, '---\nlicense: "<b>"\nlicense_link: "javascript:alert(1)"\n---', {"license": "unknown"}),
        ("a", {}, f"---\nlicense: {'a' * 60_000}\n---", {"license": "unknown"}),
    ],
)
def test_what_the_dense_folder_says_of_itself(tmp_path, folder, config, own_card, expected):
    source = model_folder(tmp_path / folder, config, own_card)
    assert origin(recipe.Model(source=str(source))) == expected
    assert origin(recipe.Model(source="embedded:fable-2m")) == {"license": "apache-2.0"}


def test_the_name_of_a_folder_stays_a_name_in_markdown(tmp_path):
    source = model_folder(tmp_path / "dense`](x)<img src=x>\n# more")
    for text in (card(a_recipe(tmp_path, str(source)), DEPTH, HEADLINES, {}), plain_card("mine", DEPTH, str(source))):
        assert "`](x)" not in text.partition("## Recipe")[0] and "\n# more" not in text
    assert "version of `dense'](x)<img src=x> # more`." in card(a_recipe(tmp_path, str(source)), DEPTH, HEADLINES, {})


def test_a_masked_model_says_what_a_merge_does_to_its_zeros(tmp_path):
    source = str(model_folder(tmp_path / "dense"))
    said = "a LoRA adapter that is trained on this model and merged with stock tools fills them"
    whole = a_recipe(tmp_path, source)
    assert said in card(whole, MASKS, HEADLINES, {}) and said not in card(whole, DEPTH, HEADLINES, {})
    assert said in plain_card("mine", MASKS, source) and said not in plain_card("mine", DEPTH)
    assert header(plain_card("mine", DEPTH))["license"] == "unknown"
