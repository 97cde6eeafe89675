"""Small standard tasks that experiments share: a CNN on images, an LSTM and a transformer on characters.

The characters are those of `pydoc_data.topics`, the help texts inside Python's standard library: some 465,000 of them,
and a little different in every release of Python, so that figures of one release are compared with each other only.
Source code of the same library is text of another kind, for what a trained model learns next.
"""

from __future__ import annotations

import math
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch.task import Digits, batches, load_digits

from .fashion import load_fashion

#: Characters that a model of text sees at once.
CONTEXT = 32
#: Modules of the standard library that are one file in every release.
_MODULES = ("argparse", "ast", "configparser", "dataclasses", "difflib", "inspect", "tarfile")


def vocabulary() -> int:
    """Number of different characters in the help texts."""
    return len(_numbers())


@cache
def help_texts() -> tuple[Tensor, Tensor]:
    """(training characters, held-out characters): int64, numbered by the order of their code points."""
    return _parted(_help_texts())


@cache
def source_code() -> tuple[Tensor, Tensor]:
    """The same of source code, without characters that the help texts do not have."""
    library = Path(sysconfig.get_path("stdlib"))
    return _parted("".join((library / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES))


def _help_texts() -> str:
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


@cache
def _numbers() -> dict[str, int]:
    return {character: i for i, character in enumerate(sorted(set(_help_texts())))}


def _parted(text: str) -> tuple[Tensor, Tensor]:
    """The last tenth is held out."""
    numbers = torch.tensor([_numbers()[character] for character in text if character in _numbers()])
    return numbers[: len(numbers) * 9 // 10], numbers[len(numbers) * 9 // 10 :]


class Batch(NamedTuple):
    """Images fp32 [n, 784] and labels int64 [n], or characters int64 [n, CONTEXT] and the next ones, same shape."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task(ABC):
    """What to train, on what, and with which optimizer; the optimizer is tuned for dense averaging.

    Attributes:
        build: makes the network; `model` seeds it.
        optimizer: made for a model's parameters.
        batch: samples per rank and step.
        unit: of the figure of merit.
        better: 1 where more is better, -1 where less is.
    """

    unit: ClassVar[str]
    better: ClassVar[int]

    name: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    batch: int

    def model(self, seed: int) -> nn.Module:
        """The network, with its first weights drawn from `seed`; the global generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    @abstractmethod
    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[Batch]:
        """Endless batches of one rank; all ranks share out the same shuffle, which `seed` draws."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats, scalar."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> float:
        """The figure of merit, in `unit`, on data that training has not seen."""


@dataclass(frozen=True)
class Images(Task):
    """Classification; judged by the percentage of test images that are classified rightly."""

    data: Callable[[], tuple[Digits, Digits]]
    unit: ClassVar[str] = "test accuracy, %"
    better: ClassVar[int] = 1

    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[Batch]:
        train, _ = self.data()
        for images, labels in batches(train, self.batch, rank, ranks, seed):
            yield Batch(images, labels)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.inputs), batch.targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        _, test = self.data()
        guesses = torch.cat([model(images).argmax(1) for images in test.images.split(1000)])
        return 100 * float((guesses == test.labels).float().mean())


@dataclass(frozen=True)
class Characters(Task):
    """Prediction of the next character; judged by the cross-entropy on the last tenth of the text, in bits."""

    text: Callable[[], tuple[Tensor, Tensor]] = help_texts
    unit: ClassVar[str] = "bits a character"
    better: ClassVar[int] = -1

    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[Batch]:
        train, _ = self.text()
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(train) - CONTEXT, (ranks, self.batch), generator=generator)[rank]
            rows = train[starts[:, None] + torch.arange(CONTEXT + 1)]
            yield Batch(rows[:, :-1], rows[:, 1:])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        _, held = self.text()
        rows = held[: len(held) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        losses = [self.loss(model, Batch(part[:, :-1], part[:, 1:])) * len(part) for part in rows.split(100)]
        return float(sum(losses)) / len(rows) / math.log(2)


class CharLSTM(nn.Module):
    """A character model: one LSTM layer of 64 units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary(), 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, vocabulary())

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(characters))[0])


class CharTransformer(nn.Module):
    """Pre-norm decoder blocks."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary(), width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary())
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(characters) + self.position)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


def small_cnn() -> nn.Sequential:
    """Two convolutions of stride 2 and two linear layers; 105,866 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _momentum(lr: float) -> Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)


#: Learning rates: the best for dense training with n = 4 among 0.02, 0.05, 0.1 (CNN), 1, 2, 4 (LSTM; 4 is as good) and
#: 0.003, 0.005, 0.01 (transformer). Adam suits the transformer better than momentum, and the others no better.
FASHION_CNN = Images("CNN, Fashion-MNIST", small_cnn, _momentum(0.05), 8, cache(load_fashion))
DIGITS_CNN = Images("CNN, MNIST-5k", small_cnn, _momentum(0.05), 8, cache(load_digits))
LSTM = Characters("LSTM, characters", CharLSTM, _momentum(2.0), 4)
TRANSFORMER = Characters("transformer, characters", CharTransformer, partial(torch.optim.Adam, lr=0.005), 4)
LARGE_TRANSFORMER = Characters(
    "transformer of 1 M, characters", partial(CharTransformer, 144, 4, 4), partial(torch.optim.Adam, lr=0.002), 8
)
