"""`bench kernels` itself: it runs, its rows are whole, and a kernel that is wrong is refused and never timed."""

import csv
import json
from importlib import import_module

import pytest
import torch

from dist_reg.bench import measure as measure_module
from dist_reg.bench.check import CheckFailed, check, forced_backend
from dist_reg.bench.measure import measure
from dist_reg.bench.operations import OPERATIONS, SIGMA, make_batch
from dist_reg.cli.bench.kernels import DTYPES, SMOKE_SHAPES
from dist_reg.ops import backend as backend_module
from tests.cli.test_cli import call

SHAPE = (2, 3, 10)
TIMES = [f"{variant}_ms{end}" for variant in ("ours", "eager") for end in ("", "_low", "_high")]
FIGURES = ["copy_gb_per_s", "ours_gb_per_s", "fraction_of_copy", "times_eager"]


@pytest.fixture
def break_kernel(monkeypatch):
    """Replace an operation's CPU path by what `change` makes of it."""
    backend_module._load.cache_clear()

    def replace(family, operation, change):
        module = import_module(f"dist_reg_kernels.{family}_cpu")
        monkeypatch.setattr(module, f"{operation}_cpu", change(getattr(module, f"{operation}_cpu")))

    yield replace
    backend_module._load.cache_clear()


def test_the_smoke_run_writes_whole_rows(tmp_path):
    pytest.importorskip("numba")
    code, out, err = call("bench", "kernels", "--smoke", "--device", "cpu", "--out", str(tmp_path))
    assert code == 0, err
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["benchmark"] == "kernels"
    assert {"date", "git_commit", "versions", "hardware", "setting"} <= record.keys()
    places = [(row["operation"], row["pass"], row["shape"], row["dtype"]) for row in record["rows"]]
    assert places == [
        (name, which, "x".join(map(str, shape)), dtype)
        for shape in SMOKE_SHAPES
        for dtype in DTYPES
        for name, operation in OPERATIONS.items()
        for which in operation.passes
    ]
    for row in record["rows"]:
        assert row["refused"] is None
        assert all(row[name] > 0 for name in TIMES + FIGURES), row
        assert row["ours_ms_low"] <= row["ours_ms"] <= row["ours_ms_high"]
        assert row["error"] < (1e-6 if row["dtype"] == "float32" else 2e-2)
        # Not measured here: left empty, never a made-up figure.
        assert row["compile_ms"] is None
        assert row["extra_bytes"] is None
        assert row["note"] == "compile left out"
        assert row["operation"] in out
    with (tmp_path / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["operation"], row["pass"], row["shape"], row["dtype"]) for row in rows] == places
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_are_counted_by_hand():
    rows = {(r["operation"], r["pass"]): r["bytes"] for r in measure(SHAPE, torch.bfloat16, "cpu", 2, False)}
    stream = 2 * 3 * 10 * 2
    assert rows["perturb normal", "forward"] == 2 * stream
    assert [rows["fork", which] for which in ("forward", "backward", "both")] == [
        3 * stream,
        3 * stream,
        6 * stream,
    ]
    assert [rows["stability", which] for which in ("forward", "backward")] == [2 * stream, 6 * stream]
    assert [rows["perturb_stability", which] for which in ("forward", "backward")] == [4 * stream, 6 * stream]
    assert [rows["layer_mix", which] for which in ("forward", "backward")] == [7 * stream, 13 * stream]
    widths = ((1, 1), (3, 1), (6, 3))
    weights = 2 * sum(10 * d + d + 2 * (h * d + h) + 2 * (d * h + d) + 10 * d + 10 for d, h in widths)
    assert [rows["bottleneck", which] for which in ("forward", "backward", "both")] == [
        2 * stream + weights,
        3 * stream + 2 * weights,
        5 * stream + 3 * weights,
    ]


