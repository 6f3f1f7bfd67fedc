"""YAML as people write it: what looks like a number, text or null is that, and what is dumped is read back."""

import math
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recover.config import yaml_values


def test_yaml_reads_what_people_mean() -> None:
    text = "a: 1e-3\nb: 2:4\nc: no\nd: 010\ne: 1_000\nf: 1.\ng: 2024-01-01\nh: ~\ni: .inf\nj: true\nk: -2.5E+3"
    assert yaml_values.load(text, "here") == {
        "a": 1e-3, "b": "2:4", "c": "no", "d": 10, "e": 1000, "f": 1.0,
        "g": "2024-01-01", "h": None, "i": math.inf, "j": True, "k": -2500.0,
    }  # fmt: skip


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(), child, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(plain)
@example({"revision": "1234e567"})
@example("2:4")
@example("0x1F")
@example("<<")
def test_dumped_yaml_is_read_back_by_us_and_text_stays_text_for_yaml_1_1_readers(value: Any) -> None:
    text = yaml_values.dump(value)
    assert yaml_values.load(text, "here") == value
    if isinstance(value, str):
        assert yaml.safe_load(text) == value
