"""The training loop: what moves, what must not matter, and what happens when something goes wrong."""

import dataclasses
import json
import math
import os
import random
import re
import resource
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import changed, data_of, rewrite_manifest
from safetensors.torch import load_file, save_file

from lora_rm import checkpoint as checkpoint_module
from lora_rm import train as train_module
from lora_rm.checkpoint import (
    RunFolder,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    remove_old,
    save_checkpoint,
)
from lora_rm.cli import main
from lora_rm.config import save_settings
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import ConfigError, Interrupted, ModelError
from lora_rm.evaluate import evaluate
from lora_rm.metrics import MetricsLog, memory_gib, read_metrics
from lora_rm.model import cpu_attention, cpu_kernels
from lora_rm.model.cpu_library import has_instructions
from lora_rm.train import count_steps, train
from lora_rm.workflow import open_model, train_run


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def run_once(settings, trees):
    run = RunFolder.create(settings)
    model = open_model(settings)
    train(model, data_of(trees), settings, run)
    return model, run


@pytest.mark.parametrize("begun_in", ["float32", "bfloat16"])
def test_a_run_that_goes_on_on_other_hardware_keeps_the_type_of_its_products(
    settings, trees, monkeypatch, capsys, begun_in
):
    other = {"float32": "bfloat16", "bfloat16": "float32"}[begun_in]
    compiles = has_instructions()  # attention and kernels are those of this machine in all runs
    for module in (cpu_attention, cpu_kernels):
        monkeypatch.setattr(module, "has_instructions", lambda: compiles)
    short = changed(settings, model={"compute_dtype": "auto"}, train={"max_steps": 4, "save_every_steps": 2})
    run, found = RunFolder.create(short), []
    for dtype in (begun_in, begun_in, other):
        if found:
            shutil.rmtree(run.checkpoints / "step-000004")
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda dtype=dtype: dtype == "bfloat16")
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
        model = open_model(short)
        assert model.compute_dtype == getattr(torch, dtype)
        progress = train(model, data_of(trees), short, run, resume=bool(found))
        assert model.compute_dtype == getattr(torch, begun_in)
        found.append((progress.compute_dtype, trained_weights(model)))
    assert [dtype for dtype, _ in found] == [begun_in] * 3
    for _, again in found[1:]:
        for name, weight in found[0][1].items():
            assert torch.equal(weight, again[name]), name
    assert f"in {begun_in}, as where this run was begun" in capsys.readouterr().out


def give_losses(monkeypatch, *losses):
    """Lets the evaluations of a run have these losses."""
    real, left = train_module.evaluate, iter(losses)
    monkeypatch.setattr(train_module, "evaluate", lambda *a: dataclasses.replace(real(*a), loss=next(left)))


def test_a_run_that_goes_on_computes_attention_as_before(settings, trees, capsys):
    """Cores round differently, and another one may be the fastest when a run is resumed."""
    short = changed(settings, train={"max_steps": 4, "save_every_steps": 2})
    run, found = RunFolder.create(short), []
    for cores in (["gathered", "answers"], ["answers", "gathered"], ["answers"]):
        model = open_model(short)
        model._cores = {torch.float32: cores}
        progress = train(model, data_of(trees), short, run, resume=bool(found))
        found.append((progress.core, trained_weights(model)))
    assert [core for core, _ in found] == ["gathered", "gathered", "answers"]
    for name, weight in found[0][1].items():
        assert torch.equal(weight, found[1][1][name]), name
    assert "computed with the core gathered, which cannot be used here" in capsys.readouterr().out


def test_every_trained_parameter_moves_and_no_other_does(settings, trees):
    model = open_model(settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, data_of(trees), settings, RunFolder.create(settings))
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same != parameter.requires_grad, f"{name} {'did not move' if same else 'moved'}"
    assert model.head.requires_grad


