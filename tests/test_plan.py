"""The planner against the bytes that a real step holds, and what it says."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import changed, make_base
from transformers import AutoConfig

from lora_rm import plan as plan_module
from lora_rm.cli import main
from lora_rm.config import ModelSettings, check_settings, save_settings
from lora_rm.console import console
from lora_rm.data.batches import microbatches
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import ConfigError, ModelError
from lora_rm.losses import preference_losses
from lora_rm.model import device as device_module
from lora_rm.model.base import BaseModel, find_config
from lora_rm.model.classifier import read_config
from lora_rm.model.device import host_memory
from lora_rm.model.memory import Held, LiveBytes, one_pair, rows_to_trace, trace_without_data
from lora_rm.model.reward_model import RewardModel
from lora_rm.plan import (
    GIB,
    MODES,
    UNMEASURED,
    Machine,
    _device_key,
    calibrate,
    fit,
    machine_here,
    plan,
    read_memory,
    remedies,
    show_plan,
    tokens_per_second,
)
from lora_rm.train import build_optimizer
from lora_rm.workflow import open_model, train_run

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
GPT2 = {"n_embd": 256, "n_layer": 6, "n_head": 8, "n_inner": 1024}
SHAPES = [
    ("llama", "nf4", "float32", {}),
    ("qwen3", "nf4", "bfloat16", {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    ("mistral", "nf4", "float32", {}),
    ("phi3", "none", "float32", {}),
    ("gemma2", "nf4", "float32", {"num_hidden_layers": 4, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    (
        "gemma3_text",
        "nf4",
        "bfloat16",
        {
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    ("gpt2", "nf4", "float32", {}),
]
"""Family, quantisation, type of products, and what its config needs.

Fewer layers, and a third of the tokens, in bfloat16: a CPU without units for it multiplies at a fiftieth of its speed.
"""


def write_config(folder, family="llama", **values):
    """A folder with config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    shape = {**WIDE, "vocab_size": 512, "model_type": family, **values}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def settings_for(base, *, quantization="nf4", compute="float32", checkpointing="none", adapter=None, **train):
    return check_settings(
        {
            "model": {
                "base": str(base), "quantization": quantization, "compute_dtype": compute, "device": "cpu",
                "load_dtype": "float32" if (quantization, compute) == ("none", "float32") else "bfloat16",
            },
            "adapter": adapter or {"rank": 8, "alpha": 16},
            "data": {"max_length": 512},
            "train": {"checkpointing": checkpointing, "tokens_per_microbatch": 2048, "batching": "shared", **train},
        }
    )  # fmt: skip


def real_peak(base, settings):
    """Peak of a second optimizer step with real tensors, as `train` takes it, and the tokens of its longest row."""
    model = RewardModel.load(
        BaseModel(name=str(base), path=base),
        settings=settings.model,
        adapter=settings.adapter,
    )
    model.set_checkpointing([settings.train.checkpointing] * len(model.layers))
    model.choose_batching("shared")
    model.train()
    optimizer = build_optimizer(model, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)

    def some(longest):  # lengths vary, as they do in data
        length = int(torch.randint(longest - 12, longest, (), generator=generator))
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    def step(trees, budget):
        rows = microbatches(trees, budget)
        tokens = 0
        for group in rows:
            batch = model.batch(group)
            losses = preference_losses(model.rewards(batch), group, settings.loss)
            (losses.sum() / len(trees)).backward()
            tokens = max(tokens, batch.input_ids.numel())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return tokens

    count = 1 if settings.model.compute_dtype == "bfloat16" else 3
    trees = [TokenTree(some(342), (some(170), some(170))) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its moments
    live = LiveBytes()
    live.hold(model)
    live.see(*(value for state in optimizer.state.values() for value in state.values()))
    with live:
        tokens = step(trees, 2048)
    return live.peak, tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quantization", "compute", "more", "use_dora"),
    [(*shape, False) for shape in SHAPES] + [(*SHAPES[0], True), (*SHAPES[3], True)],
)
def test_the_planned_peak_is_that_of_a_real_step(
    tmp_path, family, quantization, compute, more, use_dora, show
):
    shape = GPT2 if family == "gpt2" else WIDE
    base = make_base(tmp_path / family, family, **{**shape, **more})
    wanted = {
        "quantization": quantization,
        "compute": compute,
        "adapter": {"rank": 8, "alpha": 16, "use_dora": use_dora},
    }
    planned = plan(settings_for(base, **wanted), 8 * GIB)
    for mode in MODES:
        settings = settings_for(base, **wanted, checkpointing=mode)
        real, tokens = real_peak(base, settings)
        expected = planned.lasting + planned.peaks[mode].at(tokens)
        show(
            f"{family} {'DoRA ' * use_dora}{quantization} {compute} {mode}: planned {expected / 2**20:.1f} MiB, "
            f"real {real / 2**20:.1f} MiB ({expected / real - 1:+.1%}), {tokens} tokens"
        )
        assert expected == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(("compute", "vocabulary"), [("bfloat16", 400), ("bfloat16", 3000), ("float32", 400)])
