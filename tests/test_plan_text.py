"""What was pruned, in the report's words and picture: sublayers and widths beside blocks and masks."""

import pytest

from recover.report import words
from recover.report.figures.plan import pruned

SUBLAYERS = {
    "kind": "depth",
    "blocks": 8,
    "dropped": [3],
    "dropped_attention": [5, 6],
    "dropped_mlp": [2],
    "modules": {},
}
WIDTH = {
    "kind": "width",
    "blocks": 8,
    "dropped": [],
    "config": {"intermediate_size": 1152},
    "sparsity": 0,
    "modules": {},
}


@pytest.mark.parametrize(
    ("plan", "subject", "sites"),
    [
        (None, "Pruning", None),
        (
            SUBLAYERS,
            "Dropping 1 of 8 blocks and 2 of 8 attentions and 1 of 8 MLPs",
            "blocks 3; attention of 5, 6; MLP of 2",
        ),
        (WIDTH, "Narrowing every block (intermediate_size 1,152)", ""),
        ({"kind": "depth", "blocks": 8, "dropped": [3, 4]}, "Dropping 2 of 8 blocks", "blocks 3, 4"),
    ],
)
def test_words(plan, subject, sites):
    assert words.plan_subject(plan) == subject
    assert plan is None or words.plan_sites(plan) == sites


def test_each_half_of_a_block_is_shown_by_itself():
    scores = [
        {"round": 1, "blocks": [block], "parts": [part], "score": 0.1 * block + (part == "mlp"), "chosen": block == 5}
        for block in range(1, 8)
        for part in ("attention", "mlp")
    ]
    figure = pruned({"plan": {**SUBLAYERS, "scores": scores}})
    picture = figure.draw(800.0)
    assert figure.title == "Which sublayers of 8 blocks were dropped"
    for tip in (
        "block 3: dropped",
        "block 5, attention: dropped",
        "block 5, mlp: kept",
        "block 2, mlp: dropped",
        "block 7: kept",
    ):
        assert tip in picture
    fates = {row[0]: row[1] for row in figure.rows}
    assert fates[3] == "dropped" and fates[2] == "MLP dropped" and fates[5].startswith("attention dropped")
    assert [row[2] for row in figure.rows][1:4] == ["0.1", "0.2", "0.3"]  # the cheaper half of each block


def test_a_repair_is_said_with_what_it_brought():
    kept = {"kind": "linear", "kept": True, "kl_before": 0.341, "kl_after": 0.217}
    assert words.plan_repair({"repair": kept}) == "linear, KL 0.341 → 0.217 on held-out text, before training"
    assert words.plan_repair({"repair": {**kept, "kept": False}}) == "linear was tried and left out"
    assert words.plan_repair({"repair": {}}) == words.plan_repair({}) == ""


def test_a_width_plan_is_said_in_words():
    assert "intermediate_size 1,152" in pruned({"plan": WIDTH}).see