def test_the_seed_decides_where_training_starts(settings):
    first, again, other = (trained_weights(open_model(changed(settings, seed=seed))) for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, other[name]) == ("lora_B" in name), name


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_how_rows_are_cut_into_microbatches_changes_nothing(settings, quantization, trees, chat):
    ranking = TokenTree(
        [1, 9, 8], ([4, 2], [5, 6, 2], [7, 2], [10, 11, 12, 2]), kind="ranking", scores=(3.0, 1.0, 2.0, 0.0)
    )
    rating = TokenTree([1, 9], ([14, 2],), kind="rating", scores=(0.7,))
    mixed = [ranking, *trees[:3], rating, *trees[3:6]]
    found = []
    for number, budget in enumerate((16, 4096)):  # eight rows of one, one row of eight
        own = changed(
            settings,
            output_dir=f"{settings.output_dir}{number}",
            model={"quantization": quantization},
            loss={"centering": 0.01},
            train={"tokens_per_microbatch": budget, "max_steps": 3},
        )
        model, run = run_once(own, mixed)
        found.append((trained_weights(model), [line["loss"] for line in lines(run)]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for name, weight in found[0][0].items():
        torch.testing.assert_close(weight, found[1][0][name], rtol=1e-3, atol=2e-5, msg=name)


def test_it_learns_sixteen_pairs_by_heart(settings, trees):
    own = changed(settings, train={"num_epochs": 25, "learning_rate": 3e-3, "schedule": "constant"})
    model, run = run_once(own, trees[:16])
    assert evaluate(model, trees[:16]).pairs.accuracy == 1.0
    assert lines(run)[-1]["loss"] < 0.1 < lines(run)[0]["loss"]


def test_the_learning_rate_rises_and_reaches_its_end_value_on_the_last_step(settings, trees, monkeypatch):
    kept = []
    real = train_module.get_scheduler
    monkeypatch.setattr(train_module, "get_scheduler", lambda *a: kept.append(real(*a)) or kept[-1])
    own = changed(settings, train={"num_epochs": 2, "warmup_share": 0.2, "learning_rate": 1e-3})
    _, run = run_once(own, trees[:40])
    rates = [line["learning_rate"] for line in lines(run)]
    assert len(rates) == count_steps(40, own) == 10
    assert rates[0] == 0 < rates[1] < rates[2] == 1e-3
    assert kept[0].get_last_lr() == [0.0]


def test_a_run_of_one_step_is_not_all_warm_up(settings, trees):
    own = changed(settings, train={"max_steps": 1, "warmup_share": 1.0})
    model, run = run_once(own, trees)
    assert [line["learning_rate"] for line in lines(run)] == [1e-3]
    assert any(weight.any() for name, weight in trained_weights(model).items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("constant", [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_takes_its_course_after_the_warm_up(settings, trees, schedule, shares):
    own = changed(settings, train={"schedule": schedule, "warmup_share": 1 / 3, "max_steps": 6})
    _, run = run_once(own, trees)
    assert [line["learning_rate"] for line in lines(run)] == pytest.approx([1e-3 * share for share in shares])


@pytest.mark.parametrize(
    ("num_epochs", "max_steps", "expected"),
    [(0.5, 0, 3), (1.5, 0, 9), (0.01, 0, 1), (2.0, 5, 5), (0.5, 5, 3)],
)
def test_epochs_may_be_a_fraction(settings, num_epochs, max_steps, expected):
    own = changed(settings, train={"num_epochs": num_epochs, "max_steps": max_steps})
    assert count_steps(44, own) == expected  # six steps an epoch, the last one of four preferences


def test_lines_are_shown_as_often_as_asked_and_for_the_last_step(settings, trees, capsys):
    run_once(changed(settings, train={"max_steps": 5, "log_every_steps": 2}), trees)
    assert re.findall(r"step (\d)/5", capsys.readouterr().out) == ["2", "4", "5"]


def test_lora_plus_gives_the_b_matrices_a_rate_of_their_own(settings):
    own = changed(settings, adapter={"lora_plus_ratio": 8.0})
    model = open_model(own)
    optimizer = train_module.build_optimizer(model, own)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        fast = {("lora_B" in names[id(p)]) for p in group["params"]}
        assert fast == {group["lr"] == pytest.approx(8e-3)}
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == sorted(names)


@pytest.mark.parametrize("lora_plus_ratio", [1.0, 8.0])
def test_the_optimizer_is_adamw_with_the_numbers_that_were_set(settings, lora_plus_ratio):
    numbers = {"weight_decay": 0.03, "adam_beta1": 0.83, "adam_beta2": 0.97}
    own = changed(settings, adapter={"lora_plus_ratio": lora_plus_ratio}, train=numbers)
    optimizer = train_module.build_optimizer(open_model(own), own)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.03, (0.83, 0.97), 1e-8)


def test_gradients_are_scaled_down_to_a_norm_that_is_not_0():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    for highest, expected in ((0.0, [30.0, 0.0, 40.0]), (60.0, [30.0, 0.0, 40.0]), (5.0, [3.0, 0.0, 4.0])):
        parameters[0].grad, parameters[1].grad = torch.tensor([30.0, 0.0]), torch.tensor([40.0])
        assert train_module._gradient_norm(parameters, highest) == 50.0
        assert [*parameters[0].grad.tolist(), *parameters[1].grad.tolist()] == pytest.approx(expected)


def poison(monkeypatch, *steps):
    """Makes the loss of these steps NaN, of a run with one row a step."""
    real, calls = train_module.preference_losses, []

    def poisoned(rewards, *rest):
        calls.append(1)
        return real(rewards, *rest) * (math.nan if len(calls) in steps else 1.0)

    monkeypatch.setattr(train_module, "preference_losses", poisoned)


def test_a_non_finite_step_is_skipped_and_counted(settings, trees, monkeypatch, capsys):
    poison(monkeypatch, 2)
    own = changed(settings, train={"tokens_per_microbatch": 65536, "max_steps": 4})
    model, run = run_once(own, trees)
    assert [line["num_skipped"] for line in lines(run)] == [0, 1, 1, 1]
    assert lines(run)[1]["loss"] is None
    assert "Step 2 is skipped" in capsys.readouterr().out
    assert all(torch.isfinite(weight).all() for weight in trained_weights(model).values())


def test_skipped_steps_that_are_not_in_a_row_stop_nothing(settings, trees, monkeypatch):
    poison(monkeypatch, 2, 4)
    own = changed(settings, train={"tokens_per_microbatch": 65536, "max_steps": 5, "max_skipped_steps": 2})
    progress = train(open_model(own), data_of(trees), own, RunFolder.create(own))
    assert (progress.step, progress.num_skipped, progress.skipped_in_a_row) == (5, 2, 0)


@pytest.mark.parametrize("scale", [1024.0, 1.0])
def test_a_gradient_that_overflows_lowers_the_loss_scale(settings, trees, monkeypatch, capsys, scale):
    """As of float16 products, whose loss stays finite; a scale of 1 cannot be what is too high."""
    monkeypatch.setattr(train_module, "_loss_scale", lambda _: torch.amp.GradScaler("cpu", init_scale=scale))
    own = changed(settings, train={"tokens_per_microbatch": 65536, "max_steps": 2, "max_skipped_steps": 1})
    model, run, calls = open_model(own), RunFolder.create(own), []
    model.head.register_hook(
        lambda gradient: calls.append(1) or gradient * (math.inf if len(calls) == 1 else 1.0)
    )
    if scale == 1.0:
        with pytest.raises(ModelError, match="1 steps in a row"):
            train(model, data_of(trees), own, run)
        return
    progress = train(model, data_of(trees), own, run)
    assert (progress.step, progress.num_skipped, progress.skipped_in_a_row) == (2, 1, 0)
    assert progress.scaler["scale"] == 512.0
    assert "Step 1 is skipped: its gradient overflows with a loss scale of 1024." in capsys.readouterr().out
    assert [math.isfinite(line["loss"]) for line in lines(run)] == [True, True]


def test_too_many_skipped_steps_stop_the_run_with_a_diagnosis(settings, trees):
    own = changed(settings, train={"max_skipped_steps": 2})
    model = open_model(own)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).fill_(float("nan"))
    with pytest.raises(ModelError, match="2 steps in a row.*lora_A.*Lower train.learning_rate"):
        train(model, data_of(trees), own, RunFolder.create(own))


def stop_after(monkeypatch, stop_at):
    """Sends SIGTERM when a step's numbers are written; undone by `monkeypatch.undo`."""
    real = MetricsLog.step

    def step(self, number, values):
        real(self, number, values)
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "step", step)


def signals_in_step(monkeypatch, stop_at, *signals):
    """Sends signals one after the other while a step's rewards are turned into a loss."""
    real, calls = train_module.preference_losses, []

    def interrupted(*rest):
        calls.append(1)
        for number in signals if len(calls) == stop_at else ():
            os.kill(os.getpid(), number)
        return real(*rest)

    monkeypatch.setattr(train_module, "preference_losses", interrupted)


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ([], None),
        ([signal.SIGINT], Interrupted),
        ([signal.SIGTERM, signal.SIGTERM], Interrupted),
        ([signal.SIGINT, signal.SIGINT], KeyboardInterrupt),
        ([signal.SIGTERM, signal.SIGINT], KeyboardInterrupt),
    ],
)
def test_a_second_ctrl_c_stops_at_once_and_handlers_are_put_back(
    settings, trees, monkeypatch, signals, expected
):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    own = changed(settings, train={"tokens_per_microbatch": 65536, "max_steps": 3})
    run, before = RunFolder.create(own), handlers()
    signals_in_step(monkeypatch, 2, *signals)
    with pytest.raises(expected) if expected else nullcontext():
        train(open_model(own), data_of(trees), own, run)
    assert handlers() == before
    saved = {None: ["step-000003"], Interrupted: ["step-000002"], KeyboardInterrupt: []}[expected]
    assert [path.name for path in run.checkpoints.glob("*")] == saved