def test_the_planned_peak_of_float32_checks_is_that_of_scoring(
    tmp_path, monkeypatch, compute, vocabulary, show
):
    """Where embeddings become float32, or the largest layer is dequantised, whichever is more."""
    monkeypatch.setattr(plan_module, "MODES", MODES[-1:])  # what is kept for a backward pass counts nothing
    base = make_base(tmp_path / "llama", "llama", **WIDE, vocab_size=vocabulary)
    settings = settings_for(base, compute=compute)
    model = RewardModel.load(
        BaseModel(name=str(base), path=base), settings=settings.model, adapter=settings.adapter
    )
    model.choose_batching("shared")
    live = LiveBytes()
    live.hold(model)
    with live, model.precise():
        model.score([TokenTree([5, 6], ([7], [8]))])
    planned = plan(settings, 8 * GIB).checks
    show(
        f"checks in float32 after {compute}, {vocabulary} tokens: planned {planned / 2**20:.2f} MiB, "
        f"real {live.peak / 2**20:.2f} MiB ({planned / live.peak - 1:+.1%})"
    )
    assert planned == pytest.approx(live.peak, rel=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("configs") / "llama", num_hidden_layers=12)


@pytest.fixture(scope="module")
def planned(folder):
    """The plan of a small Llama on a card that is not here."""
    return plan(settings_for(folder, compute="auto", checkpointing="full"), 8 * GIB, gpu=True)


def test_bytes_are_linear_in_layers_and_tokens(folder, planned):
    config = read_config(find_config(str(folder)))
    rows = [[one_pair(700, number=number) for number in range(4)]]
    for mode in MODES:
        held, ((tokens, peak),) = trace_without_data(
            config, planned.settings, mode, torch.bfloat16, "shared", 12, rows, on_gpu=True
        )
        assert planned.peaks[mode].at(tokens) == pytest.approx(peak, rel=0.01)
        for name in ("quantized", "frozen", "trained", "num_weights", "num_linear"):
            assert getattr(planned.held, name) == pytest.approx(getattr(held, name), rel=1e-6)


def test_parts_are_what_they_are_known_to_be(planned):
    linear = 12 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 704)
    assert planned.held.num_linear == linear
    assert planned.held.quantized == pytest.approx(
        linear * 4.127 / 8 + 84 * 1100, rel=0.01
    )  # and two tables a layer
    adapter = 12 * 8 * ((256 + 256) * 2 + (256 + 128) * 2 + (256 + 704) * 3)
    assert planned.held.trained == 4 * (adapter + 256)
    assert planned.optimizer == 2 * planned.held.trained
    in_8_bit = dataclasses.replace(planned.settings.train, optimizer="paged_adamw_8bit")
    settings = dataclasses.replace(planned.settings, train=in_8_bit)
    # two moments of a byte for each value of four
    assert dataclasses.replace(planned, settings=settings).optimizer == planned.held.trained / 2
    assert planned.workspace == 2 * 256 * 704
    assert planned.machine == UNMEASURED["cuda"]


