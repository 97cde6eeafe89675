"""Parameter shapes and floating-point work of well-known networks, from formulas; nothing is downloaded or built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..config import read_document
from ..engine.plan import TensorSpec
from ..errors import ConfigError, nearest

#: One parameter: its name, its shape, and the multiply-adds of the forward pass that use it, a sample.
_Entry = tuple[str, tuple[int, ...], float]
_FILE = TypeAdapter(
    dict[str, Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=8)]], config=ConfigDict(strict=True)
)
#: FLOPs of a forward and backward pass for each multiply-add of the forward pass: the product, and its two gradients.
_TRAIN = 6.0


@dataclass(frozen=True)
class Shapes:
    """The trainable tensors of a network.

    Attributes:
        name: of the network, or the path of the file.
        specs: the tensors in registration order, fp32.
        flops: FLOPs of a forward and backward pass a sample, for each tensor; None where only shapes are known. What
            has no weight of its own (attention scores) counts with the product that follows it.
        head_flops: the same of products with a tied weight: backward does them first, yet the gradient of that weight
            is complete only with its embedding, last.
        sample: what one sample is.
        batch: samples of one rank and step, where nobody says otherwise.
    """

    name: str
    specs: tuple[TensorSpec, ...]
    flops: tuple[float, ...] | None = None
    head_flops: float = 0.0
    sample: str = "sample"
    batch: int = 1

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.specs)

    @property
    def total_flops(self) -> float | None:
        """FLOPs of a forward and backward pass, a sample."""
        return None if self.flops is None else sum(self.flops) + self.head_flops


def names() -> list[str]:
    """The networks that need no file."""
    return sorted(_NETWORKS)


def load(source: str) -> Shapes:
    """A network by name, or a YAML file of `name: [sides]` lines in registration order.

    Raises:
        ConfigError: no such network or file, or a line that is no shape.
    """
    if source in _NETWORKS:
        return _NETWORKS[source]()
    path = Path(source)
    if path.suffix.lower() not in {".yaml", ".yml"} and not path.is_file():
        raise ConfigError(
            f"no shapes are called {source!r}{nearest(source, names())}, or a YAML file of `name: [sides]`"
        )
    document = read_document(path)
    try:
        sides = _FILE.validate_python(document)
    except ValidationError as error:
        detail = error.errors()[0]
        where = detail["loc"][0] if detail["loc"] else "the file"
        raise ConfigError(
            f"{path}: {where!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}; write `name: [sides]`"
        ) from None
    if not sides:
        raise ConfigError(f"{path} names no tensor; write `name: [sides]`")
    return Shapes(str(path), tuple(TensorSpec(name, tuple(shape), "float32") for name, shape in sides.items()))


def shapes(source: str) -> list[TensorSpec]:
    """The tensors of `load(source)`, in registration order."""
    return list(load(source).specs)


def flops(source: str) -> float | None:
    """FLOPs of one sample's forward and backward pass; None for a file of shapes."""
    return load(source).total_flops


def _network(name: str, entries: Iterator[_Entry], sample: str, batch: int, head: float = 0.0) -> Shapes:
    """`head`: multiply-adds of a tied output layer."""
    known = list(entries)
    work = [_TRAIN * macs for _, _, macs in known]
    first = next(i for i, flops in enumerate(work) if flops)
    if first == 0:  # the data need no gradient
        work[first] *= 2 / 3
    specs = tuple(TensorSpec(tensor, shape, "float32") for tensor, shape, _ in known)
    return Shapes(name, specs, tuple(work), _TRAIN * head, sample, batch)


def _mlp() -> Shapes:
    """The demonstration's perceptron, 784-2048-2048-10 (5.8 M)."""
    widths = (784, 2048, 2048, 10)

    def entries() -> Iterator[_Entry]:
        for i, (columns, rows) in enumerate(zip(widths, widths[1:])):
            yield f"{2 * i}.weight", (rows, columns), rows * columns
            yield f"{2 * i}.bias", (rows,), 0.0

    return _network("mlp", entries(), "image", 32)