@pytest.mark.parametrize(("stop_at", "dtype"), [(4, "float32"), (12, "float32"), (4, "bfloat16")])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(settings, monkeypatch, capsys, stop_at, dtype):
    """SIGTERM at a step of 12, dropout on, evaluation on; bit for bit the run that was not stopped."""
    own = changed(
        settings,
        model={"compute_dtype": dtype},
        adapter={"dropout": 0.1},
        train={"num_epochs": 2, "eval_every_steps": 3, "save_every_steps": 5},
    )
    straight = train_run(changed(own, output_dir=own.output_dir + "-straight"))
    stop_after(monkeypatch, stop_at)
    with pytest.raises(Interrupted, match=f"step {stop_at} of 12.*--resume"):
        train_run(own)
    monkeypatch.undo()
    stopped = train_run(own, resume=True)
    assert "Going on from" in capsys.readouterr().out
    expected, found = (load_file(run.adapter / "adapter_model.safetensors") for run in (straight, stopped))
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    steps = [line["step"] for line in lines(stopped) if "loss" in line]
    assert steps == list(range(1, 13))
    same = [("step", "loss", "grad_norm", "learning_rate"), ("step", "eval")]
    for keys in same:
        pick = [
            [{k: line[k] for k in keys} for line in lines(run) if keys[1] in line]
            for run in (straight, stopped)
        ]
        assert pick[0] == pick[1]


