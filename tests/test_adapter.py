"""Where the adapter starts, and that what it was trained to is what is saved, opened and merged."""

from dataclasses import replace

import pytest
import torch
from conftest import make_base, make_model, saved, shake
from peft import PeftConfig

from lora_rm.checkpoint import RunFolder
from lora_rm.config import AdapterSettings, DataSettings, MergeSettings, ModelSettings, check_settings
from lora_rm.data.split import Data, Side
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import ConfigError, ModelError
from lora_rm.merge import merge
from lora_rm.model.adapter import lora_layers
from lora_rm.model.quantization import code_hashes
from lora_rm.model.reward_model import RewardModel
from lora_rm.train import train

CHANGING = {"quantization": "none", "load_dtype": "float32"}
"""What an initialisation that changes the base needs."""

STARTS = {
    "default": {},
    "gaussian": {},
    "orthogonal": {},
    "loftq": {},
    "eva": {},
    "pissa": CHANGING,
    "olora": CHANGING,
}

VARIANTS = [
    {},
    {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 5.0, "q_proj": 3.0}},
]


def started(base, trees, init, **more):
    """A model whose adapter has its start."""
    if init == "eva":
        more.pop("rank_pattern", None)
    adapter = AdapterSettings(rank=4, alpha=12.0, init=init, **more)
    model = make_model(base, adapter=adapter, **STARTS[init])
    if init == "eva":
        model.start_from_data(trees[:24], 512)
    return model


def reopened(model, folder):
    """The model as its adapter's folder gives it."""
    model.save(folder, model.describe(code_hashes(model.classifier)))
    opened = RewardModel.load_adapter(folder, compute_dtype="float32")
    opened.choose_batching()
    return opened


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "rslora_patterns"])
@pytest.mark.parametrize("init", STARTS)
def test_saved_opened_and_merged_with_the_same_rewards(base, trees, init, variant, tmp_path):
    model = shake(started(base, trees, init, **variant))
    model.eval()
    expected = torch.tensor(model.score(trees[:6]))
    opened = reopened(model, tmp_path / "adapter")
    torch.testing.assert_close(torch.tensor(opened.score(trees[:6])), expected, rtol=1e-4, atol=1e-4)
    merge(tmp_path / "adapter", tmp_path / "merged", MergeSettings(dtype="float32"))
    merged = RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32")
    merged.choose_batching()
    torch.testing.assert_close(torch.tensor(merged.score(trees[:6])), expected, rtol=1e-4, atol=1e-4)


def test_of_two_patterns_that_fit_a_layer_the_same_counts_after_a_reload(base, trees, tmp_path):
    patterns = {"up_proj": 5.0, r"layers\.1\.mlp\.up_proj": 40.0}  # not in the order in which PEFT saves them
    model = shake(started(base, trees, "default", alpha_pattern=patterns))
    model.eval()
    expected = torch.tensor(model.score(trees[:6]))
    opened = reopened(model, tmp_path / "adapter")
    torch.testing.assert_close(torch.tensor(opened.score(trees[:6])), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["orthogonal", "eva", "pissa", "olora"])
def test_a_start_that_keeps_the_model(base, trees, init):
    """All but LoftQ begin with the rewards of the base, whatever they took out of it."""
    plain = make_model(base, adapter=AdapterSettings(rank=4, alpha=12.0), **STARTS[init])
    model = started(base, trees, init)
    for one, other in zip(model.score(trees[:4]), plain.score(trees[:4]), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    if init in ("pissa", "olora"):
        name = "layers.0.self_attn.q_proj"
        changed = model.backbone.get_submodule(name).get_base_layer().weight
        assert not torch.allclose(
            changed, plain.backbone.get_submodule(name).get_base_layer().weight, atol=1e-3
        )


def test_loftq_brings_the_weights_nearer_to_the_original(base, trees):
    """The sum of 4-bit values and update is the best one of its rank, whatever alpha is."""
    original = make_model(base, **CHANGING)
    model = started(base, trees, "loftq")
    for name in ("layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"):
        layer = model.backbone.get_submodule(name)
        wanted = original.backbone.get_submodule(name).get_base_layer().weight
        before = layer.get_base_layer()(torch.eye(wanted.shape[1])).T
        after = layer(torch.eye(wanted.shape[1])).T
        values = torch.linalg.svdvals(wanted - before)
        best = values[4:].square().sum().sqrt()
        assert float((wanted - after).norm()) == pytest.approx(float(best), rel=2e-2)
        assert best < 0.95 * values.square().sum().sqrt()


def test_eva_finds_the_main_directions_of_the_inputs(base, trees):
    model = started(base, trees, "eva")
    layer = model.backbone.get_submodule("layers.1.mlp.down_proj")
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    model.score(trees[:24], 512)
    handle.remove()
    inputs = torch.cat(seen) - torch.cat(seen).mean(0)
    rows = layer.lora_A["default"].weight.detach()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=1e-3, atol=1e-3)
    most = torch.linalg.svdvals(inputs)[:4].square().sum()  # no four directions hold more of the variance
    assert float((inputs @ rows.T).square().sum() / most) > 0.97
    assert not layer.lora_B["default"].weight.any()