def _resnet50() -> Shapes:
    """He et al., 2016, arXiv 1512.03385, with the stride in the 3x3 convolution, as torchvision has it (25.6 M)."""

    def convolution(conv: str, norm: str, out: int, into: int, kernel: int, side: int) -> Iterator[_Entry]:
        yield f"{conv}.weight", (out, into, kernel, kernel), out * into * kernel**2 * side**2
        yield f"{norm}.weight", (out,), 0.0
        yield f"{norm}.bias", (out,), 0.0

    def entries() -> Iterator[_Entry]:
        yield from convolution("conv1", "bn1", 64, 3, 7, 112)
        into, side = 64, 56
        for layer, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
            for block in range(blocks):
                prefix = f"layer{layer}.{block}."
                before = side
                if block == 0 and layer > 1:
                    side //= 2
                yield from convolution(f"{prefix}conv1", f"{prefix}bn1", width, into, 1, before)
                yield from convolution(f"{prefix}conv2", f"{prefix}bn2", width, width, 3, side)
                yield from convolution(f"{prefix}conv3", f"{prefix}bn3", 4 * width, width, 1, side)
                if block == 0:
                    yield from convolution(f"{prefix}downsample.0", f"{prefix}downsample.1", 4 * width, into, 1, side)
                into = 4 * width
        yield "fc.weight", (1000, into), 1000 * into
        yield "fc.bias", (1000,), 0.0

    return _network("resnet50", entries(), "image of 224 x 224", 64)


def _linear(
    name: str, into: int, out: int, tokens: int, transposed: bool = False, extra: float = 0
) -> Iterator[_Entry]:
    """`transposed`: stored [into, out], as GPT-2's. `extra`: multiply-adds besides those of the weight."""
    yield f"{name}.weight", (into, out) if transposed else (out, into), tokens * into * out + extra
    yield f"{name}.bias", (out,), 0.0


def _norm(name: str, width: int) -> Iterator[_Entry]:
    yield f"{name}.weight", (width,), 0.0
    yield f"{name}.bias", (width,), 0.0


def _bert_large() -> Shapes:
    """Devlin et al., 2019, arXiv 1810.04805, with both pre-training heads, the word one tied (336 M)."""
    width, layers, tokens, words = 1024, 24, 512, 30522

    def entries() -> Iterator[_Entry]:
        for table, rows in (("word", words), ("position", 512), ("token_type", 2)):
            yield f"bert.embeddings.{table}_embeddings.weight", (rows, width), 0.0
        yield from _norm("bert.embeddings.LayerNorm", width)
        for layer in range(layers):
            prefix = f"bert.encoder.layer.{layer}."
            for part in ("query", "key", "value"):
                yield from _linear(f"{prefix}attention.self.{part}", width, width, tokens)
            scores = 2 * tokens**2 * width
            yield from _linear(f"{prefix}attention.output.dense", width, width, tokens, extra=scores)
            yield from _norm(f"{prefix}attention.output.LayerNorm", width)
            yield from _linear(f"{prefix}intermediate.dense", width, 4 * width, tokens)
            yield from _linear(f"{prefix}output.dense", 4 * width, width, tokens)
            yield from _norm(f"{prefix}output.LayerNorm", width)
        yield from _linear("bert.pooler.dense", width, width, 1)
        yield "cls.predictions.bias", (words,), 0.0
        yield from _linear("cls.predictions.transform.dense", width, width, tokens)
        yield from _norm("cls.predictions.transform.LayerNorm", width)
        yield from _linear("cls.seq_relationship", width, 2, 1)

    return _network("bert-large", entries(), f"sequence of {tokens} tokens", 8, head=tokens * width * words)


def _gpt2() -> Shapes:
    """Radford et al., 2019, the small model, head tied to the embedding (124 M)."""
    width, layers, tokens, words = 768, 12, 1024, 50257

    def entries() -> Iterator[_Entry]:
        yield "transformer.wte.weight", (words, width), 0.0
        yield "transformer.wpe.weight", (tokens, width), 0.0
        for layer in range(layers):
            prefix = f"transformer.h.{layer}."
            yield from _norm(f"{prefix}ln_1", width)
            yield from _linear(f"{prefix}attn.c_attn", width, 3 * width, tokens, transposed=True)
            scores = 2 * tokens**2 * width
            yield from _linear(f"{prefix}attn.c_proj", width, width, tokens, transposed=True, extra=scores)
            yield from _norm(f"{prefix}ln_2", width)
            yield from _linear(f"{prefix}mlp.c_fc", width, 4 * width, tokens, transposed=True)
            yield from _linear(f"{prefix}mlp.c_proj", 4 * width, width, tokens, transposed=True)
        yield from _norm("transformer.ln_f", width)

    return _network("gpt2", entries(), f"sequence of {tokens} tokens", 8, head=tokens * width * words)


_NETWORKS: dict[str, Callable[[], Shapes]] = {
    "bert-large": _bert_large,
    "gpt2": _gpt2,
    "mlp": _mlp,
    "resnet50": _resnet50,
}