def test_a_broken_kernel_is_refused_and_the_others_are_timed(break_kernel, tmp_path):
    pytest.importorskip("numba")
    break_kernel("stability", "stability", lambda kernel: lambda twin, spans: kernel(twin, spans) * 1.01)
    code, out, err = call("bench", "kernels", "--smoke", "--device", "cpu", "--out", str(tmp_path))
    assert code == 1
    (sentence,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "not timed, because the check against the formula failed: stability 1x3x64 bfloat16" in sentence
    assert "refused" in out
    for row in json.loads((tmp_path / "kernels.json").read_text())["rows"]:
        if row["operation"] == "stability":
            assert "forward is off by" in row["refused"]
            assert all(row[name] is None for name in TIMES + FIGURES)
        else:
            assert row["refused"] is None
            assert row["ours_ms"] > 0


def raises(*_arguments):
    raise RuntimeError("no such kernel image")


@pytest.mark.parametrize(
    ("family", "operation", "change", "refused", "why"),
    [
        (
            "stability",
            "stability_backward",
            lambda kernel: lambda *given: kernel(*given[:-1], True),
            {"stability", "perturb_stability"},
            "backward is off",
        ),
        (
            "perturb",
            "perturb",
            lambda kernel: (
                lambda hidden, keys, spans, seed, *rest: kernel(hidden, keys, spans, seed + 1, *rest)
            ),
            {"perturb uniform", "perturb uniform, eager uniform", "perturb normal"},
            "forward is off",
        ),
        (
            "fork",
            "fork",
            lambda kernel: lambda *given: kernel(*given).fill_(float("nan")),
            {"fork"},
            "forward is off by nan",
        ),
        ("fork", "fork", lambda kernel: raises, {"fork"}, "RuntimeError: no such kernel image"),
    ],
    ids=["gradient of one half", "other noise", "nan", "does not run"],
)
def test_what_is_wrong_is_refused(break_kernel, family, operation, change, refused, why):
    pytest.importorskip("numba")
    break_kernel(family, operation, change)
    rows = measure(SHAPE, torch.float32, "cpu", 2, compiled=False)
    assert {row["operation"] for row in rows if row["refused"]} == refused
    assert all(why in row["refused"] for row in rows if row["refused"])


def test_eager_torch_draws_what_the_entry_says():
    stream = torch.zeros(100, 100)
    size = {
        name: OPERATIONS[name].eager_noise(stream).abs().max() for name in OPERATIONS if "perturb u" in name
    }
    assert size["perturb uniform"] > 2 * SIGMA
    assert SIGMA * 0.99 < size["perturb uniform, eager uniform"] <= SIGMA


@pytest.mark.parametrize("norm", ["layer_norm_perturb", "perturb_rms_norm"])
def test_the_norm_alone_is_the_same_operation_without_noise(norm):
    batch = make_batch(SHAPE, torch.float32, "cpu")
    noisy, alone = OPERATIONS[norm], OPERATIONS[f"{norm}, sigma 0"]
    streams = noisy.streams(batch)
    plain = noisy.plain(torch.zeros_like, batch, *streams)
    for got, expected in zip(alone.ours(batch, *streams), plain, strict=True):
        torch.testing.assert_close(got, expected)
    assert not torch.equal(noisy.ours(batch, *streams)[0], plain[0])
    assert alone.forward == noisy.forward


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_passes_its_own_check(name):
    with forced_backend("reference"):
        errors = check(OPERATIONS[name], make_batch(SHAPE, torch.float32, "cpu"))
    assert errors["both"].ours <= 1e-6


def test_noise_of_the_wrong_size_fails():
    operation = OPERATIONS["perturb uniform"]
    larger = operation._replace(ours=lambda batch, hidden: (2 * operation.ours(batch, hidden)[0] - hidden,))
    with pytest.raises(CheckFailed, match="forward is off"):
        check(larger, make_batch(SHAPE, torch.float32, "cpu"))


def test_where_nothing_compiles_the_row_says_why(monkeypatch):
    monkeypatch.setattr(measure_module.torch, "compile", lambda *_, **__: raises)
    for row in measure(SHAPE, torch.float32, "cpu", 2, compiled=True):
        assert row["note"] == "compile: RuntimeError: no such kernel image"
        assert row["times_compile"] is None
        assert row["ours_ms"] > 0


def test_every_variant_takes_its_turn_in_every_round(monkeypatch):
    monkeypatch.setattr(measure_module.torch, "compile", lambda function, **_: function)
    asked = []
    clock = measure_module._clock_cpu
    monkeypatch.setattr(measure_module, "_clock_cpu", lambda timer: asked.append(timer) or clock(timer))
    rows = measure(SHAPE, torch.float32, "cpu", 3, compiled=True)
    copies = 2  # of one stream and of a twin
    a_round = 3 * len(rows) + copies
    assert len(asked) == (3 + measure_module.WARM_UP) * a_round
    for i in range(0, len(asked), a_round):
        assert {id(timer) for timer in asked[i : i + a_round]} == {id(timer) for timer in asked}
    assert all(row["times_compile"] > 0 for row in rows)


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (1000.0, True)])
def test_a_busy_machine_is_said_and_recorded(load, warned, monkeypatch, tmp_path):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    code, _, err = call("bench", "kernels", "--smoke", "--device", "cpu", "--out", str(tmp_path))
    assert code == 0
    assert ("warning: a load average of 1000.0 on" in err) == warned
    assert json.loads((tmp_path / "kernels.json").read_text())["setting"]["load_average_before"] == load


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_cuda_without_a_gpu_is_one_sentence():
    code, _, err = call("bench", "kernels", "--device", "cuda")
    assert code == 2
    assert err.strip() == (
        "error: --device cuda: torch finds no CUDA device here; leave the option out to measure the CPU."
    )