def test_rows_that_fit_and_those_that_do_not(planned, monkeypatch):
    for mode in MODES:
        longest = planned.largest(mode)
        assert planned.needed(mode, longest) <= planned.memory < planned.needed(mode, longest + 1)
    settings = planned.settings

    available = 0.0

    def fixed_plan(settings, memory=None):
        train = settings.train
        if train.tokens_per_microbatch == "auto":
            settings = dataclasses.replace(
                settings, train=dataclasses.replace(train, tokens_per_microbatch=1024)
            )
        return dataclasses.replace(planned, settings=settings, memory=memory or available)

    monkeypatch.setattr("lora_rm.plan.plan", fixed_plan)
    enough = planned.needed("full", planned.row) + 1

    def fitted(memory, **train):
        nonlocal available
        available = memory
        return fit(dataclasses.replace(settings, train=dataclasses.replace(settings.train, **train)))

    assert fitted(enough, checkpointing="full") == (settings, None)  # on a CPU nothing is planned unasked
    found, chosen = fitted(enough, checkpointing="auto")
    assert chosen.layer_modes == ["full"] * 12
    found, chosen = fitted(enough, checkpointing="full", tokens_per_microbatch="auto")
    assert found.train.row == pytest.approx(planned.row, abs=1)
    # a byte more, for half of the way is rounded
    middle = (planned.needed("selective", planned.row) + planned.needed("full", planned.row)) / 2 + 1
    _, chosen = fitted(middle, checkpointing="auto")
    assert chosen.layer_modes == ["full"] * 6 + ["selective"] * 6
    _, chosen = fitted(100 * GIB, checkpointing="auto")
    assert chosen.layer_modes == ["none"] * 12
    with pytest.raises(ConfigError, match=r"tokens_per_microbatch \d+") as caught:
        fitted(enough, checkpointing="none", tokens_per_microbatch="auto")
    assert f"{enough / GIB:.2f} GiB are there" in str(caught.value)
    little = planned.needed("full", 400)
    with pytest.raises(ConfigError, match="data.max_length"):
        fitted(little, checkpointing="auto")
    words = " ".join(remedies(fixed_plan(settings, little)))
    assert "data.max_length" in words
    assert "a device with 1 GiB" in words
    assert "nf4" not in words  # it is that already


def test_rows_of_auto_hold_the_longest_pair(planned):
    """Two conversations of 10,000 tokens are one row, longer than auto would make it."""
    settings = dataclasses.replace(
        planned.settings,
        data=dataclasses.replace(planned.settings.data, max_length=10_000),
        train=dataclasses.replace(planned.settings.train, tokens_per_microbatch="auto"),
    )
    enough = dataclasses.replace(planned, settings=settings, memory=100 * GIB)
    assert (enough.open_row, enough.is_fitting) == (20_000, True)
    assert enough.with_row(20_000).fits("full")
    least = enough.needed("full", 20_000)
    assert dataclasses.replace(enough, memory=least - 1).is_fitting is False
    short = dataclasses.replace(planned, settings=dataclasses.replace(planned.settings, train=settings.train))
    assert dataclasses.replace(short, memory=100 * GIB).open_row == 16_384
    assert dataclasses.replace(short, memory=short.needed("full", 3000) + 1).open_row == pytest.approx(
        3000, abs=1
    )


def test_a_card_that_is_not_here_is_not_taken_for_the_one_that_was_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lora_rm.plan.machine_here", lambda device: Machine(kind="cuda", context=9e9, slack=9.0)
    )
    monkeypatch.setattr(plan_module, "MODES", MODES[-1:])
    assert plan(settings_for(folder), 8 * GIB, gpu=True).machine == UNMEASURED["cuda"]


@pytest.mark.parametrize("text", ["", "[1]", '{"%s": {"context": 1, "speed": 2}}', '{"%s": 3}'])
def test_a_calibration_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch, text):
    monkeypatch.setenv("LORA_RM_CACHE", str(tmp_path))
    key = _device_key(torch.device("cpu"))
    (tmp_path / "calibration.json").write_text(text.replace("%s", key))
    assert machine_here(torch.device("cpu")) == UNMEASURED["cpu"]


def test_a_container_has_less_than_its_machine_and_its_page_cache_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(device_module, "CGROUP", tmp_path)
    machine = host_memory()
    assert 0 < machine[1] <= machine[0]
    (tmp_path / "memory.max").write_text(f"{2**28}\n")
    (tmp_path / "memory.current").write_text(f"{2**27 + 2**25}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2**27}\nactive_file {2**24}\ninactive_file {2**24}\n")
    assert host_memory() == (2**28, 2**27)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory()[0] == machine[0]


def test_a_plan_needs_config_json_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr(console, "quiet", False)
    assert main(["plan", str(folder), "--gpu", "8GiB", "--data.max-length", "512"]) == 0
    printed = capsys.readouterr().out
    for words in ("weights in nf4", "float32 checks", "It fits", "full", "--calibrate", "8.00 GiB"):
        assert words in printed
    assert "rows of 4096 tokens; checkpointing none in 12 layers." in " ".join(printed.split())