def test_a_damaged_checkpoint_is_passed_over(settings, trees):
    own = changed(
        settings, train={"save_every_steps": 2, "keep_checkpoints": 3, "max_steps": 7, "num_epochs": 3}
    )
    _, run = run_once(own, trees)
    folders = sorted(path.name for path in run.checkpoints.iterdir())
    assert folders == ["step-000004", "step-000006", "step-000007"]
    file = run.checkpoints / "step-000007" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-7] + b"damaged")
    found, passed_over = newest_checkpoint(run.checkpoints)
    assert found.name == "step-000006"
    assert "step-000007 was passed over: optimizer.safetensors is damaged" in passed_over[0]


@pytest.mark.parametrize(("keep", "damaged", "stop_at"), [(2, (8, 9), 3), (1, (9,), 9)])
def test_damaged_checkpoints_take_no_place_of_whole_ones(
    settings, trees, monkeypatch, capsys, keep, damaged, stop_at
):
    """Stopped after 9 steps, and again after it went on from before the damage."""
    own = changed(
        settings, train={"save_every_steps": 4, "keep_checkpoints": 2, "num_epochs": 2, "max_steps": 12}
    )
    run = RunFolder.create(own)
    stop_after(monkeypatch, 9)
    with pytest.raises(Interrupted):
        train(open_model(own), data_of(trees), own, run)
    monkeypatch.undo()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000008", "step-000009"]
    for step in damaged:
        break_weights(run.checkpoints / f"step-{step:06d}")
    own = changed(own, train={"keep_checkpoints": keep})
    for stop in (stop_at, stop_at + 1):
        stop_after(monkeypatch, stop)
        with pytest.raises(Interrupted, match=f"at step {stop} of"):
            train(open_model(own), data_of(trees), own, run, resume=True)
        monkeypatch.undo()
        assert newest_checkpoint(run.checkpoints)[0].name == f"step-{stop:06d}"
        names = {path.name for path in run.checkpoints.iterdir()}
        assert {f"unusable-step-{step:06d}" for step in damaged} <= names
        assert len(names - {f"unusable-step-{step:06d}" for step in damaged}) <= keep
    said = capsys.readouterr().out
    assert ("No checkpoint can be used: training starts at the first step." in said) == (len(damaged) == 2)
    assert "There is no checkpoint yet" not in said
    assert f"Going on from {run.checkpoints / f'step-{stop_at:06d}'}" in said


