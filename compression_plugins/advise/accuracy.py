"""How far a scheme's update is from the gradient: a number that keeps speed alone from choosing."""

from __future__ import annotations

import torch

from ..bench.ranks import Ranks
from ..config import Config
from ..core.call import Segment
from ..engine.plan import Bucket
from ..schemes.base import Scheme

_SHAPE = (128, 256)
_STEPS = 10
_RANKS = 2
#: Above it a scheme is shown and never recommended: most of the gradient has not arrived after ten steps, or what did
#: has a scale or a variance of its own, for which the learning rate must be chosen anew.
LIMIT = 0.85


def update_error(scheme: Scheme) -> float:
    """||u - g||^2 / ||g||^2: u is the mean of ten updates for one and the same gradient, g its mean over ranks.

    The gradient is synthetic: of low rank with heavy tails, plus a tenth of noise a rank, as gradients of networks tend
    to be. Error feedback and unbiased rounding make this error small, however few bits a single update has.
    """
    generator = torch.Generator().manual_seed(0)

    def heavy(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator)
        return x * x.abs() ** 2

    common = sum(heavy(_SHAPE[0], 1) @ heavy(1, _SHAPE[1]) / (k + 1) for k in range(4))
    assert isinstance(common, torch.Tensor)
    common = common.flatten() / common.square().mean().sqrt()
    gradients = [common + 0.3 * torch.randn(common.shape, generator=generator) for _ in range(_RANKS)]
    target = torch.stack(gradients).mean(0)

    bucket = Bucket(scheme, (Segment("sample", 0, common.numel(), _SHAPE),))
    config = Config.load({"scheme": scheme.name, **scheme.model_dump()})
    ranks = Ranks(config, _RANKS)
    total = torch.zeros_like(target)
    for _ in range(_STEPS):
        total += ranks.average([bucket], [[g.clone()] for g in gradients])[0] / _STEPS
        ranks.end_step()
    return float((total - target).square().sum() / target.square().sum())