def test_a_plan_tells_what_training_would_do(planned, capsys, monkeypatch):
    """Which layers keep what, the rows that auto stands for, and whether to start."""
    monkeypatch.setattr(console, "quiet", False)
    middle = (planned.needed("selective", planned.row) + planned.needed("full", planned.row)) / 2 + 1

    def shown(memory, **train):
        train = dataclasses.replace(planned.settings.train, **train)
        settings = dataclasses.replace(planned.settings, train=train)
        fits = show_plan(dataclasses.replace(planned, settings=settings, memory=memory))
        return fits, " ".join(capsys.readouterr().out.split())

    fits, text = shown(middle, checkpointing="auto")
    assert fits
    assert "checkpointing selective in 6 layers, full in 6 layers." in text
    fits, text = shown(planned.needed("full", 1500) + 1, tokens_per_microbatch="auto")
    assert fits
    assert "with rows of 1500 tokens" in text
    fits, text = shown(planned.needed("full", 1000), tokens_per_microbatch="auto")
    assert not fits
    assert "It does not fit." in text


def test_training_keeps_to_the_plan(settings, monkeypatch):
    """What does not fit is told before a base is loaded; of what fits half, the upper layers keep more."""
    wanted = changed(settings, train={"checkpointing": "auto"})
    planned = plan(wanted)
    assert planned.num_layers > 2
    few, plenty = planned.needed("full", planned.row) - 1, planned.needed("none", planned.row) + 1
    middle = (planned.needed("selective", planned.row) + planned.needed("full", planned.row)) / 2

    def with_memory(memory):
        monkeypatch.setattr(plan_module, "plan", lambda _: dataclasses.replace(planned, memory=memory))

    with_memory(few)
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "load", lambda *_, **__: pytest.fail("loads what cannot fit"))
        with pytest.raises(ConfigError, match="Training .* needs .* GiB with rows of"):
            train_run(wanted)
    assert not Path(wanted.output_dir).exists()
    modes = []
    monkeypatch.setattr(RewardModel, "set_checkpointing", lambda _, chosen: modes.append([*chosen]))
    for memory, kept in ((plenty, ["none"] * 3), (middle, ["full", "full", "selective"])):
        with_memory(memory)
        open_model(*fit(wanted))
        assert modes[-1] == kept


def test_a_plan_that_does_not_fit_ends_with_exit_status_1(folder, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["plan", str(folder), "--gpu", "512MiB"])