@pytest.mark.parametrize(
    ("damage", "start"), [("flipped", 4), ("missing", 4), ("with its step", 2), ("with all steps", 0)]
)
def test_a_damaged_best_state_is_found_and_made_again(settings, trees, monkeypatch, capsys, damage, start):
    """The best of 6 steps is the fourth; checkpoints of the second and later ones are there."""

    def fourth_is_best(model, data, settings, metrics, progress):
        if progress.step == 4:
            progress.best_step, progress.best_loss = 4, 0.5

    monkeypatch.setattr(train_module, "_evaluate", fourth_is_best)
    own = changed(
        settings, train={"eval_every_steps": 1, "save_every_steps": 2, "keep_checkpoints": 9, "max_steps": 6}
    )
    model, run = run_once(own, trees)
    best = run.checkpoints / "best-000004"
    break_weights(best)
    if damage == "missing":
        shutil.rmtree(best)
    if damage in ("with its step", "with all steps"):
        break_weights(run.checkpoints / "step-000004")
    if damage == "with all steps":
        break_weights(run.checkpoints / "step-000002")
    again = open_model(own)
    capsys.readouterr()
    train(again, data_of(trees), own, run, resume=True)
    said = capsys.readouterr().out
    assert (f"step-{start:06d}." if start else "No checkpoint can be used") in said
    expected, found = trained_weights(model), trained_weights(again)
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())
    assert newest_checkpoint(run.checkpoints)[1] == []


def test_a_best_state_that_is_damaged_meanwhile_says_how_to_go_on(settings, trees, monkeypatch):
    own = changed(settings, train={"eval_every_steps": 2, "max_steps": 4, "save_every_steps": 1})
    run, real = RunFolder.create(own), MetricsLog.step

    def step(self, number, values):
        real(self, number, values)
        if number == 3:
            break_weights(run.checkpoints / "best-000002")

    monkeypatch.setattr(MetricsLog, "step", step)
    give_losses(monkeypatch, 0.5, 0.6)
    with pytest.raises(
        ModelError, match="best-000002: the best state cannot be put back, since model.*--resume"
    ):
        train(open_model(own), data_of(trees), own, run)


