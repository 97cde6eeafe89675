"""What Horovod promises its users holds when gradients are compressed; `scripts/semantics.py` makes the checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def two(horovodrun: Callable[..., Any]) -> list[dict[str, Any]]:
    return horovodrun(script="semantics.py", timeout=280).results


@pytest.fixture(scope="module")
def three(horovodrun: Callable[..., Any]) -> list[dict[str, Any]]:
    return horovodrun(script="process_sets.py", np=3, timeout=280, HOROVOD_DYNAMIC_PROCESS_SETS="1").results


def same(ranks: list[dict[str, Any]], name: str) -> Any:
    """What all ranks found alike."""
    assert all(rank[name] == ranks[0][name] for rank in ranks), [rank[name] for rank in ranks]
    return ranks[0][name]


def test_keeping_every_value_equals_dense_with_accumulation_and_clipping(two: list[dict[str, Any]]) -> None:
    found = same(two, "keeping_everything_equals_dense")
    assert len(found) == 4 and max(found.values()) <= 1e-6, found


def test_op_sum_equals_dense_mean(two: list[dict[str, Any]]) -> None:
    assert same(two, "sum_equals_dense_mean") <= 1e-6


def test_gradients_that_are_zeroed_in_place_equal_dense(two: list[dict[str, Any]]) -> None:
    assert same(two, "gradients_that_are_zeroed_in_place_equal_dense") <= 1e-6


def test_groups_give_way_to_buckets_with_the_same_result(two: list[dict[str, Any]]) -> None:
    assert max(same(two, "groups_are_replaced_by_buckets")) <= 1e-6


def test_other_dtypes_are_reduced_in_fp32_and_cast_back(two: list[dict[str, Any]]) -> None:
    found = same(two, "other_dtypes")
    assert len(found) == 6 and all(all(checks) for checks in found.values()), found
    assert same(two, "half_precision_equals_dense_within_its_rounding") <= 1e-3


def test_every_scheme_keeps_replicas_identical_and_sends_less(two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = dict(rank["every_scheme_keeps_replicas_identical"])
        dense = found.pop("dense")[2]
        assert len(found) >= 13
        for name, (identical, finite, sent) in found.items():
            assert identical and finite, name
            assert (sent is None) == (name == "none"), name
            assert sent is None or sent < 0.6 * dense, (name, sent, dense)


def test_gradients_missing_on_some_ranks_neither_hang_nor_diverge(two: list[dict[str, Any]]) -> None:
    found = same(two, "missing_gradients_differ_by_rank")
    assert found.pop("topk=dense") <= 1e-6
    assert len(found) == 5 and all(found.values()), found


def test_sparse_gradients(two: list[dict[str, Any]]) -> None:
    found = same(two, "sparse_gradients")
    assert found["as dense"] <= 1e-6 and found["as they are"] <= 1e-6 and found["compressed"]


def test_two_optimizers_with_equal_names_may_be_in_flight(two: list[dict[str, Any]]) -> None:
    assert same(two, "two_optimizers_in_flight") <= 1e-6


def test_buckets_travel_during_backward(two: list[dict[str, Any]]) -> None:
    first, second, buckets = same(two, "communication_overlaps_backward")
    assert first == 0 and second == buckets >= 3


def test_loading_optimizer_state_drops_what_is_in_flight(two: list[dict[str, Any]]) -> None:
    assert same(two, "loading_optimizer_state_drops_what_is_in_flight") is True


def test_a_resumed_memory_continues_bit_for_bit(two: list[dict[str, Any]]) -> None:
    assert same(two, "resumed_memory_continues_bit_for_bit") == [True] * 4


def test_a_nan_reaches_every_rank_and_the_next_step_is_healthy(two: list[dict[str, Any]]) -> None:
    found = same(two, "a_nan_reaches_every_rank_and_the_next_step_is_healthy")
    assert len(found) == 6 and all(seen == [True, False, True] for seen in found.values()), found


def test_gradients_are_computed_at_quantized_weights(two: list[dict[str, Any]]) -> None:
    *seen, outside, identical = same(two, "quantized_weights_compute_but_the_optimizer_keeps_exact_ones")
    assert seen == [False, False, True, True], "the second forward pass takes the snapshot"
    assert identical and not outside


def test_a_scheme_is_a_horovod_compressor(two: list[dict[str, Any]]) -> None:
    assert same(two, "compressor_is_a_horovod_compressor") == [True] * 4


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("plain_allreduce_is_refused", "pass it to hvd.DistributedOptimizer(compression=...)"),
        ("adasum_is_refused", "use op=hvd.Average or hvd.Sum"),
        ("minimum_is_refused", "takes op=hvd.Average or hvd.Sum only"),
        ("predivide_is_refused", "gradient_predivide_factor"),
        ("complex_parameters_are_refused", "complex64"),
        ("a_rule_without_a_match_is_refused", "'embed*' matches none"),
        ("join_is_refused_unless_all_is_sums", "hvd.join() a rank can only add zeros"),
        (
            "configurations_that_differ_are_named",
            "rank 1 differs from rank 0 in config.ratio (10.0 on rank 0, 20.0 there)",
        ),
        ("tensors_that_differ_are_named", "rank 1 differs from rank 0 in tensor 0.bias"),
        (
            "states_of_different_steps_are_refused",
            "rank 1 differs from rank 0 in compression state ('none' on rank 0, 'of step 1",
        ),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank_with_the_reason(
    two: list[dict[str, Any]], name: str, sentence: str
) -> None:
    assert sentence in str(same(two, name))


def test_process_sets_train_by_themselves(three: list[dict[str, Any]]) -> None:
    assert max(rank["a_process_set_equals_dense"] for rank in three) <= 1e-6
    expected = {"scalecom": True, "qsgd": True, "marsit": True}
    assert [rank["a_process_set_keeps_its_replicas_identical"] for rank in three] == [expected, None, expected]


def test_three_ranks(three: list[dict[str, Any]]) -> None:
    assert same(three, "three_ranks_equal_dense") <= 1e-6
    found = same(three, "three_ranks_stay_identical")
    assert len(found) == 8 and all(found.values()), found


def test_rings_and_tori_keep_the_ranks_identical(three: list[dict[str, Any]]) -> None:
    found = same(three, "what_goes_hop_by_hop_stays_identical")
    assert len(found) == 4 and all(found.values()), found


def test_a_torus_that_the_ranks_do_not_fill_is_refused_when_the_optimizer_is_built(three: list[dict[str, Any]]) -> None:
    assert "rows: 2 cannot be made of 3 ranks" in same(three, "a_torus_of_two_rows")


def test_ranks_that_leave_early_join_a_sum_and_count_its_steps(three: list[dict[str, Any]]) -> None:
    assert same(three, "ranks_that_leave_early_join_a_sum") == [4]


def test_the_transport_keeps_its_contract(three: list[dict[str, Any]]) -> None:
    found = same(three, "transport_contract")
    assert len(found) == 11 and all(found.values()), found
    inside = [rank["transport_contract_in_a_process_set"] for rank in three]
    assert inside == [found, None, found], inside
    groups = [rank["transport_contract_in_a_group"] for rank in three]
    assert [group.pop("place") for group in groups] == [[0, 2], [1, 2], [0, 1]]
    assert groups == [found] * 3, groups
