"""What a direction cannot do is refused in one sentence, in the configuration or at the first reduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from compression_plugins.config import Config
from compression_plugins.engine.plan import Bucket
from compression_plugins.errors import CompressionError, ConfigError, UnsupportedError
from compression_plugins.optimizer.directions import KINDS
from compression_plugins.optimizer.plain import check_plain

from ..world import config
from .directions import EVERY, SETTINGS, SHARED, WARM, worlds


@pytest.mark.parametrize("kind", EVERY)
def test_two_gradients_in_one_step_are_refused(kind: str) -> None:
    world = worlds("ef_signsgd", kind, 1)
    world.reduce(world.gradients(0))
    with pytest.raises(UnsupportedError, match="one gradient per step.*ZeRO stage 0 or 1"):
        world.reduce(world.gradients(1))


@pytest.mark.parametrize("kind", SHARED)
def test_shards_are_refused_where_every_rank_needs_the_whole_average(kind: str) -> None:
    world = worlds("ef_signsgd", kind, 2)
    with pytest.raises(UnsupportedError, match=f"{kind} needs the whole average.*direction: gradient"):
        world.reduce(world.gradients(0), shards=[world.bucket.numel, 0])


def test_a_variance_that_was_never_measured_is_refused() -> None:
    """A resume without the state of the warm-up, or a parameter that begins to learn after it."""
    world = worlds("ef_signsgd", "frozen_adam", 2)
    for reducer in world.reducers:
        reducer.step = WARM
    with pytest.raises(UnsupportedError, match="variance of 'second.weight' is not known at step 3"):
        world.step(world.gradients(0))


def test_a_bucket_of_another_direction_is_refused() -> None:
    world = worlds("ef_signsgd", "momentum", 2)
    (bucket,) = world.plan.buckets
    with pytest.raises(CompressionError, match="direction 'gradient' is not one of the configuration's, 'momentum'"):
        world.reducers[0].start(Bucket(bucket.scheme, bucket.segments), torch.zeros(bucket.numel))


BAD: list[tuple[Mapping[str, Any], str]] = [
    ({"direction": "momentm"}, r"unknown direction 'momentm'; did you mean 'momentum'\?"),
    ({"direction": {"kind": "adm"}}, r"unknown direction 'adm'; did you mean 'adam'\?"),
    ({"direction": {"kind": "adam", "beta": 1}}, r"unknown key 'beta' for direction 'adam'; did you mean 'betas'\?"),
    ({"direction": {"kind": "adam", "betas": [0.9, 1.0]}}, r"direction 'adam': betas.1 = 1.0: .*less than 1"),
    ({"direction": {"momentum": 0.9}}, r"a word or a mapping with a text 'kind', .*valid: gradient, momentum, adam"),
    ({"direction": 3}, r"not 3; valid: gradient"),
    ({"direction": "frozen_adam"}, r"needs a dense warm-up; set warmup_steps to some 15 percent of the steps"),
    (
        {"direction": {"kind": "zero_one_adam", "refresh": 0}},
        r"refresh = 0: .*greater than or equal to 1, or be 'growing'",
    ),
    ({"scheme": "marsit", "momentum": 0.9}, r"unknown key 'momentum' for scheme 'marsit'"),
]


@pytest.mark.parametrize(("keys", "message"), BAD)
def test_a_mistake_is_one_line_that_names_the_nearest_valid_choice(keys: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Config.load({"scheme": "topk", **keys})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [*EVERY, "gradient"])
def test_a_configuration_with_a_direction_goes_through_a_dictionary(kind: str) -> None:
    cfg = config("topk", **SETTINGS.get(kind, {"direction": kind}))
    assert cfg == Config.load(cfg.to_dict()) and cfg.digest() == Config.load(cfg.to_dict()).digest()
    assert isinstance(cfg.direction, KINDS[kind]) and hash(cfg.direction) is not None
    others = {config("topk", warmup_steps=3, direction=k).digest() for k in KINDS}
    assert len(others) == len(KINDS)


def test_an_optimizer_with_moments_of_its_own_is_refused() -> None:
    w = [torch.zeros(3, requires_grad=True)]
    for plain in (torch.optim.SGD(w, lr=0.1), torch.optim.SGD(w, lr=0.1, weight_decay=0.1)):
        check_plain(plain, "here")
    late = torch.optim.SGD(w, lr=0.1)
    late.param_groups[0]["momentum"] = 0.85  # as OneCycleLR does
    for other, why in (
        (torch.optim.SGD(w, lr=0.1, momentum=0.9), "SGD has momentum 0.9"),
        (late, "SGD has momentum 0.85"),
        (torch.optim.Adam(w), "Adam is another optimizer"),
        (torch.optim.RMSprop(w), "RMSprop is another optimizer"),
    ):
        with pytest.raises(UnsupportedError, match=rf"here .* plain SGD, but .*{why}: use torch.optim.SGD\(lr="):
            check_plain(other, "here")
