"""A file of an experiment means its product of cells, and a mistake in it is one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compression_plugins.errors import ConfigError
from launch.bench.cells import Cell, cells
from launch.bench.settings import ROOT, bits_per_second, load

WHOLE = """
hosts: [horovod, ddp]
schemes: [scalecom, ddp/powersgd]
models: [mlp]
ranks: [2, 4]
rates: [100mbit, unlimited]
seeds: [0, 1]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def wanted(path: Path) -> list[Cell]:
    return cells(*load(path))


def test_cells_are_the_product_and_baselines_are_always_among_them(tmp_path: Path) -> None:
    found = wanted(write(tmp_path, WHOLE))
    horovod, ddp = ["none", "bf16", "fake", "scalecom"], ["ddp/none", "ddp/bf16", "ddp/powersgd"]
    expected = {
        (host, scheme, ranks, rate, seed)
        for host, schemes in (("horovod", horovod), ("ddp", ddp))
        for scheme in schemes
        for ranks in (2, 4)
        for rate in ("100mbit", "unlimited")
        for seed in (0, 1)
    }
    assert {(c.host, c.scheme, c.ranks, c.rate, c.seed) for c in found} == expected
    assert len(found) == len(expected) == len({cell.key for cell in found})


def test_a_key_follows_the_schemes_file_and_no_other(tmp_path: Path) -> None:
    scheme = tmp_path / "mine.yaml"
    scheme.write_text("{scheme: topk, ratio: 10.0}")
    path = write(tmp_path, WHOLE.replace("scalecom", "mine.yaml"))
    before = {cell.key: cell for cell in wanted(path)}
    assert set(before) == {cell.key for cell in wanted(path)}
    scheme.write_text("{scheme: topk, ratio: 20.0}")
    changed = {cell.scheme for cell in wanted(path) if cell.key not in before}
    assert changed == {"mine"}


def test_a_target_can_be_moved_without_training_again(tmp_path: Path) -> None:
    text = WHOLE + "accuracy: {steps: 10, target: {mlp: 90}}\n"
    before = wanted(write(tmp_path, text))
    after = wanted(write(tmp_path, text.replace("mlp: 90", "mlp: 91")))
    assert [cell.key for cell in before] == [cell.key for cell in after] and before != after
    trained = {cell.scheme for cell in after if cell.kind == "accuracy"}
    assert "none" in trained and "ddp/none" in trained
    assert "fake" not in trained, "what does not train has no accuracy"


def test_steps_may_differ_by_rate(tmp_path: Path) -> None:
    found = wanted(write(tmp_path, WHOLE + "steps: {default: 20, 100mbit: 8}\n"))
    assert {(cell.rate, cell.steps) for cell in found} == {("100mbit", 8), ("unlimited", 20)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hosts: [horovd]", "hosts.0: Input should be 'horovod', 'deepspeed', 'ddp' or 'torchrun'"),
        ("schemes: [scalecmo]", "unknown scheme 'scalecmo'; did you mean 'scalecom'"),
        ("schemes: [ddp/powersg]", "unknown peer 'ddp/powersg'; did you mean 'ddp/powersgd'"),
        ("schemes: [absent.yaml]", "absent.yaml: No such file"),
        ("models: [mpl]", "unknown model 'mpl'; did you mean 'mlp'"),
        ("models: [gpt2]", "model 'gpt2' is a list of shapes; say how long a step computes in compute_ms"),
        ("rates: [fast]", "rate 'fast': write it as tc does, for example 100mbit"),
        ("rates: [0mbit]", "rate '0mbit'"),
        ("ranks: [1]", "ranks.0: Input should be greater than or equal to 2"),
        ("seeds: ['0']", "seeds.0: Input should be a valid integer"),
        ("sedes: [0]", "unknown key 'sedes'; did you mean 'seeds'"),
        ("steps: {100mbit: 5}", "steps: nothing is said of 'unlimited'; add it or `default`"),
        ("steps: {1gbit: 5, default: 1}", "steps: '1gbit' is no rate of this file"),
        ("hosts: [horovod]", "scheme 'ddp/powersgd' runs under 'ddp', which hosts does not name"),
        ("compute_ms: {resnet: 3}", "unknown model 'resnet'; did you mean 'resnet50'"),
        ("accuracy: {steps: {cnn: 9}, target: {mlp: 90}}", "accuracy: steps: nothing is said of 'mlp'"),
        ("accuracy: {steps: 9, target: {gpt2: 3}}", "accuracy: 'gpt2' has no data to train on"),
        ("{", "is not plain YAML"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_file(tmp_path: Path, line: str, message: str) -> None:
    key = line.partition(":")[0] + ":"
    kept = [other for other in WHOLE.strip().splitlines() if not other.startswith(key)]
    path = write(tmp_path, "\n".join([*kept, line]))
    with pytest.raises(ConfigError) as error:
        load(path)
    text = str(error.value)
    assert message in text and text.startswith(str(path)) and "\n" not in text


def test_a_rate_is_read_as_tc_reads_it() -> None:
    assert [bits_per_second(rate) for rate in ("100mbit", "2.5gbit", "64kbit")] == [1e8, 2.5e9, 64e3]
    assert bits_per_second("unlimited") == float("inf")


@pytest.mark.parametrize("path", sorted((ROOT / "launch/bench").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_committed_sweep_is_valid_and_has_its_baselines(path: Path) -> None:
    found = wanted(path)
    timed = {(cell.host, cell.scheme) for cell in found if cell.kind == "speed"}
    hosts = {host for host, _ in timed} - {"ddp"}
    assert hosts and all({(host, "bf16"), (host, "fake")} <= timed for host in hosts)
    assert all((host, "none") in timed for host in hosts - {"torchrun"}), "that of torchrun is ddp/none"
    assert len({cell.key for cell in found}) == len(found)


def test_the_experiment_on_the_page_is_valid_and_names_every_key(tmp_path: Path) -> None:
    page = (ROOT / "docs/benchmarks/bench.md").read_text(encoding="utf-8")
    text = page.split("## An experiment")[1].split("```text\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text("scheme: topk")
    experiment, _ = load(write(tmp_path, text))
    assert {"mine", "ddp/powersgd"} <= {cell.scheme for cell in wanted(tmp_path / "experiment.yaml")}
    assert all(f"`{key}`" in page for key in type(experiment).model_fields)


def test_every_sweep_that_a_page_names_is_there() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/benchmarks").glob("*.md"))
    named = set(re.findall(r"launch/bench/[a-z_]+\.yaml", pages))
    assert named == {f"launch/bench/{path.name}" for path in (ROOT / "launch/bench").glob("*.yaml")}