def break_weights(folder):
    """Flips a bit."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.parametrize("manifest", ["[]", '{"../x": "0"}', '{"/dev/zero": "0"}', '{"gone": "0"}'])
def test_a_manifest_that_names_what_is_no_file_of_the_checkpoint_is_damage(tmp_path, manifest):
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "manifest.json").write_text(manifest)
    assert newest_checkpoint(tmp_path)[0] is None


def test_half_a_manifest_is_damage_too(tmp_path):
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "manifest.json").write_text('{"model.safe')
    found, passed_over = newest_checkpoint(tmp_path)
    assert found is None
    assert "step-000002 was passed over: its manifest" in passed_over[0]


def test_a_checkpoint_puts_every_random_state_back(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }
    draw()  # leaves half of a pair of normal numbers in both generators
    save_checkpoint(tmp_path / "step-000001", **parts, progress={"step": 1})
    expected = draw()
    draw()
    assert load_checkpoint(tmp_path / "step-000001", **parts) == {"step": 1}
    assert draw() == expected


def test_other_libraries_than_those_of_the_checkpoint_are_named(settings, trees, capsys):
    own = changed(settings, train={"save_every_steps": 1, "max_steps": 2})
    run = RunFolder.create(own)
    train(open_model(own), data_of(trees[:16]), own, run)
    state = run.checkpoints / "step-000002" / "state.json"
    values = json.loads(state.read_text())
    assert torch.__version__.startswith(values["versions"]["torch"].split("+")[0])
    values["versions"]["torch"] = "2.0.0"
    state.write_text(json.dumps(values))
    rewrite_manifest(state.parent)
    capsys.readouterr()
    train(open_model(own), data_of(trees[:16]), own, run, resume=True)
    said = capsys.readouterr().out
    assert "other libraries (torch was 2.0.0, is " in said
    assert "transformers" not in said


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    save_file({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, tmp_path / "model.safetensors")
    load_weights(tmp_path, torch.nn.Linear(2, 1))
    for wider in (torch.nn.Linear(2, 3), torch.nn.Linear(2, 1, bias=False)):
        with pytest.raises(ModelError, match="not those of this model"):
            load_weights(tmp_path, wider)


def test_only_the_newest_checkpoints_and_the_best_are_kept(settings, trees, monkeypatch):
    give_losses(monkeypatch, 0.7, 0.6, 0.5)
    own = changed(
        settings, train={"save_every_steps": 1, "keep_checkpoints": 2, "eval_every_steps": 2, "max_steps": 6}
    )
    _, run = run_once(own, trees)
    names = ["best-000004", "best-000006", "step-000005", "step-000006"]  # step 5 still calls 4 the best
    assert sorted(path.name for path in run.checkpoints.iterdir()) == names


def test_checkpoints_are_told_by_their_numbers_and_copies_of_them_left_alone(tmp_path):
    copies = ["best-000002-mine", "step-000002-mine", "step-9", "best-x"]
    for name in ("best-000002", "step-999999", "step-1000000", *copies):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
        (tmp_path / name / "state.json").write_text('{"progress": {"best_step": 0}}')
    assert newest_checkpoint(tmp_path)[0].name == "step-1000000"
    remove_old(tmp_path, 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["step-1000000", *copies])


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(settings, trees, monkeypatch, capsys, call):
    """As of a folder that another program holds on a network disk."""
    own = changed(settings, train={"save_every_steps": 1, "keep_checkpoints": 1, "max_steps": 3})
    owner = Path if call == "rename" else shutil
    real = getattr(owner, call)

    def refusing(path, *rest, **more):
        names = [str(path), *map(str, rest)]
        if any(name.endswith("step-000001.removed") for name in names):
            raise OSError(16, "Device or resource busy")
        return real(path, *rest, **more)

    monkeypatch.setattr(owner, call, refusing)
    run = run_once(own, trees)[1]
    assert (
        "step-000001: cannot be removed (Device or resource busy); training goes on."
        in capsys.readouterr().out
    )
    names = {"rename": ["step-000001", "step-000003"], "rmtree": [".step-000001.removed", "step-000003"]}
    assert sorted(path.name for path in run.checkpoints.iterdir()) == names[call]


def test_training_stops_early_and_puts_the_best_state_back(settings, trees, monkeypatch, capsys):
    """The evaluation loss is made to rise after the second one; the weights at the end are the second's."""
    seen, real = [], train_module.evaluate

    def rising(model, *rest):
        seen.append(trained_weights(model))
        return dataclasses.replace(real(model, *rest), loss=[0.6, 0.5, 0.7, 0.8][len(seen) - 1])

    monkeypatch.setattr(train_module, "evaluate", rising)
    own = changed(settings, train={"eval_every_steps": 1, "early_stopping": 2, "num_epochs": 3})
    model, _ = run_once(own, trees)
    assert len(seen) == 4
    printed = capsys.readouterr().out
    assert "No better evaluation since step 2: training stops at step 4" in printed
    assert "The weights of step 2 of 4 are put back: there the evaluation loss was lowest, 0.5000." in printed
    for name, weight in trained_weights(model).items():
        assert torch.equal(weight, seen[1][name]), name
    assert not all(torch.equal(weight, seen[3][name]) for name, weight in trained_weights(model).items())


def test_a_better_evaluation_starts_the_count_of_early_stopping_anew(settings, trees, monkeypatch):
    give_losses(monkeypatch, 0.6, 0.7, 0.5, 0.6, 0.6)
    own = changed(settings, train={"eval_every_steps": 1, "early_stopping": 2, "num_epochs": 3})
    progress = train(open_model(own), data_of(trees), own, RunFolder.create(own))
    assert (progress.step, progress.best_step) == (5, 3)


