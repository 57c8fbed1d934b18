"""Rewards and every gradient of a packed, prefix-shared row equal those of separate conversations."""

import dataclasses
import functools

import pytest
import torch
from conftest import (
    FAMILIES,
    assert_same_gradients,
    compiles,
    gradients,
    make_base,
    make_model,
    make_tokenizer,
    separate,
    shake,
    some_trees,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_rm.data.batches import build_batch
from lora_rm.data.tokens import TokenTree
from lora_rm.model import block_attention as block_attention_module
from lora_rm.model import cpu_attention, cpu_kernels, cpu_library
from lora_rm.model import tree_attention as tree_attention_module
from lora_rm.model.reward_model import _probe
from lora_rm.model.tree_attention import time_cores, tree_attention


@pytest.mark.parametrize("batching", ["shared", "packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_equal_separate_conversations(tmp_path, family, batching):
    base = make_base(tmp_path / family, family, dtype=torch.float32)
    model = shake(make_model(base, quantization="none", load_dtype="float32"))
    model.train()
    trees = some_trees(model.classifier.config.vocab_size)
    expected = separate(model, trees)
    expected_gradients = gradients(model, expected)
    model.set_batching(batching)
    found = model.rewards(build_batch(trees, batching))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found_gradients = gradients(model, found)
    assert len(found_gradients) > 10
    assert_same_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("core", ["answers", "blocks", "gathered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_conversations_begin_with_is_computed_once(tmp_path, family, core):
    """Two groups of prompts after one system prompt, which is longer than the windows of 8."""
    base = make_base(tmp_path / family, family, dtype=torch.float32)
    model = shake(make_model(base, quantization="none", load_dtype="float32"))
    model.train()
    first = list(range(3, 14))
    trees = [
        dataclasses.replace(tree, prompt_ids=first + tree.prompt_ids)
        for tree in some_trees(model.classifier.config.vocab_size)
    ]
    trees += [TokenTree(first, ([5, 6, 7], [8]))]  # its prompt is the stem and nothing else
    expected = separate(model, trees)
    expected_gradients = gradients(model, expected)
    model.set_batching("shared")
    batch = build_batch(trees, "shared", core)
    assert batch.input_ids.numel() == 11 + 46 + 4
    found = model.rewards(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, found), expected_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_at_the_start_chooses_sharing(tmp_path, family, capsys):
    model = make_model(
        make_base(tmp_path / family, family, dtype=torch.float32), quantization="none", load_dtype="float32"
    )
    assert model.batching == "shared", capsys.readouterr().out


def test_a_recurrent_hybrid_falls_back_to_padded_with_one_line(tmp_path, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    from lora_rm.config import AdapterSettings

    model = make_model(
        tmp_path / "hybrid", quantization="none", load_dtype="float32",
        adapter=AdapterSettings(rank=2, alpha=6.0, target_modules=("q_proj", "v_proj")),
    )  # fmt: skip
    assert model.batching == "padded"
    lines = [line for line in capsys.readouterr().out.splitlines() if "padded" in line]
    assert len(lines) == 1
    assert "of 4 layers" in lines[0]
    trees = some_trees(len(tokenizer))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.rewards(model.batch(trees)), separate(model, trees), rtol=1e-4, atol=1e-5
        )


def test_an_encoder_with_a_score_head_falls_back_to_padded_with_one_line(tmp_path, capsys):
    """A decoder's weights with attention both ways, as embedding models have it: sharing would not be exact."""
    base = make_base(tmp_path / "both", "gemma3_text", dtype=torch.float32, use_bidirectional_attention=True)
    model = make_model(base, quantization="none", load_dtype="float32")
    assert model.batching == "padded"
    lines = [line for line in capsys.readouterr().out.splitlines() if "padded" in line]
    assert len(lines) == 1
    assert "not causal" in lines[0]
    trees = some_trees(model.classifier.config.vocab_size)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.rewards(model.batch(trees)), separate(model, trees), rtol=1e-4, atol=1e-5
        )


def test_an_encoder_without_one_is_refused(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    from lora_rm.errors import ModelError

    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="encoders are not"):
        make_model(tmp_path / "bert", quantization="none")


@pytest.mark.parametrize("head_init", ["normal", "zero"])
def test_a_way_of_batching_that_is_not_exact_is_refused_by_name(base, monkeypatch, head_init):
    from lora_rm.errors import ModelError
    from lora_rm.model import tree_attention

    model = make_model(base, head_init=head_init)
    real = torch.nn.functional.scaled_dot_product_attention

    def wrong(*args, is_causal=False, **kwargs):
        return real(*args, is_causal=False, **kwargs)  # every token sees the whole conversation

    monkeypatch.setattr(tree_attention.F, "scaled_dot_product_attention", wrong)
    with pytest.raises(ModelError, match="rewards differ"):
        model.choose_batching("shared")
    assert model.batching == "padded"


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_preferences_give_the_gradients_of_separate_ones(tmp_path, family):
    """Three pairs of one prompt with four answers: one tree, every answer once."""
    base = make_base(tmp_path / family, family, dtype=torch.float32)
    model = shake(make_model(base, quantization="none", load_dtype="float32"))
    model.train()
    prompt, *rest = some_trees(model.classifier.config.vocab_size)[0].conversations()
    answers = [ids[9:] for ids in (prompt, *rest)]
    trees = [
        TokenTree(prompt[:9], (answers[one], answers[other]), group="a")
        for one, other in ((0, 1), (2, 1), (2, 0))
    ]
    expected = separate(model, trees)
    expected_gradients = gradients(model, expected)
    model.set_batching("shared")
    batch = build_batch(trees)
    assert batch.input_ids.numel() == 9 + sum(map(len, answers))
    found = model.rewards(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, found), expected_gradients)


@pytest.mark.parametrize("core", ["blocks", "gathered"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_every_core_gives_the_same_gradients(tmp_path, monkeypatch, family, core):
    monkeypatch.setattr(block_attention_module, "BLOCK", 4)  # several blocks a piece
    base = make_base(tmp_path / family, family, dtype=torch.float32)
    model = shake(make_model(base, quantization="none", load_dtype="float32"))
    model.train()
    trees = some_trees(model.classifier.config.vocab_size)
    found = []
    for name in ("answers", core):
        rewards = model.rewards(build_batch(trees, "shared", name))
        found.append((rewards.detach(), gradients(model, rewards)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        assert float((found[1][1][name] - gradient).abs().max() / gradient.abs().max()) < 1e-5, name


autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
ON_CPU = ["blocks", pytest.param("compiled", marks=compiles)]

TREES = {
    "several": [
        TokenTree([1] * 200, ([2] * 150, [3] * 40)),
        TokenTree([1] * 190 + [4] * 30, ([5] * 20, [6] * 50)),
    ],
    "nothing shared": [TokenTree([], ([2] * 70, [3] * 33)), TokenTree([1] * 65, ([7],))],
    "many answers": [TokenTree([1] * 33, tuple([number] * (5 * number + 1) for number in range(9)))],
}


def attend_with(core, inputs, direction, plan, dtype):
    """Output and gradients of an attention core."""
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    output, _ = tree_attention(torch.nn.Identity(), *inputs, None, tree_plan=plan.with_core(core))
    output.backward(direction.transpose(1, 2).to(dtype))
    return [output.detach().float(), *(x.grad.float() for x in inputs)]


def random_rows(plan, heads, groups, size):
    """Queries that give scores of up to 40, keys, values and a gradient."""
    generator = torch.Generator().manual_seed(0)
    length = sum(plan.lengths)
    counts = (heads, groups, groups, heads)
    query, *others = (torch.randn(1, count, length, size, generator=generator).bfloat16() for count in counts)
    return query * 4, *others


@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(6, 2, 64), (3, 3, 16), (71, 1, 32), (8, 1, 80), (2, 1, 96), (3, 1, 256)]
)
@pytest.mark.parametrize("trees", TREES.values(), ids=TREES)
@pytest.mark.parametrize("core", ON_CPU)
def test_gradients_on_a_cpu_are_as_near_to_float32s_as_flash_attentions(core, trees, heads, groups, size):
    assert core == "blocks" or cpu_attention.is_to_be_had(heads, groups, size)
    plan = build_batch(trees).plan
    *inputs, direction = random_rows(plan, heads, groups, size)
    exact = attend_with("answers", inputs, direction, plan, torch.float32)
    flash = attend_with("answers", inputs, direction, plan, torch.bfloat16)
    ours = attend_with(core, inputs, direction, plan, torch.bfloat16)
    assert torch.equal(flash[0], ours[0]) or core == "compiled"
    for one, theirs, expected in zip(ours, flash, exact, strict=True):
        off, allowed = (float((x - expected).norm()) for x in (one, theirs))
        assert 0 < off < (2 if core == "blocks" else 1.02) * allowed
        # a key's gradient adds up those of its heads: of 71, flash attention's is 2 % off
        assert allowed < (0.025 if heads == 71 else 0.01) * float(expected.norm())


@compiles
def test_compiled_attention_gives_the_same_bits_with_any_number_of_threads():
    assert cpu_attention.is_to_be_had(6, 2, 64)
    plan = build_batch(TREES["several"]).plan
    *inputs, direction = random_rows(plan, 6, 2, 64)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            found.append(attend_with("compiled", inputs, direction, plan, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for run in found[1:] for one, other in zip(run, found[0], strict=True))


@pytest.mark.parametrize("core", ON_CPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_train_in_bfloat16_as_near_to_float32_as_answer_by_answer(tmp_path, family, core):
    """Gemma 2's scores are soft-capped, which torch computes; OLMo 2's queries and keys leave its positions in float32."""
    base = make_base(tmp_path / family, family, dtype=torch.bfloat16)
    model = shake(make_model(base, quantization="none", load_dtype="bfloat16"))
    model.train()
    model.set_batching("shared")
    trees = some_trees(model.classifier.config.vocab_size)

    def run(core, dtype):
        model.set_compute_dtype(dtype)
        assert core in model.exact_cores()
        rewards = model.rewards(build_batch(trees, "shared", core))
        found = gradients(model, rewards)
        return torch.cat([rewards.detach(), *(gradient.flatten() for gradient in found.values())])

    exact = run("answers", torch.float32)
    theirs, ours = run("answers", torch.bfloat16), run(core, torch.bfloat16)
    assert 0 < float((ours - exact).norm()) < 1.5 * float((theirs - exact).norm())


@compiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "gradient"])
def test_compiled_attention_hides_nothing_that_is_no_number(which, bad):
    assert cpu_attention.is_to_be_had(6, 2, 64)
    plan = build_batch(TREES["several"]).plan
    inputs = list(random_rows(plan, 6, 2, 64))
    inputs[which][0, 1, 230, 5] = bad
    expected, found = (
        [bool(x.isfinite().all()) for x in attend_with(core, inputs[:3], inputs[3], plan, torch.bfloat16)]
        for core in ("answers", "compiled")
    )
    assert not all(expected)
    assert not any(ours and not theirs for ours, theirs in zip(found, expected, strict=True))


@compiles
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, FakeTensorMode, autocast])
def test_compiled_attention_is_checked_wherever_it_is_first_asked_for(mode):
    with mode():
        assert cpu_attention._is_exact(64)
        assert cpu_kernels._kernels.__wrapped__()


@compiles
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "broken", "somebody else's"])
def test_without_a_compiler_torch_computes_the_attention(tmp_path, monkeypatch, capsys, compiler):
    if compiler == "somebody else's":
        (tmp_path / "cache/compiled").mkdir(parents=True)
        (tmp_path / "cache/compiled").chmod(0o777)
    elif compiler == "broken":  # it makes a library whose function does nothing
        source = tmp_path / "nothing.c"
        source.write_text("int compute(void *job, int threads) { return 0; }")
        monkeypatch.setattr(cpu_attention, "SOURCE", source)
    else:
        monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("LORA_RM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_attention, "_CHECKED", {})
    monkeypatch.setattr(cpu_attention, "library", cpu_library.library.__wrapped__)
    assert not cpu_attention.is_to_be_had(6, 2, 48)
    assert "Attention is computed by torch, which takes longer" in capsys.readouterr().out


@pytest.mark.parametrize("core", ON_CPU)
@pytest.mark.parametrize(
    "kind",
    [
        "values of another size",
        "strided",
        "a window",
        "soft-capped",
        "float32",
        "97 heads over one",
        "a size of its own",
    ],
)
def test_cores_of_a_cpu_leave_to_torch_what_they_would_compute_wrongly(kind, core):
    generator = torch.Generator().manual_seed(2)
    assert core == "blocks" or cpu_attention.is_to_be_had(4, 2, 16)
    plan = build_batch(some_trees(50)).plan
    heads, groups = (97, 1) if kind == "97 heads over one" else (4, 2)
    size = 24 if kind == "a size of its own" else 16
    inputs = [
        torch.randn(1, count, sum(plan.lengths), size, generator=generator)
        for count in (heads, groups, groups)
    ]
    if core == "compiled" and kind != "float32":
        inputs = [x.bfloat16() for x in inputs]
    if kind == "values of another size":
        inputs[2] = inputs[2][..., :6].contiguous()
    if kind == "strided":
        inputs = [x.mT.contiguous().mT for x in inputs]
    more = {"a window": {"sliding_window": 4}, "soft-capped": {"softcap": 2.0}}.get(kind, {})
    found = []
    for name in ("answers", core):
        own = [x.detach().requires_grad_() for x in inputs]
        output, _ = tree_attention(torch.nn.Identity(), *own, None, tree_plan=plan.with_core(name), **more)
        output.square().sum().backward()
        found.append([output, *(x.grad for x in own)])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_what_the_varlen_core_looks_up():
    plan = build_batch(some_trees(100), "shared", "varlen").plan
    assert plan.lengths == [13, 7, 1, 13, 3, 9]
    assert plan.indices["query_starts"].tolist() == [0, 13, 20, 21, 34, 37, 46]
    assert plan.indices["key_starts"].tolist() == [0, 13, 29, 39, 52, 56, 65]
    assert plan.indices["keys"].tolist()[13:29] == [*range(9), *range(13, 20)]
    assert plan.longest == (13, 16)


def test_what_the_varlen_core_looks_up_after_a_system_prompt():
    trees = [
        TokenTree([1, 2, 3], ([4, 5], [6])),
        TokenTree([1, 2, 7, 8], ([9],)),
        TokenTree([1, 2], ([3, 9],)),
    ]
    plan = build_batch(trees, "shared", "varlen").plan
    # row: 1 2 3 | 4 5 | 6 || 7 8 | 9 || 3 9
    assert plan.lengths == [5, 1, 3, 2]
    assert plan.indices["query_starts"].tolist() == [0, 5, 6, 9, 11]
    assert plan.indices["key_starts"].tolist() == [0, 5, 9, 14, 18]
    assert plan.indices["keys"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 6, 7, 8, 0, 1, 9, 10]
    assert plan.longest == (5, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_only_the_ends(tmp_path, family):
    model = make_model(
        make_base(tmp_path / family, family, dtype=torch.float32), quantization="none", load_dtype="float32"
    )
    batch = model.batch(some_trees(model.classifier.config.vocab_size))
    rows = []
    mlp = dict(model.layers[-1].named_modules())["mlp"]
    mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))  # after our own
    model.rewards(batch)
    tokens, answers = batch.input_ids.numel(), len(batch.score_index)
    assert [queries for queries, _ in batch.plan.calls] == [tokens, tokens, answers]
    assert rows == [answers]


def attend(module=None, **more):
    """Tree attention on random numbers, without a model."""
    plan = build_batch(some_trees(50)).plan
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(1, heads, sum(plan.lengths), 8, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    arguments = {"tree_plan": plan, **more}
    return tree_attention(module or torch.nn.Identity(), query, key, value, None, **arguments)[0]


def test_what_cannot_be_computed_exactly_is_refused():
    both_ways = torch.nn.Identity()
    both_ways.is_causal = False
    for wrong in ({"tree_plan": None}, {"s_aux": torch.zeros(4)}, {"module": both_ways}):
        with pytest.raises(NotImplementedError):
            attend(**wrong)


@pytest.mark.parametrize("core", ["answers", "blocks"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_of_the_attention_is_not_lost(softcap, core):
    how = {"softcap": softcap, "tree_plan": build_batch(some_trees(50), core=core).plan}
    assert torch.equal(attend(**how), attend(**how))
    assert float((attend(**how, dropout=0.9) == 0).float().mean()) > 0.1


def test_soft_capped_scores_do_not_wait_for_the_backward_pass():
    last = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: last.append(x.shape[-1]) or x, lambda x: x):
        found = attend(softcap=5.0)
    assert last
    assert set(last) == {8}  # of heads: queries, keys and values
    found.sum().backward()


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama", {}),
        ("llama", {"dropout": 0.3}),
        ("llama", {"use_dora": True}),
        ("qwen3", {}),
        ("phi3", {}),
        ("gpt2", {}),
        ("gemma2", {}),
    ],
)
def test_recomputed_layers_give_the_same_gradients(tmp_path, trees, family, adapter, quantization, mode):
    from lora_rm.config import AdapterSettings, ModelSettings
    from lora_rm.model.base import BaseModel
    from lora_rm.model.reward_model import RewardModel

    base = BaseModel(name="base", path=make_base(tmp_path / family, family, dtype=torch.float32))
    found, products, kept = [], [], []
    for checkpointing in ("none", mode):
        model = shake(
            RewardModel.load(
                base,
                settings=ModelSettings(quantization=quantization, compute_dtype="float32"),
                adapter=AdapterSettings(rank=4, alpha=12.0, **adapter),
            )
        )
        model.set_checkpointing([checkpointing] * len(model.layers))
        model.choose_batching("shared")
        model.train()
        torch.manual_seed(3)
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with Products() as counted, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rewards = model.rewards(model.batch(trees[:5]))
            kept.append(sum(storages.values()))
            found.append(gradients(model, rewards))
        products.append(counted.num_products)
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    # 64 columns: the base's products; selective repeats none of them, full all of the forward pass
    assert (products[1] > products[0]) == (mode == "full")
    has_known_parts = family in ("llama", "qwen3") and not adapter
    by_torch = [layer.gradient_checkpointing for layer in model.layers]
    assert by_torch == [mode == "full" or not has_known_parts] * 3
    if mode == "selective" and has_known_parts:
        assert kept[1] < 0.85 * kept[0]


def test_an_input_that_was_changed_in_place_is_kept_itself(tmp_path):
    """As routers with noise do: what it was made from would give another value."""
    model = shake(
        make_model(
            make_base(tmp_path / "llama", dtype=torch.float32), quantization="none", load_dtype="float32"
        )
    )
    trees, found = some_trees(model.classifier.config.vocab_size), []
    handles = [
        layer.input_layernorm.register_forward_hook(lambda *all: all[-1].mul_(1.5)) for layer in model.layers
    ]
    assert len(handles) == 3
    for mode in ("none", "selective"):
        model.set_checkpointing([mode] * 3)
        found.append(gradients(model.train(), model.rewards(model.batch(trees))))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


class Products(TorchDispatchMode):
    """Counts the products over more columns than the adapter's rank."""

    num_products = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.name().partition(".")[0] in ("aten::mm", "aten::addmm"):
            self.num_products += all(factor.shape[1] > 4 for factor in args[-2:])
        return operator(*args, **(kwargs or {}))


def test_cores_are_timed_with_their_backward_pass_wherever_scoring_asks_for_them():
    """Under no_grad, as `score` calls it, and without touching the random state of training."""
    before = torch.get_rng_state()
    with torch.no_grad():
        seconds = time_cores(torch.device("cpu"), torch.float32, 4, 2, 16)
    assert seconds.keys() == {"answers", "gathered"}  # the kernel of varlen needs CUDA
    assert all(taken > 0 for taken in seconds.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_core_of_a_cpu_is_not_a_matter_of_chance(base):
    model = make_model(base)
    assert model.exact_cores() == ["answers"]
    model.set_compute_dtype(torch.bfloat16)
    compiled = ["compiled"] if cpu_attention.is_to_be_had(4, 2, 16) else []
    assert model.exact_cores() == [*compiled, "blocks", "answers"]


def test_a_core_that_the_model_cannot_use_is_given_up(base, monkeypatch, capsys):
    """Flash attention does not run on a CPU, as it does not on a card without it."""
    model = make_model(base)
    model._cores = {dtype: ["varlen", "answers"] for dtype in (torch.float32, torch.bfloat16)}
    with model._random_head():
        model._check_core(_probe(90), torch.zeros(5))
    assert model.core == "answers"
    assert "the core varlen does not suit this model" in capsys.readouterr().out
    model._cores = {torch.float32: ["gathered", "answers"]}
    model.choose_batching()
    assert (model.batching, model.core) == ("shared", "gathered")


@pytest.mark.parametrize("fault", [False, True])
def test_a_core_may_round_as_much_as_the_model_does(base, monkeypatch, fault):
    """In a model that makes much of rounding all cores are off alike, which is no fault of any."""
    model = make_model(base)
    model._cores = {torch.float32: ["gathered", "answers"]}
    probe = _probe(90)
    with model._random_head():
        model.set_core("answers")
        with torch.no_grad():
            expected = model.rewards(model.batch(probe)) * 1.01
        model.set_core("gathered")
        if fault:
            real = tree_attention_module._gathered
            monkeypatch.setattr(tree_attention_module, "_gathered", lambda *args: 0.9 * real(*args))
        model._check_core(probe, expected)
    assert model.core == ("answers" if fault else "gathered")
