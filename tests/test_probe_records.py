"""Records of a probe are read with the types that wrote them."""

import dataclasses
import json

import pytest
from report_probes import records, spread
from tiny import tiny
from twins import masked_twin

from recover.base import artifacts
from recover.base.errors import ArtifactError
from recover.config.recipe import Probe
from recover.probe.probe import probe
from recover.probe.records import KINDS, Block, Final, Routing, record_of, summary


class NoTokenizer:
    chat_template = eos_token_id = None


def test_every_record_of_a_probe_is_read_as_it_was_written():
    twin = masked_twin(tiny())
    cfg = Probe(samples=3, steps=4, batch_size=2, seeds=(0,), temperatures=(1.0, 0.5))
    written = [*probe(twin, NoTokenizer(), [[5, 6, 7], [8], [9, 10]], cfg), *records(), Routing(0, [3, 1], [])]
    assert {record.probe for record in written} == set(KINDS)
    lines = [artifacts.dumps(record.to_json()) for record in written]
    read = [record_of(json.loads(line)) for line in lines]
    assert [type(record) for record in read] == [type(record) for record in written]
    assert [artifacts.dumps(record.to_json()) for record in read] == lines
    assert artifacts.dumps(summary(read)) == artifacts.dumps(summary(written))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": "blok"}, "probe 'blok': expected one of final, block, "),
        ({"kl": {"mean": "much"}}, "probe 'block': kl.mean: .*found 'much'"),
        ({"lens": None}, "probe 'block': lens: .*found None: probe again"),
    ],
)
def test_what_is_no_record_is_refused_by_its_field(change, message):
    good = Block(1, False, "raw", *([spread(0.1)] * 4)).to_json()
    assert dataclasses.asdict(record_of(good))["kl"] == spread(0.1)
    with pytest.raises(ArtifactError, match=message):
        record_of(good | change)


def test_metrics_of_the_last_layer_stand_beside_the_other_fields():
    final = Final(1.0, 2, 9, {"kl": spread(0.5), "top1": spread(0.9)})
    assert set(final.to_json()) == {"probe", "temperature", "prompts", "positions", "kl", "top1"}
    assert record_of(final.to_json()) == final
