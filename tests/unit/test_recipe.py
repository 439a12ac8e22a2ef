"""The recipe: all errors are reported together, unknown keys are refused, and origins survive a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.support.recipes import GOOD, problems
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, decided, dump_recipe, load_recipe, parse_recipe


def test_unknown_key_names_the_nearest() -> None:
    found = problems(GOOD + "train:\n  learning_rte: 0.1\n")
    assert list(found) == ["unknown key 'train.learning_rte'"]
    assert "train.learning_rate" in found["unknown key 'train.learning_rte'"]


def test_unknown_key_in_the_wrong_section_names_the_right_one() -> None:
    found = problems(GOOD + "lora_alpha: 16\n")
    assert "lora.lora_alpha" in found["unknown key 'lora_alpha'"]


def test_all_problems_come_together() -> None:
    found = problems("modle: x\ndata:\n  heldout: 2\ntrain:\n  learning_rate: fast\n  max_steps: 0\n")
    text = "\n".join(found)
    for expected in ("'modle'", "'model' is missing", "'data.train' is missing", "data.heldout", "learning_rate", "max_steps"):
        assert expected in text


def test_one_problem_for_each_key_although_a_union_reports_each_branch() -> None:
    assert len(problems(GOOD + "lora:\n  r: big\n")) == 1


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "42\n", "1: 2\n"])
def test_not_a_mapping(text: str) -> None:
    assert "a recipe is a mapping" in next(iter(problems(text)))


def test_yaml_error_has_line_and_column() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe("model: a\n  data: [", "r.yaml", Path("/"))
    assert caught.value.problems[0].where.startswith("r.yaml:2")


def test_yaml_tags_are_refused() -> None:
    assert "not valid YAML" in next(iter(problems("model: !!python/object/apply:os.system ['true']\n")))


def test_recipe_is_frozen() -> None:
    recipe = parse_recipe(GOOD, "r", Path("/base")).recipe
    with pytest.raises(ValidationError):
        recipe.method = "full"


def test_paths_are_seen_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "recipe.yaml"
    path.write_text("model: ../base-model\ndata:\n  train: rows.jsonl\n", encoding="utf-8")
    recipe = load_recipe(path).recipe
    assert recipe.data.train == str(tmp_path / "sub" / "rows.jsonl")
    assert recipe.model == str(tmp_path / "base-model")


def test_origins_and_round_trip() -> None:
    resolved = parse_recipe(GOOD + "train:\n  max_steps: 7\n", "r", Path("/base"), ["train.learning_rate=0.001", "method=full"])
    assert resolved.origins["train.max_steps"] == "file"
    assert resolved.origins["train.learning_rate"] == "override"
    assert resolved.origins["method"] == "override"
    assert resolved.origins["train.weight_decay"] == "default"
    again = parse_recipe(dump_recipe(resolved), "run", Path("/"))
    assert again.recipe == resolved.recipe
    assert "learning_rate: 0.001  # override" in dump_recipe(resolved)
    assert "weight_decay: 0.0  # default" in dump_recipe(resolved)


def test_override_must_be_key_value() -> None:
    assert "is not key=value" in next(iter(problems(GOOD, "train.max_steps")))
    assert "is not a section" in next(iter(problems(GOOD, "model.name=1")))


def test_missing_file_is_readable() -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(Path("/nowhere/recipe.yaml"))


def test_every_key_says_which_stages_it_decides() -> None:
    known = {"prepare", "plan", "train", "export", "evaluate", "augment"}
    assert all(stages and set(stages) <= known for stages in decided().values())
    assert set(decided()) == set(Recipe.model_fields)


#: By objective, the digests of prepare, plan, train and export. A new key or another default moves them: finished runs are then
#: trained again, which CHANGELOG.md has to say.
DIGESTS = {
    "sft": ("638dce32", "b7c97744", "d732c9b1", "84bc6caa"),
    "dpo": ("9e19694a", "305861ca", "1efbcdd6", "84bc6caa"),
    "kto": ("7adb6225", "50969630", "a29b4db4", "84bc6caa"),
}


@pytest.mark.parametrize("objective", DIGESTS)
def test_a_run_of_an_earlier_version_is_not_done_again(objective: str) -> None:
    own = "kto: {beta: 0.2}\n" if objective == "kto" else ""
    recipe = parse_recipe(f"{GOOD}objective: {objective}\n{own}", "r", Path("/base")).recipe
    found = (recipe.stage_digest(stage)[:8] for stage in ("prepare", "plan", "train", "export"))
    assert tuple(found) == DIGESTS[objective]


def test_section_digest_moves_with_its_section_alone() -> None:
    one = parse_recipe(GOOD, "r", Path("/base")).recipe
    two = parse_recipe(GOOD, "r", Path("/base"), ["train.max_steps=3"]).recipe
    assert one.section_digest("data") == two.section_digest("data")
    assert one.section_digest("train") != two.section_digest("train")


@pytest.mark.parametrize("change", ["objective=dpo", "dpo.beta=0.2"])
def test_preference_keys_move_the_digest_of_training(change: str) -> None:
    one = parse_recipe(GOOD, "r", Path("/base")).recipe
    two = parse_recipe(GOOD, "r", Path("/base"), [change]).recipe
    assert one.section_digest("objective", "dpo") != two.section_digest("objective", "dpo")
    assert one.section_digest("train", "data") == two.section_digest("train", "data")


@pytest.mark.parametrize(
    "change",
    [
        "objective=ipo",
        "kto.beta=0",
        "ppo.lam=2",
        "grpo.num_generations=1",
        "dpo.beta=0",
        "dpo.label_smoothing=0.5",
        "dpo.label_smoothing=-0.1",
    ],
)
def test_preference_values_out_of_range_are_refused(change: str) -> None:
    assert change.partition("=")[0] in next(iter(problems(GOOD, change)))


def test_mmlu_keys() -> None:
    text = GOOD + "evaluate: {mmlu: mmlu, mmlu_subjects: [anatomy, us_foreign_policy], mmlu_shots: 0}\n"
    resolved = parse_recipe(text, "recipe.yaml", Path("/base"))
    assert resolved.recipe.evaluate.mmlu == "/base/mmlu"
    assert parse_recipe(dump_recipe(resolved), "run", Path("/")).recipe == resolved.recipe
    for shots in ("-1", "6"):
        assert any("evaluate.mmlu_shots" in what for what in problems(GOOD, f"evaluate.mmlu_shots={shots}"))
    assert any("evaluate.mmlu_questions" in what for what in problems(GOOD, "evaluate.mmlu_questions=0"))


def test_a_key_of_a_section_in_a_section_can_be_overridden_and_survives_a_round_trip() -> None:
    resolved = parse_recipe(GOOD, "r", Path("/base"), ["data.clean.html=false", "data.quality.refusal=reject"])
    assert resolved.origins["data.clean"] == resolved.origins["data.quality"] == "override"
    again = parse_recipe(dump_recipe(resolved), "r", Path("/"))
    assert again.recipe == resolved.recipe
    assert (again.recipe.data.clean.html, again.recipe.data.clean.control) == (False, True)
    assert again.recipe.data.quality == {"refusal": "reject"}
    assert again.recipe.data.review == "/base/review.jsonl"


def test_off_needs_no_quotes() -> None:
    """YAML 1.1 reads it as false; the saved recipe reads the same."""
    resolved = parse_recipe("model: m\ndata: {train: t.jsonl, quality: {repetition: off}}", "r.yaml", Path())
    assert resolved.recipe.data.quality == {"repetition": "off"}
    assert parse_recipe(dump_recipe(resolved), "again", Path("/")).recipe == resolved.recipe