def test_speed_comes_from_an_earlier_run(planned, tmp_path):
    assert tokens_per_second(planned) is None
    lines = [{"step": n, "tokens_per_second": n * 100.0} for n in (1, 2, 3)] + [{"step": 3, "eval": {}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = dataclasses.replace(planned.settings, output_dir=str(tmp_path))
    assert (
        tokens_per_second(dataclasses.replace(planned, settings=settings)) is None
    )  # no run: whose speed is it?
    save_settings(
        dataclasses.replace(settings, model=ModelSettings(base="another")), tmp_path / "config.yaml"
    )
    assert tokens_per_second(dataclasses.replace(planned, settings=settings)) is None
    save_settings(settings, tmp_path / "config.yaml")
    assert tokens_per_second(dataclasses.replace(planned, settings=settings))[0] == 200.0
    machine = dataclasses.replace(planned.machine, flops=6 * planned.held.num_linear)
    assert tokens_per_second(dataclasses.replace(planned, machine=machine))[0] == 1.0


@pytest.mark.parametrize(
    ("max_train", "max_steps", "batching"),
    [(48, 0, "auto"), (44, 0, "auto"), (48, 4, "auto"), (48, 0, "padded")],  # of 44 the last step has 4
)
def test_the_time_of_a_run_is_that_of_the_tokens_it_computes(
    settings, capsys, monkeypatch, max_train, max_steps, batching
):
    monkeypatch.setattr(console, "quiet", False)
    data = {"train": settings.data.train, "max_train": max_train, "max_eval": 40}
    train = dataclasses.asdict(settings.train)
    train |= {"max_steps": max_steps, "num_epochs": 2.0, "batching": batching}
    settings = check_settings({**dataclasses.asdict(settings), "data": data, "train": train})
    train_run(settings)
    lines = [
        json.loads(line) for line in (Path(settings.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    computed = sum(line.get("num_tokens", 0) for line in lines)
    capsys.readouterr()
    show_plan(plan(settings))
    printed = " ".join(capsys.readouterr().out.split())
    tokens = float(re.search(r"hours of steps for ([\d,]+) tokens", printed)[1].replace(",", ""))
    assert tokens == pytest.approx(computed, rel=1e-9)


def test_a_gpu_without_the_kernels_needs_no_more_than_planned(monkeypatch):
    """Of an activation's backward pass, at which a recomputed layer peaks, there are the two gradients, with kernels or torch."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 512}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=2, num_labels=1, pad_token_id=0)

    def peak():
        how = (config, check_settings({}), "full", torch.bfloat16, "shared", 3, [[one_pair(1024)]])
        return trace_without_data(*how, on_gpu=True)[1][0][1]

    with_kernels = peak()
    monkeypatch.setattr("lora_rm.model.cuda_kernels.kernels_for", lambda *_: None)
    assert peak() == with_kernels


def test_a_calibration_is_kept_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_RM_CACHE", str(tmp_path))
    machine = calibrate("cpu")
    assert machine.slack == pytest.approx(1.0, abs=0.02)
    assert machine.flops > 1e8
    assert machine_here(torch.device("cpu")) == machine


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("24", 24 * GIB), ("24GB", 24e9), ("512MiB", GIB / 2)]
)
def test_memory_is_read(text, size):
    assert read_memory(text) == size


@pytest.mark.parametrize("text", ["much", "-1GiB", "0", "nanGB", "24 TB", "inf"])
def test_memory_that_is_none(text):
    with pytest.raises(ConfigError, match="--gpu is"):
        read_memory(text)


def test_what_cannot_be_traced_is_named(folder):
    with pytest.raises(ModelError, match="adapter.use_dora is true with model.quantization int8"):
        plan(settings_for(folder, quantization="int8", adapter={"use_dora": True}))


def test_a_base_or_device_that_is_not_there_is_told_once(folder, capsys, monkeypatch):
    monkeypatch.setattr(console, "quiet", False)
    settings = settings_for(folder, checkpointing="auto")
    for name, value in (("base", "no/folder/here"), ("device", "cuda:99"), ("device", "gpu")):
        model = dataclasses.replace(settings.model, **{name: value})
        with pytest.raises(ModelError, match=value):
            fit(dataclasses.replace(settings, model=model))
    assert capsys.readouterr().out == ""


def test_a_model_without_config_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no config.json"):
        plan(settings_for(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no/model cannot be fetched from the hub"):
        plan(settings_for("no/model"))


def test_a_sharded_base_is_planned_by_its_parts():
    """Of 70B shapes in NF4: 36 GB of codes and constants, 2.1 GB of embeddings, 80 layers."""
    whole = Held(quantized=36e9, frozen=2.1e9, largest_frozen=1.05e9)
    part = whole.sharded(4, 80, double=True, held_bytes=2)
    constants = 36e9 * 0.127 / 4.127
    assert part.quantized == pytest.approx(constants + (36e9 - constants) / 4)
    assert part.frozen == pytest.approx(
        2.1e9 / 4 + 2 * 2.1e9
    )  # embeddings are larger than three layers of 0.45 GB


@pytest.mark.parametrize("max_length", [8, 64, 512])
def test_short_conversations_of_a_wide_model_are_traced_at_their_length(max_length):
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma2", hidden_size=3584)
    settings = settings_for("base")
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_length=max_length))
    for trees in rows_to_trace(config, settings, "shared"):
        for tree in trees:
            assert 0.9 * max_length <= len(tree.prompt_ids) + len(tree.answer_ids[0]) <= max_length + 1
            assert all(tree.answer_ids)


@pytest.mark.parametrize(("other", "found"), [((True, 2500), 2500), ((False, 0), None)])
def test_the_smallest_card_of_all_processes_decides(settings, monkeypatch, other, found):
    own = changed(settings, train={"tokens_per_microbatch": "auto"})
    assert fit(own)[0].train.tokens_per_microbatch > 2500
    monkeypatch.setattr("lora_rm.plan.processes.gather", lambda value: [value, other])
    if found is None:
        with pytest.raises(ConfigError, match="What would help"):
            fit(own)
    else:
        assert fit(own)[0].train.tokens_per_microbatch == found
