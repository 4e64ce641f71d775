"""scripts/measure/benchmark.py at a tiny size, without `compiled`, which takes a minute, and precision.py."""

import json
import re
from unittest import mock

import pytest

from utils.networks import build_network

BENCHMARK = "scripts/measure/benchmark.py"
METHODS = {"matching": ["unroll", "plain", "tesla", "exact"], "experts": ["bare", "synced", "eager"],
           "evaluation": ["bare", "eager"]}


@pytest.fixture(scope="module")
def done(call, tmp_path_factory):
    """The output of a run, and its JSON."""
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    methods = sorted({method for methods in METHODS.values() for method in methods})
    finished = call(BENCHMARK, "--shape", "tiny_cpu", "--rounds", 2, "--device", "cpu",
                   "--json", path, "--methods", *methods)
    return finished.stdout, json.loads(path.read_text())


@pytest.mark.parametrize("part", METHODS)
def test_every_method_is_measured(done, part):
    (measured,) = done[1][part]
    assert measured["shape"]["name"] == "tiny_cpu"
    assert [row["method"] for row in measured["methods"]] == METHODS[part]
    for row in measured["methods"]:
        assert row["status"] == "measured" and row["engine"]
        assert len(row["seconds"]) == 2 and 0 < row["min"] <= row["median"] <= row["max"]
        assert row["ratio"] > 0
    assert measured["methods"][0]["ratio"] == 1  # relative to itself


def test_matching_has_memory(done):
    (measured,) = done[1]["matching"]
    assert all(row["peak_host_bytes"] < 100e6 for row in measured["methods"])


def test_the_machine_stands_beside_the_numbers(done):
    report = done[1]
    assert report["machine"]["processor"] and report["machine"]["threads"] == 1 and report["machine"]["memory"]
    assert report["rates"]["copy_gb_per_s"] > 0 < report["rates"]["product_gflops"] and report["environment"]["torch"]
    assert report["command"].startswith("python scripts/measure/benchmark.py --shape tiny_cpu --rounds 2")


def test_tables_show_the_same(done):
    text, report = done
    for part, methods in METHODS.items():
        table = text[text.index(f"\n{part} · tiny_cpu"):].split("\n\n")[1].splitlines()
        assert len({len(line) for line in table}) == 1  # aligned
        assert [re.split(r" *\| *", line)[1] for line in table[2:]] == methods
        for line, row in zip(table[2:], report[part][0]["methods"]):
            assert f"{row['median']:.3g}" in line


def test_shapes_come_from_the_configs(call):
    text = call(BENCHMARK, "--help").stdout
    assert all(name in text for name in ("cifar10_ipc1000", "cifar100_ipc50", "tiny_ipc10", "cpu_t80"))


@pytest.mark.parametrize("arguments, words", [
    (["--shape", "cifar10_ipc7"], ["invalid choice: 'cifar10_ipc7'", "cifar10_ipc1", "tiny_ipc50", "cpu", "all"]),
    (["--methods", "exakt"], ["invalid choice: 'exakt'", "'exact'"]),
    (["--rounds", "0"], ["--rounds: '0': give a whole number above 0"]),
    (["--rounds", "x"], ["--rounds: 'x': give a whole number above 0"]),
    (["--part", "experts", "--methods", "unroll"], ["none of these parts", "experts: bare"]),
])
def test_refusals(call, arguments, words):
    (line,) = call(BENCHMARK, *arguments, expect=2).stderr.splitlines()
    assert line.startswith("benchmark.py: error: ")
    assert all(word in line for word in words)


def test_it_says_that_it_compiles(call):
    with mock.patch("scripts.measure.benchmark_run.can_run", return_value=False):
        done = call(BENCHMARK, "--part", "evaluation", "--methods", "compiled", "--device", "cpu", expect=2)
    assert "it compiles first, for a minute or two" in done.stdout


def test_gradients_are_compared_with_float64(call, tmp_path, monkeypatch):
    """scripts/measure/precision.py on a small network."""
    def small(name, *rest):
        return build_network("ConvNetD1W4", *rest)

    monkeypatch.setattr("utils.networks.build_network", small)
    monkeypatch.setattr("utils.derivatives.choose_engine.set_precision", mock.Mock())  # it is for the whole process
    path = tmp_path / "errors.json"
    done = call("scripts/measure/precision.py", "--draws=2", f"--json={path}")
    report = json.loads(path.read_text())
    assert len(report["draws"]) == 2 and report["environment"]["torch"]
    for draw in report["draws"]:
        assert list(draw) == [f"{kind}{method}" for kind in ("plain", "eager", "compile", "bf16")
                              for method in ("", ", TESLA")]
        errors = {kind: each["median_image"] for kind, each in draw.items()}
        assert all(errors[kind] < 1e-4 < errors["bf16"] for kind in ("plain", "eager", "compile"))
    assert all(kind in done.stdout for kind in report["draws"][0])