def test_eva_looks_at_every_token_of_the_last_layer(base, trees, monkeypatch):
    """PEFT passes over rows with fewer than 16 inputs, and waits for others: there are four ends of answers here."""
    model = make_model(base, adapter=AdapterSettings(rank=16, alpha=12.0, init="eva"))
    plain, passes = model.rewards, []

    def counted(batch):
        passes.append(batch)
        assert len(passes) < 200
        return plain(batch)

    monkeypatch.setattr(model, "rewards", counted)
    model.start_from_data(trees[:2], 4096)
    assert model._last_layer is not None
    for _, layer in lora_layers(model.backbone):
        rows = layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(rows @ rows.T, torch.eye(16), rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="at least 16 tokens, and the longest here has 4"):
        model.start_from_data([TokenTree([1, 2], ([3], [4]))], 4096)
    with pytest.raises(ConfigError, match="rank_pattern cannot be joined with adapter.init eva"):
        check_settings({"adapter": {"init": "eva", "rank_pattern": {"q_proj": 8}}})


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_resume_goes_on_from_the_same_start(init, base, preferences, trees, held_out, tmp_path):
    """Stopped after two of four steps and resumed: bit for bit the undisturbed adapter."""
    data = Data(Side(preferences[0][:16], trees[:16]), Side(preferences[1], held_out), {})

    def run(name, **more):
        settings = check_settings(
            {
                "output_dir": str(tmp_path / name),
                "model": {"base": str(base), **STARTS[init]},
                "adapter": {"rank": 4, "alpha": 12.0, "init": init},
                "train": {
                    "preferences_per_step": 4,
                    "tokens_per_microbatch": 512,
                    "save_every_steps": 2,
                    **more,
                },
            }
        )
        return settings

    def trained(settings, resume=False):
        run_folder = RunFolder.create(settings, resume)
        model = started(base, trees, init)
        train(model, data, settings, run_folder, resume=resume)
        return model, run_folder

    whole, _ = trained(run("whole"))
    _, folder = trained(run("cut"))
    resumed, _ = trained(run("cut"), resume=True)
    assert (folder.checkpoints / "step-000002").is_dir()
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_another_start_is_no_place_to_resume(base, preferences, trees, held_out, tmp_path):
    data = Data(Side(preferences[0][:8], trees[:8]), Side(preferences[1], held_out), {})
    settings = check_settings(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"base": str(base), **CHANGING},
            "adapter": {"rank": 4, "alpha": 12.0, "init": "pissa"},
            "train": {"preferences_per_step": 4, "save_every_steps": 1},
        }
    )
    model = started(base, trees, "pissa")
    train(model, data, settings, RunFolder.create(settings))
    other = make_base(tmp_path / "other", dtype=torch.float32)  # the values that bfloat16 rounded
    with pytest.raises(ModelError, match="took something else out of the base"):
        train(
            started(other, trees, "pissa"),
            data,
            settings,
            RunFolder.create(settings, resume=True),
            resume=True,
        )


@pytest.mark.parametrize("init", ["olora", "loftq"])
def test_weights_stored_the_other_way_round_are_refused(tmp_path, trees, init):
    base = make_base(tmp_path / "gpt2", "gpt2", dtype=torch.float32)
    with pytest.raises(ModelError, match=f"adapter.init is {init}"):
        started(base, trees, init)


