"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, arXiv 1708.07747): 60,000 + 10,000 images of 28 x 28 in ten classes."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch

from compression_plugins.errors import CompressionError
from launch.task import Digits

VARIABLE = "FASHION_MNIST"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def load_fashion() -> tuple[Digits, Digits]:
    """(60,000 training images, 10,000 test images): fp32 [n, 784], normalised; labels int64 [n].

    Raises:
        CompressionError: the four files are not on this machine.
    """
    folder = Path(os.environ.get(VARIABLE, _DEBIAN))
    return _split(folder, "train"), _split(folder, "t10k")


def _split(folder: Path, name: str) -> Digits:
    images = _read(folder / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 784).astype(np.float32)
    labels = _read(folder / f"{name}-labels-idx1-ubyte.gz", 8).astype(np.int64)
    return Digits(torch.from_numpy((images / 255 - 0.286) / 0.353), torch.from_numpy(labels))


def _read(path: Path, header: int) -> np.ndarray:
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)
    except OSError as error:
        raise CompressionError(
            f"cannot read {path} ({error.strerror or error}); on Debian and Ubuntu: apt-get install "
            f"dataset-fashion-mnist; elsewhere put its four files in a folder and name it in {VARIABLE}"
        ) from None
