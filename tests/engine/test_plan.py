"""Every tensor has one decision and one place; nothing is skipped without a reason in the table."""

from __future__ import annotations

from compression_plugins.config import Config
from compression_plugins.engine.plan import TensorSpec, make_plan, unmatched

SPECS = [
    TensorSpec("embed.weight", (1000, 64), "float32"),
    TensorSpec("block.norm.weight", (64,), "float32"),
    TensorSpec("block.weight", (64, 64), "bfloat16"),
    TensorSpec("block.tiny", (3, 3), "float32"),
    TensorSpec("head.weight", (10, 640), "float32"),
    TensorSpec("head.bias", (10,), "float32"),
]


def plan(**document: object):  # noqa: ANN201
    return make_plan(Config.load({"scheme": "scalecom", **document}), SPECS)


def reasons(**document: object) -> dict[str, tuple[str, str]]:
    return {row.name: (row.scheme.name, row.reason) for row in plan(**document).rows}


def test_small_one_dimensional_and_exempt_tensors_travel_as_they_are_and_say_why() -> None:
    assert reasons(exempt=["head*"], min_numel=10) == {
        "embed.weight": ("scalecom", ""),
        "block.norm.weight": ("none", "fewer than 2 dimensions"),
        "block.weight": ("scalecom", ""),
        "block.tiny": ("none", "below min_numel 10"),
        "head.weight": ("none", "exempt 'head*'"),
        "head.bias": ("none", "exempt 'head*'"),
    }


def test_the_first_rule_that_matches_wins_over_exemptions() -> None:
    rules = [
        {"match": "head.bias", "scheme": "qsgd"},
        {"match": "head*", "ratio": 5},
        {"match": "embed*", "scheme": "none"},
    ]
    decided = reasons(rules=rules, exempt=["head*"])
    assert decided["head.bias"] == ("qsgd", "")
    assert decided["head.weight"] == ("scalecom", "")
    assert decided["embed.weight"] == ("none", "rule 'embed*'")


def test_rules_and_exemptions_that_match_nothing_are_found_with_the_nearest_name() -> None:
    config = Config.load(
        {"scheme": "topk", "rules": [{"match": "embedd.weight", "scheme": "none"}], "exempt": ["head*", "tail*"]}
    )
    (rule, first), (pattern, second) = unmatched(config, [spec.name for spec in SPECS])
    assert (rule, pattern) == ("embedd.weight", "tail*")
    assert first == "rule 'embedd.weight' matches none of the 6 tensors; did you mean 'embed.weight'?"
    assert second.startswith("exempt pattern 'tail*' matches none of the 6 tensors")


def test_tensors_that_appear_later_get_buckets_of_their_own() -> None:
    config = Config.load("topk")
    early = make_plan(config, SPECS[:3])
    late = early.extended(make_plan(config, SPECS[3:]))
    assert late.buckets[-len(early.buckets) :] == early.buckets
    assert sorted(s.name for b in late.buckets for s in b.segments) == sorted(spec.name for spec in SPECS)
    assert [row.name for row in late.rows] == [spec.name for spec in SPECS]


def test_tensors_wider_than_the_kernels_travel_as_they_are_in_buckets_of_their_dtype() -> None:
    specs = [TensorSpec("wide", (64, 64), "float64"), TensorSpec("w", (64, 64), "float32")]
    wide, usual = sorted(make_plan(Config.load("topk"), specs).buckets, key=lambda bucket: bucket.dtype, reverse=True)
    assert (wide.dtype, wide.scheme.name, usual.dtype, usual.scheme.name) == ("float64", "none", "float32", "topk")
    assert wide.dense_bytes(2) == wide.wire_bytes(2) == 8 * 4096


def test_every_element_is_in_exactly_one_bucket_in_reverse_order() -> None:
    buckets = plan(rules=[{"match": "block.weight", "scheme": "qsgd"}]).buckets
    names = [s.name for b in buckets for s in b.segments]
    assert sorted(names) == sorted(spec.name for spec in SPECS)
    assert all(
        s.start == 0 and s.numel == spec.numel
        for b in buckets
        for s in b.segments
        for spec in SPECS
        if spec.name == s.name
    )
    places = {spec.name: i for i, spec in enumerate(SPECS)}
    for bucket in buckets:
        order = [places[s.name] for s in bucket.segments]
        assert order == sorted(order, reverse=True)
    last_filled = [min(places[s.name] for s in b.segments) for b in buckets]
    assert last_filled == sorted(last_filled, reverse=True), "buckets become full in this order during backward"


def test_buckets_hold_at_most_bucket_mb_unless_one_tensor_is_larger() -> None:
    buckets = plan(bucket_mb=0.02).buckets
    assert all(b.numel * 4 <= 0.02 * 2**20 or len(b.segments) == 1 for b in buckets)
    assert len(buckets) > 2


def test_automatic_buckets_are_a_quarter_of_the_gradients_from_2_to_25_mib() -> None:
    def largest(layers: int, side: int) -> float:
        specs = [TensorSpec(f"{i}", (side, side), "float32") for i in range(layers)]
        return max(bucket.numel for bucket in make_plan(Config.load("topk"), specs).buckets) * 4 / 2**20

    assert largest(16, 512) == 4  # of 16
    assert largest(4, 512) == 2  # of 4
    assert largest(400, 512) == 25  # of 400


def test_the_table_names_what_is_not_compressed_and_why() -> None:
    table = plan().table(2)
    assert "scalecom(ratio=100, beta=1.0, selection=chunk, values=fp32): 3 tensors" in table
    assert "none: 2 tensors, 74 values (below min_numel 1024" in table or "below min_numel 1024" in table
    assert "block.tiny" in table


def test_digest_depends_on_names_and_shapes() -> None:
    config = Config.load("scalecom")
    renamed = [SPECS[0]._replace(name="other"), *SPECS[1:]]
    assert (
        make_plan(config, SPECS).digest()
        == make_plan(config, list(SPECS)).digest()
        != make_plan(config, renamed).digest()
    )


def test_a_scheme_that_only_measures_says_so_in_the_table() -> None:
    specs = [TensorSpec("w", (64, 64), "float32")]
    assert "the model does not train" in make_plan(Config.load("fake"), specs).table(2)
    assert "the model does not train" not in make_plan(Config.load("topk"), specs).table(2)