def test_the_last_step_is_evaluated_too(settings, trees):
    _, run = run_once(changed(settings, train={"max_steps": 5, "eval_every_steps": 2}), trees)
    assert [line["step"] for line in lines(run) if "eval" in line] == [2, 4, 5]


def test_a_run_that_has_stopped_early_is_over(settings, trees, monkeypatch):
    """Stopped by hand at the very step at which it would have stopped by itself, it does not train on."""
    give_losses(monkeypatch, 0.5, 0.5)
    own = changed(settings, train={"eval_every_steps": 1, "early_stopping": 1, "num_epochs": 3})
    run, model = RunFolder.create(own), open_model(own)
    show = MetricsLog.step
    monkeypatch.setattr(
        MetricsLog,
        "step",
        lambda self, n, values: (show(self, n, values), n == 2 and os.kill(os.getpid(), signal.SIGTERM)),
    )
    with pytest.raises(Interrupted, match="step 2 of"):
        train(model, data_of(trees), own, run)
    progress = train(open_model(own), data_of(trees), own, run, resume=True)
    assert (progress.step, progress.best_step) == (2, 1)


def test_a_paged_optimizer_without_a_gpu_is_refused(settings, trees):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ConfigError, match="needs a GPU"):
        run_once(changed(settings, train={"optimizer": "paged_adamw_8bit"}), trees)


def test_an_earlier_run_is_not_overwritten(settings):
    RunFolder.create(settings)
    (Path(settings.output_dir) / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="--resume`, or replace it with --overwrite True"):
        RunFolder.create(settings)
    run = RunFolder.create(changed(settings, overwrite=True))
    assert run.metrics.is_file()  # until the new run begins
    for _ in range(2):
        run.begin()
        assert [path.name for path in run.path.iterdir()] == ["config.yaml"]
    run.metrics.write_text("{}")
    run.begin()  # no second time
    assert run.metrics.is_file()


def test_only_what_a_run_makes_is_overwritten(settings):
    run = RunFolder.create(settings)
    (run.path / "notes.txt").write_text("mine")
    (run.path / ".git").mkdir()
    (run.path / ".metrics.partial").write_text("")
    (run.path / "metrics.jsonl").write_text("{}")
    RunFolder.create(changed(settings, overwrite=True)).begin()
    assert sorted(path.name for path in run.path.iterdir()) == [".git", "config.yaml", "notes.txt"]
    assert not run.settings().overwrite  # the file, run again by mistake, deletes nothing
    run.config.write_text("defaults: [db: mysql]\n")  # another program's
    with pytest.raises(ConfigError, match="defaults"):
        RunFolder.create(changed(settings, overwrite=True))
    assert (run.path / "notes.txt").is_file()


def test_a_run_that_was_moved_goes_on(settings, trees, tmp_path):
    short = changed(settings, train={"max_steps": 2, "save_every_steps": 1})
    run = run_once(short, trees)[1]
    moved = tmp_path / "elsewhere"
    os.close(checkpoint_module._LOCKS.pop(os.path.realpath(run.path)))  # as if its process had ended
    run.path.rename(moved)
    now = changed(short, output_dir=str(moved))
    assert RunFolder.create(now, resume=True).settings().output_dir == str(moved)


