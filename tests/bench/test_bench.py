"""The bench's own instruments, and its report: a bench that measures wrongly is worse than none."""

import gc
import importlib
import importlib.util
import json
import subprocess
import sys
import time
import weakref
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest
import tape
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def instruments():
    """Import the modules of bench/, which is not a package."""
    pytest.importorskip("pytest_benchmark")
    sys.path.insert(0, str(ROOT / "bench"))
    names = (
        "cases",
        "compare",
        "guards",
        "machine",
        "measure",
        "operations",
        "providers",
        "report",
        "results_file",
        "scales",
        "tables",
        "truth",
    )
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(ROOT / "bench"))


# ---- instruments


def test_rounds_are_interleaved_and_a_failure_is_a_result(instruments):
    calls = []

    def fails_at_the_third():
        calls.append("b")
        if calls.count("b") == 3:
            raise RuntimeError("no room in /root/somewhere/x.py")

    race = instruments.measure.Race({"a": lambda: calls.append("a"), "b": fails_at_the_third})
    for _ in range(4):
        race.round()
    assert "".join(calls) == "abbaaba"  # another one starts each round; b drops out in its third round
    assert {name: len(times) for name, times in race.paired(3).items()} == {"a": 3}
    assert race.errors == {"b": "RuntimeError: no room in (path)"}


def test_the_guards_are_timed_where_they_are(instruments):
    """The bench replaces guards by name: each must still exist under this name, and its time be measured."""
    guards = instruments.guards
    case = guards.Case("layer", batch=4, channels=4, size=4)
    assert all(value > 0 for value in (guards.of_steps(case, 1) | guards.of_loss(rounds=2)).values())
    assert all(value > 0 for value in guards.of_run(case, True, steps=2).values())


@pytest.mark.parametrize("leaves", ["the race", "before the race", "the largest batch"])
def test_who_fails_leaves_its_memory_to_the_next(instruments, leaves):
    """Memory is freed although Opacus's hooks and activations form cycles and a traceback refers to the frames that failed."""
    activations = []

    class Activation:
        def __init__(self):
            self.itself = self
            activations.append(weakref.ref(self))

    def fails(*_):
        activation = Activation()
        raise RuntimeError(f"out of memory with {activation}")

    seen, see = [], lambda *_: seen.append(activations[0]())
    gc.disable()  # so that nothing is collected by chance
    try:
        if leaves == "the race":
            instruments.measure.Race({"fails": fails, "next": see}).round()
        elif leaves == "before the race":
            make = {"fails": fails, "next": see}
            instruments.compare._keeping_errors({name: {} for name in make}, lambda name: make[name]())
        else:
            assert not instruments.measure._fits(fails, 1, 1)
            see()
    finally:
        gc.enable()
    assert seen == [None]


def test_no_time_counts_what_is_done_between_contenders(instruments, monkeypatch):
    def fails():
        raise RuntimeError

    monkeypatch.setattr(instruments.measure, "free_memory", lambda: time.sleep(0.3))
    race = instruments.measure.Race({"fails": fails, "next": lambda: None})
    race.round()
    assert race.times["fails"] == [] and race.times["next"][0] < 0.3


def test_ratios_are_of_the_same_round(instruments):
    assert instruments.measure.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_the_largest_batch_is_tried_before_it_is_told(instruments):
    tried = []

    def peak(batch: int) -> int:
        tried.append(batch)
        if batch > 160:
            raise RuntimeError("out of memory")
        return 50 + 10 * batch + (200 if batch > 60 else 0)  # a jump: the straight line promises too much

    found = instruments.measure.largest_batch(peak, 4, 1000)
    assert found == tried[-1] and peak(found) <= 1000 < peak(95) and 70 <= found <= 75
    assert instruments.measure.largest_batch(peak, 4, 2000) <= 160


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_gradient_fails_before_anything_is_timed(instruments, monkeypatch):
    case = instruments.cases.Case("stack", 4, channels=8, size=8, layers=2)
    ours = instruments.providers.PROVIDERS["FastLoDA"]
    instruments.truth.check(case, "FastLoDA")
    unclipped = lambda case, privacy: ours.make(case, instruments.providers.Privacy(1e6, 0.0))  # noqa: E731
    monkeypatch.setitem(instruments.providers.PROVIDERS, "FastLoDA", ours._replace(make=unclipped))
    with pytest.raises(instruments.truth.WrongAnswer, match="FastLoDA, stack-n4-c8-8x8-2layers-r4"):
        instruments.truth.check(case, "FastLoDA")


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_that_grows_from_step_to_step_fails(instruments, monkeypatch):
    case = instruments.cases.Case("stack", 4, channels=8, size=8, layers=2)
    instruments.truth.check(case, "plain PyTorch")
    monkeypatch.setattr(instruments.providers, "_clear", lambda *_: None)
    with pytest.raises(instruments.truth.WrongAnswer, match="second step"):
        instruments.truth.check(case, "plain PyTorch")


