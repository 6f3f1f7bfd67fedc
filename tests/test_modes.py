"""Walks through modules that are quicker than torch's find the same modules and set the same flags."""

from torch import nn

from recover.models.twin import modules_below, plain_modes, set_training


def shared_tree() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    return nn.Sequential(inner, inner, nn.ModuleDict({"a": inner[0], "b": nn.LayerNorm(2)}))


def test_the_same_modules_each_once() -> None:
    tree = shared_tree()
    tree.register_module("nothing", None)
    found = modules_below(tree)
    assert len(found) == len(set(found)) and set(found) == set(tree.modules())


def test_flags_are_those_of_train() -> None:
    ours, theirs = shared_tree(), shared_tree()
    for mode in (False, True, False):
        set_training(modules_below(ours), mode)
        theirs.train(mode)
        assert [each.training for each in ours.modules()] == [each.training for each in theirs.modules()]


def test_a_module_with_a_train_of_its_own_is_found() -> None:
    class Own(nn.Linear):
        def train(self, mode: bool = True) -> "Own":
            return self

    assert plain_modes(shared_tree()) and not plain_modes(nn.Sequential(Own(2, 2)))