def test_resume_by_the_file_of_a_run_goes_where_the_file_lies(settings, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("lora_rm.workflow.train_run", lambda settings, **_: found.append(settings.output_dir))
    (tmp_path / "moved").mkdir()
    file = tmp_path / "moved" / "config.yaml"
    save_settings(settings, file)
    main(["train", str(file), "--resume"])  # a file of the user's own: nothing tells that a run lies there
    (tmp_path / "moved" / "inputs.json").write_text("{}")
    main(["train", str(file), "--resume"])
    main(["train", str(file), "--resume", "--output-dir", "other"])
    assert found == [settings.output_dir, str(tmp_path / "moved"), "other"]


def test_a_loss_scale_changes_no_step_and_is_resumed(settings, trees, monkeypatch):
    """That of float16 products, which a CPU does not compute: here around float32 ones, growing at every other step."""
    scaled = lambda model: torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)  # noqa: E731
    short = changed(settings, train={"max_steps": 5, "save_every_steps": 3})
    plain = trained_weights(run_once(changed(short, output_dir=f"{short.output_dir}-plain"), trees)[0])
    monkeypatch.setattr(train_module, "_loss_scale", scaled)
    model, run = run_once(short, trees)
    assert {
        name: torch.equal(weight, plain[name]) for name, weight in trained_weights(model).items()
    } == dict.fromkeys(plain, True)
    state = json.loads((run.checkpoints / "step-000003" / "state.json").read_text())["progress"]["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (2048.0, 1)
    shutil.rmtree(run.checkpoints / "step-000005")
    again = open_model(short)
    progress = train(again, data_of(trees), short, RunFolder.create(short, resume=True), resume=True)
    assert progress.scaler["scale"] == 4096.0
    assert all(torch.equal(weight, plain[name]) for name, weight in trained_weights(again).items())
    with torch.no_grad():
        next(p for name, p in again.named_parameters() if "lora_A" in name).fill_(float("nan"))
    own = changed(short, output_dir=f"{short.output_dir}-nan", train={"max_steps": 1})
    assert (
        train(again, data_of(trees), own, RunFolder.create(own)).scaler["scale"] == 512.0
    )  # lower after an overflow


def test_float16_products_need_a_gpu(settings):
    with pytest.raises(ModelError, match="float16, which needs a GPU"):
        open_model(changed(settings, model={"compute_dtype": "float16", "device": "cpu"}))


def test_an_evaluation_that_is_not_finite_is_never_the_best(settings, trees, monkeypatch):
    give_losses(monkeypatch, math.nan, 1.0, 2.0)
    own = changed(settings, train={"max_steps": 3, "eval_every_steps": 1})
    model = open_model(own)
    progress = train(model, data_of(trees), own, RunFolder.create(own))
    assert (progress.best_loss, progress.best_step) == (1.0, 2)
    found = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (Path(own.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["eval"]["loss"] for line in found if "eval" in line] == [None, 1.0, 2.0]


def test_lines_of_metrics_after_an_unreadable_one_stay(tmp_path):
    """Only an unterminated line at the end goes, whose step is written again."""
    file = tmp_path / "metrics.jsonl"
    bad = [bytes(20), b"[1]", b'{"step": [1]}', b"half of one\xff"]
    good = [b'{"step": 1}', b'{"step": 2}', b'{"step": 2, "eval": {}}']
    whole = b"\n".join([good[0], *bad, *good[1:], b""])
    file.write_bytes(whole + b'{"step": 3, "loss"')
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 2]
    log = MetricsLog(file, 3)
    for step in (1, 2, 3):
        log._write({"step": step})
    assert file.read_bytes() == whole + b'{"step": 3}\n'


def test_a_folder_that_is_no_run_is_left_alone(settings, tmp_path):
    own = changed(settings, output_dir=str(tmp_path), overwrite=True)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty and no run"):
        RunFolder.create(own)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_tensorboard_gets_the_metrics(settings, trees):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own = changed(settings, train={"trackers": ["tensorboard"], "max_steps": 2, "eval_every_steps": 1})
    _, run = run_once(own, trees)
    (file,) = run.path.rglob("hparams.yml")
    assert "adapter.rank: 4" in file.read_text()
    file = min(run.path.rglob("events.out.tfevents.*"), key=lambda file: len(file.parts))
    events = EventAccumulator(str(file))
    events.Reload()
    for name in ("loss", "accuracy", "grad_norm", "learning_rate"):
        expected = {line["step"]: line[name] for line in lines(run) if "eval" not in line}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected)
    expected = {line["step"]: line["eval"]["loss"] for line in lines(run) if "eval" in line}
    assert {event.step: event.value for event in events.Scalars("eval/loss")} == pytest.approx(expected)


def test_memory_is_said_in_gib():
    """Linux gives the process' peak in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    assert memory_gib(torch.device("cpu")) == pytest.approx(peak, rel=0.05)


def test_dropout_does_not_depend_on_what_was_drawn_before(settings, trees):
    found = []
    for drawn in (1, 2):
        more = {"output_dir": f"{settings.output_dir}{drawn}", "adapter": {"dropout": 0.3}}
        own = changed(settings, **more, train={"max_steps": 1, "warmup_share": 0.0})
        model, run = open_model(own), RunFolder.create(own)
        torch.manual_seed(drawn)  # as an evaluation before it may
        train(model, data_of(trees[:8]), own, run)
        found.append(model.head.detach().clone())
    assert torch.equal(*found)