PORTED = (
    {"model": "stack", "rank": 4, "channels": 8, "size": 8, "layers": 1, "views": 2},
    {"model": "digits_unet", "rank": 4},
    {"model": "wideresnet"},
    {"model": "encoder", "channels": 64, "size": 4, "layers": 1},
)


@pytest.mark.parametrize("settings", PORTED, ids=lambda settings: settings["model"])
def test_a_case_on_jax_has_the_losses_of_pytorch(instruments, settings):
    """The losses agree for one row and for two, although the model was exported only once."""
    pytest.importorskip("jax_privacy", reason="needs fastloda[peers]", exc_type=ImportError)
    jax, jax_providers = importlib.import_module("jax"), importlib.import_module("jax_providers")
    case = instruments.cases.Case(**{"batch": 1, "rank": None} | settings)
    ported, wanted = jax_providers.port(case), case.losses(case.build(), case.inputs())
    found = jax.jit(ported.losses)(ported.weights, ported.frozen, ported.batch)
    torch.testing.assert_close(jax_providers.to_torch(found), wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # jax_privacy calls functions that optax has renamed
@pytest.mark.parametrize("mode", [None, "vmap", "micro-batches", "one by one"])
def test_a_wrong_gradient_on_jax_is_found(instruments, monkeypatch, mode):
    pytest.importorskip("jax_privacy", reason="needs fastloda[peers]", exc_type=ImportError)
    jax_providers = importlib.import_module("jax_providers")
    case = instruments.cases.Case("stack", 8, channels=4, size=4, layers=1)
    name = f"jax_privacy {mode}" if mode else "plain JAX"
    instruments.truth.check(case, name)
    monkeypatch.setitem(jax_providers.OPERATIONS, "leaky_relu", lambda x, slope: x)
    with pytest.raises(instruments.truth.WrongAnswer, match=name):
        instruments.truth.check(case, name)


def test_the_memory_of_jax_is_what_its_compiler_says(instruments):
    """PyTorch's profiler would see only a few bytes."""
    pytest.importorskip("jax_privacy", reason="needs fastloda[peers]", exc_type=ImportError)
    case = instruments.cases.Case("stack", 8, channels=4, size=16, layers=1)
    images = case.inputs()[0].nbytes
    memory = instruments.measure._cpu_memory(case, "plain JAX", torch.get_num_threads())
    assert images <= memory.allocated <= 20 * images


def test_who_is_not_installed_is_left_out(instruments, monkeypatch):
    absent = instruments.providers.PROVIDERS["FastLoDA"]._replace(needs="no_such_module")
    monkeypatch.setitem(instruments.providers.PROVIDERS, "FastLoDA", absent)
    timed = instruments.scales.Timed(instruments.cases.Case("layer", 1, channels=4, size=4), ("FastLoDA",))
    row = instruments.compare.compare(timed, 1, lambda run, **_: run())
    assert row["providers"] == {} and row["best_peer"] is None


def test_all_linear_layers_of_the_encoder_train_and_nothing_else(instruments):
    model = instruments.cases.Case("encoder", 1, None, channels=64, size=4, layers=2).build()
    modules = [m for m in model.modules() for p in m.parameters(recurse=False) if p.requires_grad]
    assert {type(m) for m in modules} == {torch.nn.Linear} and len(modules) == 2 * (2 * 4 + 1)


@pytest.mark.filterwarnings("ignore")
def test_every_replay_of_the_graph_starts_from_nothing(instruments, monkeypatch):
    tape.use(monkeypatch)
    case = instruments.cases.Case("stack", 4, channels=8, size=8, layers=2)
    instruments.truth.check(case, instruments.providers.GRAPH)


def test_an_operation_that_cannot_be_captured_is_timed_without_a_graph(instruments, monkeypatch):
    def refuses(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    operation = instruments.operations.Operation("add", lambda: None, 1, 1)
    monkeypatch.setattr(instruments.operations, "captured", refuses)
    assert operation.captured() == operation and not operation.in_graph
    monkeypatch.setattr(instruments.operations, "captured", lambda run: "replay")
    assert operation.captured().run == "replay" and operation.captured().in_graph


def test_the_layers_input_is_a_leaf(instruments):
    """If the input were a copy of a leaf, all backward passes except FastLoDA's would pass a gradient through the copy too."""
    case = instruments.cases.Case("layer", 2, channels=4, size=4, layout="channels_last")
    (x,) = case.inputs()
    assert x.is_leaf and x.requires_grad and x.is_contiguous(memory_format=torch.channels_last)


def test_the_bench_is_without_tf32(instruments):
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_a_run_goes_on_with_the_rows_of_the_same_day(instruments, tmp_path):
    path = tmp_path / "machine.json"
    first = instruments.results_file.Results("cpu", path)
    first.add("steps", {"case": "a", "providers": {}})
    first.add("steps", {"case": "b", "providers": {}})
    second = instruments.results_file.Results("cpu", path)
    second.add("steps", {"case": "a", "providers": {"new": {}}})
    assert json.loads(path.read_text())["steps"] == [
        {"case": "b", "providers": {}},
        {"case": "a", "providers": {"new": {}}},
    ]
    assert not instruments.results_file.Results("gpu", path).measured  # another scale starts a new file


def test_gpu_check_says_that_there_is_no_gpu():
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check"), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "no GPU" in done.stderr


def test_gpu_check_brings_all_that_its_items_import():
    """A machine with a GPU has only PyTorch and the packages that gpu_check names."""
    script = """
import runpy, sys
needed = runpy.run_path("scripts/gpu_check", run_name="checked")["NEEDED"]
sys.path[:0] = ["bench", "tests/helpers", "scripts"]
for name in {"sklearn", "jsonargparse", "docstring_parser", "matplotlib", "rich", "PIL", "diffusers"} - set(needed):
    sys.modules[name] = None  # importing it fails
import gpu_items, gpu_step_check, drawn, exactness
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def gpu_check(monkeypatch, tmp_path):
    """Load the script as a module that writes its results to tmp_path."""
    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "WHEELS", tmp_path / ".whl")
    monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.setattr(module, "gpu_name", lambda: "gpu")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "1"])
    return module


def test_gpu_check_without_a_registry_says_what_to_bring(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "NEEDED", {"no_such_module": "no-such-package"})
    assert gpu_check.main() == 2
    assert "missing: no-such-package: run `make wheels`" in capsys.readouterr().err
    commands = []
    failing = lambda command: commands.append(command) or SimpleNamespace(returncode=1)  # noqa: E731
    monkeypatch.setattr(gpu_check.subprocess, "run", failing)
    (tmp_path / ".whl").mkdir()
    assert gpu_check.main() == 2
    assert "--no-index --no-deps --find-links" in " ".join(commands[0])


def test_each_item_leaves_its_figures_though_another_fails(gpu_check, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(gpu_check, "NEEDED", {})
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"half\": 1}')"
    scripts = {"good": write, "bad": f"{write}; sys.exit(3)", "slow": f"{write}; import time; time.sleep(60)"}
    chosen = [gpu_check.Item(name, ["-c", script, "{out}"], 8) for name, script in scripts.items()]
    monkeypatch.setattr(gpu_check, "items", lambda *_: chosen)
    assert gpu_check.main() == 1
    (path,) = out.iterdir()
    found = json.loads(path.read_text())
    assert [found[name]["outcome"] for name in scripts] == ["ok", "failed (3)", "stopped after 8 s"]
    assert all(found[name]["half"] == 1 for name in scripts)
    assert "failed: bad, slow" in capsys.readouterr().out
    gpu_check.Results(rehearsal=False).add("later", {})  # the second call continues the existing file
    assert json.loads(path.read_text()) == found | {"later": {}}


# ---- report

SECONDS = {"min": 0.9, "max": 1.2, "mean": 1.0, "stddev": 0.1, "median": 1.0, "iqr": 0.1, "rounds": 3}


def figures(time: float, peak: float) -> dict:
    return {
        "seconds": SECONDS,
        "samples_per_second": 8.0 / time,
        "time_over_plain": time,
        "time_over_best_peer": time / 2,
        "peak_bytes": int(peak * 2**20),
        "peak_over_plain": peak,
        "resident_bytes": None,
    }


@pytest.fixture
def document() -> dict:
    providers = {
        "plain PyTorch": figures(1.0, 1.0),
        "FastLoDA": figures(1.1, 1.1),
        "Opacus hooks": figures(2.0, 2.0),
        "Opacus ew": {"error": "RuntimeError: it | cannot"},
    }
    step = {"case": "stack", "best_peer": "Opacus hooks", "providers": providers}
    growth = [step | {"case": f"rank {r}", "curve": "rank", "field": "rank", "value": r} for r in (4, 1)]
    kernel = {
        "case": "gA", "operation": "gA: norm", "layer": "64 to 64", "layers": 3, "bytes": 10**6, "flops": 10**6,
        "seconds": SECONDS, "floor_seconds": 0.5, "fraction_of_floor": 0.5,
    }  # fmt: skip
    peaks = {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": {"float32": 1e11}}
    head = {"format": 2, "machine": "m", "date": "2026-01-02", "scale": "cpu", "versions": {"torch": "2"}}
    return head | {"peaks": peaks, "steps": [step], "growth": growth, "kernels": [kernel]}


def test_the_summary_says_how_much_faster_and_what_nobody_could_run(instruments, document):
    summary = lambda: instruments.tables.summary_table(document["steps"])  # noqa: E731
    assert summary().columns[3:5] == ["/ plain", "best peer"]  # nothing was compiled
    assert summary().rows == [["`stack`", "1", "1", "1.10", "Opacus hooks", "1", "1.82 x", "1.10", "0.55"]]
    document["steps"][0]["providers"] |= {
        "plain PyTorch, compiled": figures(0.8, 1.0),
        "FastLoDA, compiled": figures(0.88, 1.0) | {"time_over_compiled": 1.1},
    }
    assert summary().columns[4:7] == ["compiled plain, s", "FastLoDA compiled, s", "/ compiled plain"]
    assert summary().rows[0][4:7] == ["1", "1", "1.10"]
    del document["steps"][0]["providers"]["Opacus hooks"]
    document["steps"][0]["best_peer"] = None
    document["steps"][0]["providers"]["FastLoDA"].pop("time_over_best_peer")
    assert summary().columns[7:] == ["best peer", "peak memory / plain"]
    assert summary().rows[0][7:] == ["none runs", "1.10"]


def test_an_error_is_shown_not_left_out(instruments, document):
    table = instruments.tables.step_table(document["steps"], "title")
    assert [row[:2] for row in table.rows][-1] == ["- Opacus ew", "error"]
    assert "Opacus ew: RuntimeError: it | cannot (stack)" in table.to_markdown()


def test_the_report_is_markdown_with_figures(instruments, document, tmp_path, capsys):
    path, out = tmp_path / "m-2026-01-02.json", tmp_path / "out"
    path.write_text(json.dumps(document))
    instruments.report.main([str(path), "--out", str(out)])
    text = (out / "bench.md").read_text()
    names = {file.name for file in out.glob("*.png")}
    assert len(names) == 4 and all(f"]({name})" in text for name in names)
    assert "| `stack` | 1 | 1 | 1.10 |" in text and "50%" in text
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in out.glob("*.png"))
    assert "4 figures" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"format": 1}'])
def test_another_file_is_refused_in_one_line(instruments, content, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        instruments.report.main([str(path), "--out", str(tmp_path / "out")])
    assert "no result file" in capsys.readouterr().err or content == "no JSON" and not (tmp_path / "out").exists()


def test_committed_results_can_be_read(instruments):
    for path in (ROOT / "bench" / "results").glob("*.json"):
        document = instruments.tables.load(path)
        assert list(instruments.tables.tables(document)) and "/" not in document["machine"]
