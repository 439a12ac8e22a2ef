"""Modules that are fully trained next to an adapter: embedding, norms and head, through saving, loading and merging."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.loss import labelled_logits, summed_loss
from tunesmith.engine.packing.batch import collate_tree
from tunesmith.errors import RecipeError
from tunesmith.methods import make_method
from tunesmith.recipe import parse_recipe
from tunesmith.runs import create_run
from tunesmith.stages.export import export
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

ROWS = [{"input_ids": [1, 2, 3, *range(5, 12 + n)], "loss_mask": [False] * 3 + [True] * (7 + n)} for n in range(3)]


@pytest.fixture(params=[True, False], ids=["tied", "apart"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> Path:
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = request.param
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def method_of(base: Path, name: str, saved: str) -> Any:
    recipe = parse_recipe(
        f"model: {base}\nmethod: {name}\ndata: {{train: t}}\nlora: {{modules_to_save: {saved}}}\n", "r", Path()
    )
    return make_method(recipe.recipe, base, compute_dtype="float32", r=4, lora_alpha=8)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_trained_saved_loaded_and_merged(base: Path, tmp_path: Path, name: str) -> None:
    """Embedding and norms train with the adapter; the merged model equals the trained one, tied or not."""
    method = method_of(base, name, "[embed_tokens, norm]")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = method.build()
    tied = model.config.tie_word_embeddings
    use_tree_attention(model, on=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = {name for name in trained if "lora_" not in name}
    assert {name.rpartition(".modules_to_save")[0].rpartition(".")[2] for name in others} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    batch = collate_tree(ROWS)
    optimizer = torch.optim.SGD(trained.values(), lr=0.02)
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for _ in range(2):
        optimizer.zero_grad()
        summed_loss(model, batch).backward()
        optimizer.step()
    assert all(not torch.equal(parameter, start[name]) for name, parameter in trained.items())
    with torch.no_grad():
        expected = labelled_logits(model, batch)
        with model.disable_adapter():
            untrained = labelled_logits(model, batch)
    assert float((expected - untrained).abs().max()) > 0.1
    model.eval()
    method.save(model, tmp_path / "adapter")
    loaded = method.load_trained(tmp_path / "adapter")
    use_tree_attention(loaded, on=True)
    with torch.no_grad():
        torch.testing.assert_close(labelled_logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
        merged = method.merge(loaded)
        use_tree_attention(merged, on=True)
        torch.testing.assert_close(labelled_logits(merged, batch), expected, rtol=1e-4, atol=1e-4)
    use_tree_attention(merged, on=False)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.tie_word_embeddings == tied
    use_tree_attention(plain, on=True)
    with torch.no_grad():
        torch.testing.assert_close(labelled_logits(plain, batch), expected, rtol=1e-4, atol=1e-4)


def test_the_reference_is_the_untrained_model(base: Path) -> None:
    """With the adapter disabled, neither it nor the fully trained modules count."""
    model = method_of(base, "lora", "[embed_tokens]").build()
    plain = AutoModelForCausalLM.from_pretrained(base)
    for each in (model, plain):
        use_tree_attention(each, on=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        with model.disable_adapter():
            found = labelled_logits(model, collate_tree(ROWS))
        torch.testing.assert_close(found, labelled_logits(plain, collate_tree(ROWS)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ("[embeddings]", "no embedding, head or norm ends in 'embeddings'"),
        ("[norm, q_proj]", "model.layers.0.self_attn.q_proj is a linear layer"),
        ("[layers.0]", "no embedding, head or norm ends in 'layers.0'"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(base: Path, saved: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method_of(base, "lora", saved).build()
    (problem,) = caught.value.problems
    assert told in problem.what
    assert "embed_tokens, lm_head (where it is not tied), input_layernorm, norm, post_attention_layernorm" in problem.fix


def test_a_tied_head_goes_with_its_embedding(base: Path) -> None:
    method = method_of(base, "lora", "[lm_head]")
    if not AutoConfig.from_pretrained(base).tie_word_embeddings:
        names = {name for name, p in method.build().named_parameters() if p.requires_grad and "lora_" not in name}
        assert names == {"base_model.model.lm_head.modules_to_save.default.weight"}
        return
    with pytest.raises(RecipeError) as caught:
        method.build()
    assert "the head is the embedding" in caught.value.problems[0].what


def test_long_lora_in_one_recipe(make_recipe: Any, tmp_path: Path) -> None:
    """Scaled positions, shifted attention, embedding and norms: trained in bf16 and exported with proof."""
    long = {"rope_scaling__rope_type": "linear", "rope_scaling__factor": 2, "train__shifted_sparse_attention": 8}
    more = {"method": "lora", "lora__modules_to_save": ["embed_tokens", "norm"], "train__compute_dtype": "bfloat16"}
    run = create_run(make_recipe(train__learning_rate=0.01, **long, **more), tmp_path / "run")
    prepare(run)
    summary = train(run, Console(quiet=True))
    before = load_file(Path(run.recipe.model) / "model.safetensors")
    proof = export(run)
    (folder,) = (run.path / "export").iterdir()
    after = load_file(folder / "model.safetensors")
    assert proof["mean_kl"] < 0.01
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == set(before)  # embedding, norms, and through the adapter every linear layer
    assert summary["trainable_parameters"] > before["model.embed_tokens.weight"].numel()
