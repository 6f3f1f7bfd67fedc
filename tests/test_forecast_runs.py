"""Calibration runs: rows of the package are runs that were made, and a run directory is read as it should be."""

import json

import pytest
from forecast_runs import QUICKSTART, run_folder, several

from recover.base import artifacts
from recover.base.errors import ArtifactError
from recover.config.recipe import load_recipe
from recover.forecast import advice, told
from recover.forecast.known import known_runs, write_runs
from recover.forecast.runs import from_json, making, model_name, read_run


def test_rows_of_the_package_are_runs_that_were_made():
    runs = known_runs()
    assert len({run.name for run in runs}) == len(runs) >= advice.RUNS
    for run in runs:
        assert run.before.tokens == 0 and run.after.tokens == run.tokens > 0
        tokens = [state.tokens for state in run.on_the_way]
        assert tokens == sorted(set(tokens)) and tokens[0] > 0 and tokens[-1] < run.tokens
        for state in (run.before, *run.on_the_way, run.after):
            assert 0 < state.kl < 20 and {"generation", "choice", "perplexity"} <= set(state.shares)
            assert all(0 <= share <= 1.6 for share in state.shares.values())
        assert run.parameters > 0 and run.command and " /" not in run.command and '"/' not in run.command
        assert run.prune["kind"] and abs(run.settings["tokens"] / run.tokens - 1) < 0.1
        assert from_json(json.loads(json.dumps(run.to_json()))) == run


def test_a_file_of_runs_is_read_as_it_was_written(tmp_path):
    write_runs(several(3), tmp_path / "runs.json")
    assert [run.name for run in known_runs(tmp_path / "runs.json")] == ["run-0", "run-1", "run-2"]
    row = several(1)[0].to_json() | {"unheard": 1}
    (tmp_path / "odd.json").write_text(json.dumps({"runs": [row]}))
    with pytest.raises(ArtifactError, match="unheard"):
        known_runs(tmp_path / "odd.json")


def test_a_run_directory_is_read_as_shares_of_dense_above_chance(tmp_path):
    run = read_run(run_folder(tmp_path))
    assert (run.model, run.parameters, run.tokens) == ("fable-2m", 1234, 10_000)
    states = [(state.tokens, state.kl, state.shares) for state in (run.before, *run.on_the_way, run.after)]
    kept = ((0.2, 0.5, 0.25), (0.6, 0.8, 0.5), (0.8, 1, 0.8))
    shares = [dict(zip(("generation", "choice", "perplexity"), row, strict=True)) for row in kept]
    expected = zip((0, 5000, 10_000), (1.5, 0.5, 0.25), map(pytest.approx, shares), strict=True)
    assert states == list(expected)
    assert (run.command, run.revision) == ("recover run recipes/x.yaml", "abc")
    assert run.made() == making(load_recipe(QUICKSTART).model_dump(mode="json"))
    assert run.items == {"generation": 100, "choice": 80}


def test_items_that_are_easier_than_the_rest_do_not_flatter_an_epoch(tmp_path):
    """The kept model had 1.25 times the share of texts on the first items that it has on all, and 1.2 of choices."""
    run = read_run(run_folder(tmp_path, last=(0.5, 0.8, 12.5)))
    expected = {"generation": 0.6 / 1.25, "choice": 0.8 / 1.2, "perplexity": 0.5}
    assert [state.shares for state in run.on_the_way] == [pytest.approx(expected)]
    assert run.after.shares == pytest.approx({"generation": 0.8, "choice": 1, "perplexity": 0.8})


def test_an_epoch_that_was_kept_has_on_the_way_what_it_has_at_the_end(tmp_path):
    """Epoch 1 is the better one here, and so what was shipped, whatever its items said."""
    run = read_run(run_folder(tmp_path, last=(0.2, 0.5, 30.0)))
    assert run.on_the_way[0].shares == pytest.approx(run.after.shares)


def test_a_share_of_nothing_on_the_first_items_says_nothing_of_them(tmp_path):
    nothing = read_run(run_folder(tmp_path, last=(0.9, 0.2, 12.5)))
    assert nothing.on_the_way[0].shares["choice"] == pytest.approx(0.8)


def test_names_of_models_do_not_hang_on_where_they_lie():
    names = ("embedded:a-b", "ORG/a-b", "/some/where/a-b.Q4_1.gguf", "a-b.f16.gguf", "../x/a-b.BF16.gguf")
    assert {model_name(name) for name in names} == {"a-b"}
    assert model_name("Qwen/Qwen2.5-7B") == "Qwen2.5-7B"


def test_what_came_is_held_against_the_forecast_of_the_same_recipe_only(tmp_path, capsys):
    root = run_folder(tmp_path)
    recipe = load_recipe(QUICKSTART).model_dump(mode="json")
    classes = {
        "generation": {"expected": 0.7, "interval": [0.5, 0.9]},
        "choice": {"expected": 0.7, "interval": [0.6, 0.8]},
    }
    written = {"classes": classes, "tokens": 10_000, "recipe": {"prune": recipe["prune"]}}
    told.compare_outcome(root, recipe)  # no forecast was made
    artifacts.write_json(root / "forecast.json", written)
    told.compare_outcome(root, recipe)
    outcome = artifacts.read_json(root / "forecast.json")["outcome"]
    assert outcome["generation"] == {"kept": pytest.approx(0.8), "held": True}
    assert outcome["choice"] == {"kept": pytest.approx(1.0), "held": False}
    artifacts.write_json(root / "forecast.json", written)
    told.compare_outcome(root, {**recipe, "prune": {}})
    assert "of another recipe" in capsys.readouterr().out
    assert "outcome" not in artifacts.read_json(root / "forecast.json")
