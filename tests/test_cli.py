"""`lgnet-fast convert`, `info`, `flops` and `demo`; `run` has test_cli_run.py."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from lgnet_fast import LGNet, cache, create_model, kernels, native
from lgnet_fast.cli import app
from lgnet_fast.cli.commands import convert as convert_command
from lgnet_fast.cli.commands import eval as eval_command
from lgnet_fast.cli.commands import run as run_command
from lgnet_fast.cli.commands.serve import models_of as served
from lgnet_fast.cli.errors import options_of, spelt
from lgnet_fast.data import masks as data_masks
from lgnet_fast.engine.cuda.verdicts import Verdict
from lgnet_fast.errors import UsageError
from lgnet_fast.evaluation import EvaluationOptions
from lgnet_fast.info import _openmp, render
from lgnet_fast.jobs import fill as fill_module
from lgnet_fast.jobs.options import FillOptions
from lgnet_fast.ops import first_use
from lgnet_fast.ops.cpu import attention as cpu_attention
from lgnet_fast.pipeline import formats, strategies
from lgnet_fast.pipeline import masks as pipeline_masks
from lgnet_fast.reference.attention import VARIANTS
from lgnet_fast.samples import sample_paths
from lgnet_fast.version import __version__
from tests.engine_support import needs_extension


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def released(tmp_path):
    model = create_model("lgnet_demo", coarse_channels=4, local_channels=4, global_channels=4)
    folder = tmp_path / "released"
    folder.mkdir()
    for net, state in model.to_released().items():
        torch.save(state, folder / f"200_net_{net}.pth")
    return model, folder


def test_convert(released, tmp_path):
    model, folder = released
    result = invoke("convert", folder, tmp_path / "out", "--dtype", "float16", "--variant", "paper")
    assert result.exit_code == 0, result.output
    assert "widths (4, 4, 4), paper attention" in result.output
    loaded = LGNet.from_pretrained(tmp_path / "out")
    assert loaded.variant == "paper"
    for a, b in zip(loaded.parameters(), model.parameters()):
        assert torch.equal(a, b.half().float())


def test_convert_errors_are_one_line(released, tmp_path):
    _, folder = released
    (folder / "200_net_G3.pth").unlink()
    result = invoke("convert", folder, tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: source: missing in ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"lgnet-fast {__version__}\n")


def test_paragraphs_of_the_help_fill_the_terminal():
    for name, command in typer.main.get_command(app).commands.items():
        assert re.search(r"\S\n\S", command.help) is None, name
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["run", "--help"]).output
    assert "work and merge one report; the same command run again does only what is not " in shown


@needs_extension
def test_info_says_what_runs_and_why_not():
    report = json.loads(invoke("info", "--json").stdout)
    assert report["packages"]["torch"] == torch.__version__
    cpu = report["backends"]["cpu"]
    assert cpu["triton"]["attention_block"] == (kernels.missing() or "device cpu (Triton kernels need an NVIDIA GPU)")
    assert cpu["cpp"]["merge_concat"] is None
    processor = report["devices"][0]
    assert (processor["name"], processor["kernels"]) == (cache.processor(), native.isa_name())
    backend = native.library().parallel_backend()
    assert processor["openmp"] == ("none" if backend == "threads" else Path(backend.removesuffix(")")).name)
    assert {"imagecodecs", "tifffile", "pillow-heif"} <= set(report["packages"])
    text = invoke("info").stdout
    assert "no: " in text
    assert "yes" in text


def test_info_prints_what_stands_in_brackets():
    """rich reads [brackets] in plain table cells as markup, and drops them."""
    reasons = {"attention_block": "needs the extra [a] (pip install 'lgnet-fast[triton]')", "merge_concat": None}
    report = {
        "lgnet_fast": "1[b]", "python": "3[c]", "platform": "here [d]", "packages": {"some": "2[e]"}, "cuda": None,
        "devices": [{"device": "cpu", "name": "one [f]"}], "backends": {"cpu": {"triton": reasons}},
        "cache": "in [g]", "verdicts": [{"card": "k [h]", "dtype": "half", "check": "c [i]", "found": "found [j]"}],
        "choices": [{"card": "l [m]", "dtype": "half", "what": "w [n]", "found": "what [o]"}],
    }  # fmt: skip
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(report))
    text = captured.get()
    for part in (
        "1[b]",
        "l [m]",
        "w [n]",
        "what [o]",
        "3[c]",
        "here [d]",
        "2[e]",
        "one [f]",
        "extra [a]",
        "in [g]",
        "k [h]",
        "c [i]",
        "found [j]",
        "'lgnet-fast[triton]'",
    ):
        assert part in text


def test_info_names_the_missing_extension(monkeypatch):
    monkeypatch.setattr("lgnet_fast.native.unavailable_reason", lambda: "the compiler went on holiday")
    report = json.loads(invoke("info", "--json").stdout)
    assert report["backends"]["cpu"]["cpp"]["attention_block"] == "the compiler went on holiday"
    assert report["devices"][0]["kernels"] == report["devices"][0]["openmp"] == "none"


@needs_extension
def test_info_names_the_threads_of_the_kernels(monkeypatch):
    for backend, shown in (("openmp (/a/lib/libgomp (1).so.1)", "libgomp (1).so.1"), ("threads", "none")):
        library = SimpleNamespace(parallel_backend=lambda backend=backend: backend)
        monkeypatch.setattr("lgnet_fast.native.library", lambda library=library: library)
        assert _openmp() == shown


def test_info_prints_the_plan():
    result = invoke("info", "--plan", "lgnet_demo")
    assert result.exit_code == 0, result.output
    assert "net_g.attention_d3" in result.output
    assert "total" in result.output
    assert invoke("info", "--plan", "nope").exit_code == 2


def test_flops_reports_both_conventions():
    report = json.loads(invoke("flops", "--json").stdout)
    total = report["total"]
    assert round(total["parameters"] / 1e6, 2) == 115.00
    text = invoke("flops", "--model", "lgnet_light").stdout
    assert "53.728" in text
    assert "67.095" in text
    for arguments in (("--size", "100x100"), ("--size", "big"), ("--model", "nope")):
        assert invoke("flops", *arguments).exit_code == 2


def test_demo_fills_every_sample(tmp_path):
    result = invoke("demo", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    for name, (picture_path, mask_path) in sample_paths().items():
        picture, mask = Image.open(picture_path), Image.open(mask_path)
        filled = Image.open(tmp_path / f"{name}.png")
        assert (filled.size, filled.mode) == (picture.size, picture.mode)
        assert f"{name}: {picture.width}x{picture.height} in " in result.output
        before, after = (torch.tensor(list(p.tobytes())).view(-1, 3) for p in (picture, filled))
        hole = torch.tensor(list(mask.tobytes())) > 127
        assert torch.equal(before[~hole], after[~hole])
        # Filled, and closer to the original than white paint.
        error, white = (after - before)[hole].abs().double().mean(), (255 - before)[hole].abs().double().mean()
        assert 0 < error < white / 2
        assert Image.open(tmp_path / f"{name}_sheet.png").width == 5 * 328 + 8


def test_demo_writes_to_demo_output_where_no_folder_is_named(tmp_path, monkeypatch, fake):
    monkeypatch.chdir(tmp_path)
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    assert {f.name for f in (tmp_path / "demo_output").iterdir()} >= {f"{name}.png" for name in sample_paths()}
    # The README shows the output, without the times.
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    shown = readme.split("```\nready after", 1)[1].split("```", 1)[0].replace("\\", "/")
    pattern = re.escape("ready after" + shown.rstrip()).replace(re.escape("..."), r"[\d.]+")
    assert re.fullmatch(pattern, result.output.replace("\\", "/").rstrip())


def test_demo_leaves_no_part_of_a_picture_on_a_full_disk(tmp_path, monkeypatch, fake):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = invoke("demo", "--output", tmp_path / "out")
    assert result.exit_code == 2
    file = str(tmp_path / "out" / "astronaut.png")
    assert result.stderr == f"error: [Errno 28] No space left on device: {file!r}\n"
    assert not list((tmp_path / "out").iterdir())


@needs_extension
def test_verify_prints_every_check_with_its_error():
    result = invoke("verify", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = [check["name"] for check in report["checks"]]
    assert "merge_concat, with gradient" in names
    assert "attention_block released, up to 128 channels, without gradient, 32x32x128" in names
    assert len(set(names)) == len(names)
    assert names[-1] == "engine"
    assert all(0 <= check["error"] <= check["limit"] and check["passed"] for check in report["checks"])
    assert report["runs"].startswith(("the C++ executor (", "plain PyTorch ("))
    assert report["key"]["dtype"] == "float32"


@needs_extension
def test_verify_fails_where_a_kernel_is_wrong(monkeypatch):
    forward = cpu_attention.attention_block_forward

    def moved(*args, **options):
        out, *rest = forward(*args, **options)
        return out.roll(1, dims=3), *rest

    monkeypatch.setattr(cpu_attention, "attention_block_forward", moved)
    result = invoke("verify", "--device", "cpu")
    assert result.exit_code == 1
    assert "is allowed" in " ".join(result.stdout.split())


def test_verify_keeps_the_verdict_of_a_kernel_that_fails_at_one_of_two_sizes(monkeypatch):
    kept = {}

    def check(use, tensors, fused, eager, keep):
        outcome = first_use.Outcome("OutOfResources" if tensors[0].shape[2:] == (16, 16) else None, None, None)
        if keep:
            kept[use.name] = outcome.reason
        return outcome

    monkeypatch.setattr(first_use, "check", check)
    monkeypatch.setattr("lgnet_fast.jobs.verify.CANDIDATES", {"cpu": "triton"})
    monkeypatch.setattr("lgnet_fast.jobs.verify.reason_against", lambda *arguments: None)
    invoke("verify", "--device", "cpu")
    block = "attention_block released, up to {} channels, with gradient"
    assert kept[block.format(128)] == "OutOfResources"  # at 16x16; 32x32 comes later
    assert kept[block.format(64)] is None


@needs_extension
def test_tune_prints_every_step_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    model = LGNet("C+L", coarse_channels=4, local_channels=4)
    model.save_pretrained(tmp_path / "model")
    options = ["--device", "cpu", "--seconds", "20", "--model", str(tmp_path / "model")]
    result = invoke("tune", "--json", *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = [step["step"] for step in report["steps"]]
    assert names[0] == "net_c.e1"
    assert names[-1] == "net_l.out"
    assert 0 < report["now_ms"] <= report["before_ms"]
    assert all(step["now_us"] is None or step["now_us"] > 0 for step in report["steps"])
    known = [step["now_us"] for step in report["steps"] if step["now_us"] is not None]
    assert 0.1 < sum(known) / (1e3 * report["now_ms"]) < 10  # microseconds and milliseconds of the same run
    kept = {c["what"].split()[0]: c["found"] for c in json.loads(invoke("info", "--json").stdout)["choices"]}
    assert set(kept) == {"engine", "path"}
    assert kept["engine"].startswith("measured: ")
    assert kept["path"] == report["runs"]
    shown = " ".join(invoke("info").stdout.split())
    assert "measured choices kept in" in shown
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["tune", *options]).stdout
    assert "net_l.block0.f" in shown
    assert "…" not in shown


def test_tune_says_where_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "file"))
    LGNet("C", coarse_channels=4).save_pretrained(tmp_path / "model")
    result = invoke("tune", "--device", "cpu", "--seconds", "1", "--model", tmp_path / "model")
    assert result.exit_code == 0, result.output
    warning = f"warning: nothing is kept for later runs: no file can be written in {tmp_path / 'file'}"
    assert warning in result.stderr
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    assert "warning" not in invoke("tune", "--device", "cpu", "--seconds", "1", "--model", tmp_path / "model").stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "100x256"], "--size: expected positive multiples of 256, got 100x256"),
        (["--size", "big"], "--size: expected HxW, such as 256x256, got 'big'"),
        (["--size", "256"], "--size: expected HxW, such as 256x256, got '256'"),
        (
            ["--device", "cpu", "--dtype", "float16"],
            "there is nothing to tune: the C\\+\\+ executor computes in float32",
        ),
        (
            ["--device", "cpu", "--training"],
            "there is nothing to tune for training: its kernels run on NVIDIA GPUs, not on cpu",
        ),
        (["--training", "--size", "100x256"], "--size: expected positive multiples of 256, got 100x256"),
        (["--seconds", "0"], "--seconds"),
        (["--name", "lgnet_demo", "--model", "x"], "--name: takes the place of --model; leave one of the two out"),
    ],
)
def test_tune_refuses_what_it_cannot_do(options, message):
    result = invoke("tune", *options)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.output.replace("│", " ").split()))


def test_flops_names_the_form_of_the_size():
    result = invoke("flops", "--size", "axb")
    assert result.exit_code == 2
    assert "expected HxW, such as 256x256, got 'axb'" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["flops", "--model", "lama"], "for --model: expected one of ['lgnet', "),
        (["flops", "--size", "100x256"], "for --size: expected positive multiples of 256, got (100, 256)"),
        (["tune", "--name", "lama"], "for --name: expected one of ['lgnet', "),
        (["info", "--plan", "lama"], "for --plan: expected one of ['lgnet', "),
        (["info", "--plan", "lgnet_demo", "--json"], "--json: is without effect on --plan, a table; leave it out"),
        (["verify", "--model", ""], "got an empty text"),
        (["tune", "--model", " "], "got an empty text"),
        (["run", "-i", "https://a.b/c.png", "-m", "m.png", "-o", "o.png"], "got the address https://a.b/c.png; down"),
        (["run", "-i", "c.png", "-m", "https://a.b/m.png", "-o", "o.png"], "got the address https://a.b/m.png; down"),
    ],
)
def test_wrong_values_are_said_of_the_option(command, message):
    result = invoke(*command)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_info_shows_kept_verdicts(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path))
    key = cache.key_for(torch.device("cpu"), torch.float16)
    passed = {"passed": True, "reason": None, "error": 0.1, "limit": 0.2}
    cache.put(key, cache.VERDICTS, "merge, with gradient", passed)
    cache.put(key, cache.VERDICTS, "merge, without gradient", passed | {"passed": False, "reason": "OutOfResources"})
    cache.put(key, cache.VERDICTS, "engine x", Verdict("library", "u.d1: wrong", ("u.d1",)).as_dict())
    cache.put(key, cache.VERDICTS, "engine y", {"runs": "by magic"})
    found = {v["check"]: v["found"] for v in json.loads(invoke("info", "--json").stdout)["verdicts"]}
    assert found == {
        "merge, with gradient": "passed",
        "merge, without gradient": "eager PyTorch runs: OutOfResources",
        "engine x": "the engine with u.d1 by PyTorch's operators (u.d1: wrong)",
        "engine y": "not readable",
    }
    assert "OutOfResources" in invoke("info").stdout


@pytest.mark.parametrize(
    ("function", "options"), [(run_command.run, FillOptions), (eval_command.evaluate, EvaluationOptions)]
)
def test_every_option_is_a_field(function, options):
    parameters = inspect.signature(function).parameters
    assert sorted(parameters) == sorted(field.name for field in dataclasses.fields(options))


def test_choices_are_those_of_the_libraries():
    for enum, names in (
        (run_command.Strategy, strategies.STRATEGIES),
        (run_command.MaskChannel, pipeline_masks.CHANNELS),
        (run_command.Format, formats.FORMATS),
        (convert_command.Variant, VARIANTS),
        (eval_command.MaskKind, data_masks.KINDS),
    ):
        assert [one.value for one in enum] == list(names), enum


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mask_suffix: expected more, or `mask`", "--mask-suffix: expected more, or --mask"),
        ("source, mask, out: too long", "--input, --mask, --output: too long"),
        ("weights: `nothing` fits", "--model: `nothing` fits"),
        ("folder: `nothing` fits", "folder: `nothing` fits"),
        ("failed", "failed"),
    ],
)
def test_fields_are_shown_as_options(text, shown):
    assert spelt(text, options_of(typer.main.get_command(app).commands["run"])) == shown


def test_bundled_is_the_bundled_model_in_every_command(tmp_path, monkeypatch):
    """Unless a folder has that name."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(options, *_):
        seen.append(options.model)
        raise UsageError("seen")

    monkeypatch.setattr(fill_module, "fill", stop)
    asked = ["run", "-i", "a.png", "-m", "m.png", "-o", "o.png"]
    for model in ([], ["--model", "bundled"], ["--model", "runs/a"]):
        assert invoke(*asked, *model).stderr == "error: seen\n"
    (tmp_path / "bundled").mkdir()
    invoke(*asked, "--model", "bundled")
    assert seen == [None, None, "runs/a", "bundled"]
    for command in ("verify", "tune"):
        expected = "error: --model: expected config.json and model.safetensors in bundled, missing "
        assert invoke(command, "--model", "bundled", "--device", "cpu").stderr.startswith(expected)