@pytest.mark.parametrize(
    "wrong",
    [{"target_modules": ("q_prj",)}, {"target_modules": ("q_proj", "v_prj")}, {"layers_to_transform": (99,)}],
    ids=["none fits", "one does not", "no such layer"],
)
def test_a_target_that_names_no_layer_is_an_error(base, wrong):
    with pytest.raises(ModelError, match="q_proj, .*up_proj, v_proj"):
        make_model(base, adapter=AdapterSettings(rank=4, alpha=12.0, **wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"layers_to_transform": (1, 2, 3)},
            r"has \[3\]; this model has 3 layers, 0 to 2. Its upper half is \[1, 2\]",
        ),
        ({"target_modules": ("all-linear", "q_proj")}, "has all-linear and 1 more"),
        ({"rank_pattern": {"q_prj": 8}}, "rank_pattern has 'q_prj', which no layer"),
        ({"alpha_pattern": {"layers.9.*": 8.0}}, "alpha_pattern has"),
        ({"target_modules": ("q_proj",), "rank_pattern": {"v_proj": 8}}, "rank_pattern has 'v_proj'"),
    ],
)
def test_settings_that_pick_no_layer_are_errors(base, wrong, message):
    with pytest.raises(ModelError, match=message):
        make_model(base, adapter=AdapterSettings(rank=4, alpha=12.0, **wrong))


def test_patterns_that_pick_a_layer_pass(base):
    patterns = {"q_proj": 8, r"model.layers.1.mlp.up_proj": 2, r"layers\.2\.mlp\..*_proj": 6}
    model = make_model(base, adapter=AdapterSettings(rank=4, alpha=12.0, rank_pattern=patterns))
    ranks = {name: layer.lora_A["default"].weight.shape[0] for name, layer in lora_layers(model.model)}
    assert ranks["model.layers.0.self_attn.q_proj"] == 8
    assert ranks["model.layers.1.mlp.up_proj"] == 2
    assert ranks["model.layers.2.mlp.down_proj"] == 6


@pytest.mark.parametrize(
    "variant", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 8}}]
)
def test_training_starts_from_a_saved_adapter(base, trees, variant, tmp_path, capsys):
    shape = {"rank": 4, "alpha": 12.0, **variant}
    model = shake(make_model(base, adapter=AdapterSettings(**shape)))
    expected = model.score(trees[:6])
    model.save(tmp_path / "adapter", model.describe(code_hashes(model.classifier)))
    start = str(tmp_path / "adapter")
    again = make_model(base, seed=1, adapter=AdapterSettings(start_from=start, **shape))
    assert again.score(trees[:6]) == expected
    assert "trained with another" not in capsys.readouterr().out
    RewardModel.load(
        str(base),
        settings=ModelSettings(compute_dtype="float32"),
        adapter=AdapterSettings(start_from=start, **shape),
        data=DataSettings(chat_template="plain"),
    )
    assert f"{start} was trained with another template_sha256" in capsys.readouterr().out
    assert all(p.requires_grad for name, p in again.named_parameters() if "lora_" in name)
    for other, message in (
        ({"rank": 8}, "has another shape .*r is 8, there 4"),
        ({"alpha": 4.0}, "lora_alpha is 4.0, there 12.0"),
        ({"target_modules": ("q_proj",)}, "adapts other layers"),
    ):
        with pytest.raises(ModelError, match=message):
            make_model(base, adapter=AdapterSettings(start_from=start, **{**shape, **other}))
    with pytest.raises(
        ModelError, match="trained with model.quantization nf4.*; this run has quantization none"
    ):
        make_model(base, quantization="none", adapter=AdapterSettings(start_from=start, **shape))


def test_a_saved_adapter_names_its_base_on_the_hub_and_not_the_folder_it_was_fetched_to(
    base, tmp_path, monkeypatch
):
    """And nothing asks the hub for it, which may not answer at the end of a night."""
    model = shake(make_model(base))
    monkeypatch.setattr("huggingface_hub.file_exists", pytest.fail)
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", pytest.fail)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", pytest.fail)
    model.base = replace(model.base, name="org/model", revision="abc")
    config = PeftConfig.from_pretrained(saved(model, tmp_path / "adapter"))
    assert (config.base_model_name_or_path, config.revision) == ("org/model", "abc")
