"""What CONTRIBUTING.md says suffices: its examples, added to a copy of the project, are picked up and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [
    re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
    for indent, text in re.findall(
        r"^( *)```python\n(.*?)^\1```$",
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
]
pytestmark = pytest.mark.nightly
PACKAGE, KERNELS = "compression_plugins", "triton_kernels"
CUT = "import torch\n\n\ndef clip(x, bound, out):\n    torch.clamp(x.float(), -bound, bound, out=out)\n"
#: File -> (where its example begins, what else stands in it).
FILES = {
    f"{PACKAGE}/schemes/ef_signsgd.py": '"""EF-signSGD',
    f"{PACKAGE}/schemes/toy.py": '"""Every other value',
    f"{KERNELS}/ops/clip.py": '"""Values cut',
    f"{KERNELS}/cpu/clip.py": '"""Numba kernel',
    f"{KERNELS}/gpu/clip.py": '"""Triton kernel',
    "tests/kernels/test_clip.py": "import pytest",
    f"{PACKAGE}/adapters/toy/session.py": '"""A training loop',
    f"{PACKAGE}/optimizer/bounded.py": '"""Weights that stay',
}
JOB = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp

def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from compression_plugins.adapters.toy.session import ToySession
    from compression_plugins.config import Config
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
    session = ToySession(Config.load({"scheme": "toy", "min_numel": 0, "bucket_mb": 0.01}), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(rank))
    losses = []
    def backward():
        losses.append((model(x) - x.flip(1) / 2).square().mean())
        losses[-1].backward()
    for _ in range(30):
        session.step(backward, optimizer)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(*both) and losses[-1] < losses[0] and len(session.hooks) == 1
    assert max(p.abs().max() for name, p in session.parameters.items() if p.ndim > 1) <= 1.0
    dist.barrier()  # Gloo's threads may abort a process that ends while another still talks to it
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(main, args=(sys.argv[1],), nprocs=2)
"""


def example(begins: str) -> str:
    (text,) = [text for text in EXAMPLES if text.startswith(begins)]
    return text


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with every example in its place."""
    place = tmp_path_factory.mktemp("house")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (PACKAGE, KERNELS, "configs", "tests"):
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", place)
    (place / f"{PACKAGE}/adapters/toy").mkdir()
    (place / f"{PACKAGE}/adapters/toy/__init__.py").write_text("")
    for file, begins in FILES.items():
        (place / file).write_text(example(begins))
    (place / f"{KERNELS}/reference/clip.py").write_text(CUT)
    hook = re.sub(r"^(?=.)", "    ", example("def step_hook"), flags=re.MULTILINE)
    toy = (place / f"{PACKAGE}/schemes/toy.py").read_text()
    (place / f"{PACKAGE}/schemes/toy.py").write_text(f"{toy}\n{hook}")
    (place / "configs/toy.yaml").write_text("scheme: toy\n")
    (place / "job.py").write_text(JOB)
    return place


def run(house: Path, *command: str | Path, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1", **environment}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=house, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_scheme_keeps_the_laws(house: Path) -> None:
    assert "toy " in run(house, "-m", PACKAGE, "schemes")
    laws = run(house, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/laws", "-k", "toy")
    assert " passed" in laws and "failed" not in laws


def test_the_kernel_agrees_with_its_reference(house: Path) -> None:
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_clip.py")
    assert " passed" in run(house, *tests, TRITON_INTERPRET="1")


def test_the_host_trains_with_the_scheme_and_its_hook(house: Path, tmp_path: Path) -> None:
    run(house, "job.py", tmp_path / "store")