def test_named_models_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert served([]) == served(["bundled"]) == {"bundled": None}
    assert served(["bundled", "big=runs/model", "runs/other/", "own=bundled"]) == {
        "bundled": None,
        "big": "runs/model",
        "other": "runs/other/",
        "own": None,
    }
    with pytest.raises(UsageError, match="^models: expected NAME=FOLDER with names that differ, got 'b/x'"):
        served(["a/x", "b/x"])
    for models_of in (served, eval_command.models_of):
        for wrong in ("=runs/1", "new="):
            with pytest.raises(UsageError, match=f"^models: expected NAME=MODEL, got '{wrong}'"):
                models_of([wrong])
    (tmp_path / "lr=0.1" / "model").mkdir(parents=True)
    assert served(["lr=0.1/model", "rate=lr=0.1/model"]) == {"model": "lr=0.1/model", "rate": "lr=0.1/model"}
    assert eval_command.models_of(["lr=0.1/model"]) == ["lr=0.1/model"]
    result = invoke("serve", "--model", "a/x", "--model", "b/x")
    assert result.stderr == "error: --model: expected NAME=FOLDER with names that differ, got 'b/x'\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "-o"], "error: --output: expected a folder, got the file 'taken'\n"),
        (["bench", "--report-only", "--report"], "error: --report: expected a folder, got the file 'taken'\n"),
        (["convert", "nowhere"], "error: out: expected a folder, got the file 'taken'\n"),
    ],
)
def test_a_file_in_place_of_the_folder_to_write(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("kept")
    result = invoke(*arguments, "taken")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", words)
    assert (tmp_path / "taken").read_text() == "kept"
