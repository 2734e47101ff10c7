"""The recipe: its defaults, overrides, and faults that are all reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_lora.config import Adapter, Quantize, Recipe
from mlx_lora.errors import RecipeError
from mlx_lora.recipe import load_recipe, parse_recipe

# The recipe as the documentation shows it: every key, with its default.
DOCUMENTED = """
model: null
name: null
quantize: null
adapter:
  method: lora
  rank: 8
  alpha: 16
  dropout: 0.0
  targets: attention
  layers: all
  init: default
  rslora: false
  rank_pattern: {}
  alpha_pattern: {}
  glora: {a: lora, b: lora, c: lora, d: vector, e: vector}
  zero_points: stored
  projection_seed: 0
  virtual_tokens: 16
  position: prefix
  bottleneck: 16
  target_rank: null
  prune_from: 0.1
  prune_until: 0.5
  prune_every: 10
  orthogonal: 0.5
data:
  path: null
  format: auto
  columns: {}
  system: null
  me: null
  query: null
  template: auto
  thinking: auto
  template_args: {}
  drop: []
  mask: auto
  max_seq_length: 2048
  too_long: error
  valid_fraction: 0.1
  packing: false
train:
  epochs: auto
  iters: null
  batch_size: 4
  grad_accumulation: 1
  learning_rate: auto
  schedule: cosine
  warmup: 0.03
  optimizer: adamw
  weight_decay: 0.0
  max_grad_norm: 1.0
  loraplus_ratio: null
  eval_every: auto
  save_every: auto
  patience: auto
  max_drift: null
  grad_checkpoint: auto
  cache_prefix: auto
  memory_limit_gb: null
  on_memory: refuse
seed: 0
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Any:
    def write(text: str, name: str = "mine.yaml") -> Path:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return file

    return write


def at(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(yaml.safe_load(text))
    return caught.value.message


def test_every_default_is_the_documented_one() -> None:
    assert Recipe().model_dump() == yaml.safe_load(DOCUMENTED)


def test_the_documented_recipe_parses_to_the_defaults(recipe_file: Any) -> None:
    assert load_recipe(recipe_file(DOCUMENTED)) == Recipe(name="mine")


def test_a_stored_recipe_reads_back_as_itself(recipe_file: Any) -> None:
    recipe = load_recipe(None, ["quantize.bits=3", "adapter.layers=[0, 2]", "train.grad_checkpoint=on", "name=mine"])
    assert load_recipe(recipe_file(yaml.safe_dump(recipe.model_dump()))) == recipe


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("{}", {"mode": "affine", "bits": 4, "group_size": 64}),
        ("{bits: 3, group_size: 32}", {"mode": "affine", "bits": 3, "group_size": 32}),
        ("{mode: mxfp4}", {"mode": "mxfp4", "bits": 4, "group_size": 32}),
        ("{mode: nvfp4}", {"mode": "nvfp4", "bits": 4, "group_size": 16}),
        ("{mode: mxfp8}", {"mode": "mxfp8", "bits": 8, "group_size": 32}),
    ],
)
def test_quantize_takes_the_modes_own_defaults(text: str, complete: dict[str, Any]) -> None:
    assert Quantize.model_validate(yaml.safe_load(text)).complete() == complete


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("adapter.rank=16", "adapter.rank", 16),
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),  # text to YAML 1.1, a number to people
        ("adapter.targets=[q_proj, v_proj]", "adapter.targets", ["q_proj", "v_proj"]),
        ("adapter.targets=/.*q_proj/", "adapter.targets", "/.*q_proj/"),
        ("adapter.layers=4", "adapter.layers", 4),
        ("adapter.rank_pattern.q_proj=2", "adapter.rank_pattern", {"q_proj": 2}),
        ("quantize.bits=8", "quantize.bits", 8),
        ("quantize=", "quantize", None),
        ("data.path=a=b.jsonl", "data.path", "a=b.jsonl"),
        ("train.grad_checkpoint=on", "train.grad_checkpoint", "on"),
        ("train.grad_checkpoint=true", "train.grad_checkpoint", "on"),
        ("train.grad_checkpoint=no", "train.grad_checkpoint", "off"),
        ("train.grad_checkpoint=auto", "train.grad_checkpoint", "auto"),
        ("train.cache_prefix=false", "train.cache_prefix", "off"),
        ("train.cache_prefix=true", "train.cache_prefix", "on"),
        ("data.packing=true", "data.packing", True),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("learning_rate=1e-3", "train.learning_rate", 1e-3),
    ],
)
def test_override(override: str, key: str, value: Any) -> None:
    assert at(load_recipe(None, [override]), key) == value


def test_overrides_win_over_settings_and_settings_over_the_file(recipe_file: Any) -> None:
    file = recipe_file("seed: 1\nadapter: {rank: 2, alpha: 3, dropout: 0.5}\n")
    recipe = load_recipe(file, ["adapter.rank=32"], settings={"adapter.alpha": 7, "adapter.rank": 9})
    assert (recipe.seed, recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (1, 32, 7, 0.5)


@pytest.mark.parametrize(("text", "name"), [("seed: 1", "mine"), ("name: null", "mine"), ("name: other", "other")])
def test_the_name_defaults_to_the_files(recipe_file: Any, text: str, name: str) -> None:
    assert load_recipe(recipe_file(text)).name == name


def test_a_section_with_everything_commented_out_is_the_default(recipe_file: Any) -> None:
    assert load_recipe(recipe_file("adapter:\n  # rank: 4\ntrain:\ndata:\n")) == Recipe(name="mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapter: {rnak: 4}", "unknown key 'adapter.rnak'; did you mean 'adapter.rank'?"),
        ("rank: 4", "unknown key 'rank'; did you mean 'adapter.rank'?"),
        ("bits: 4", "unknown key 'bits'; did you mean 'quantize.bits'?"),
        ("train: {rank: 4}", "unknown key 'train.rank'; did you mean 'adapter.rank'?"),
        ("adaptor: {rank: 4}", "unknown key 'adaptor'; did you mean 'adapter'?"),
        ("quantize: {zzz: 4}", "unknown key 'quantize.zzz'; known: bits, double_quant, group_size, mode"),
        ("lr: 1e-4", "unknown key 'lr'; did you mean 'train.learning_rate'?"),
        ("on: 4", "unknown key 'True'; known: adapter, data,"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {schedule: cosin}", "train.schedule: 'cosin' is refused: not known here; did you mean 'cosine'?"),
        ("data: {mask: assistent}", "did you mean 'assistant'?"),
        ("quantize: {mode: afine}", "quantize.mode: 'afine' is not known here; did you mean 'affine'?"),
        ("quantize: {bits: 7, group_size: 5}", "bits 7 for mode affine, which takes 2, 3, 4, 5, 6, 8; group_size 5"),
        ("adapter: {rank: 0}", "adapter.rank: '0' is refused: input should be greater than or equal to 1"),
        ("adapter: {rank: [1]}", "adapter.rank: '[1]' is refused"),
        ("adapter: {dropout: 1.0}", "adapter.dropout: '1.0'"),
        ("adapter: {layers: some}", "adapter.layers: 'some' is refused"),
        ("adapter: {layers: 0}", "adapter.layers: '0' is refused"),
        ("adapter: {targets: []}", "adapter.targets: an empty list attaches nothing"),
        ("adapter: {targets: /(/}", "adapter.targets: '(' is not a regular expression"),
        ("adapter: {rank_pattern: {'*q': 4}}", "adapter.rank_pattern: '*q' is not a regular expression"),
        ("adapter: {alpha_pattern: {q_proj: 0}}", "adapter.alpha_pattern.q_proj: '0' is refused"),
        ("adapter: 5", "adapter: '5' is refused: a section is a mapping of keys to values"),
        (
            "train: {save_every: true}",
            "train.save_every: 'True' is refused: not known here; known: auto, or input should be a number",
        ),
        ("adapter: {layers: true}", "adapter.layers: 'True' is refused"),
        ("train: {learning_rate: .inf}", "train.learning_rate: 'inf' is refused"),
        ("train: {learning_rate: .nan}", "train.learning_rate: 'nan' is refused"),
        ("data: {max_seq_length: 2.5}", "data.max_seq_length: '2.5' is refused"),
        ("data: {valid_fraction: 1}", "data.valid_fraction: '1' is refused"),
        ("seed: -1", "seed: '-1' is refused"),
        ("seed: 99999999999999999999", "seed: '99999999999999999999' is refused"),
    ],
)
def test_a_refused_value_is_named_with_what_is_taken(text: str, said: str) -> None:
    message = refused(text)
    assert said in message
    assert "\n" not in message, "one fault, one line"


@pytest.mark.parametrize(
    "text",
    [
        "data: {format: csv}", "data: {format: folder}", "data: {format: preference}",
    ],
)  # fmt: skip
def test_a_value_that_nothing_serves_is_refused(text: str) -> None:
    (section, inner) = next(iter(yaml.safe_load(text).items()))
    assert f"{section}.{next(iter(inner))}: " in refused(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "adapter: {method: ia3, rank: 4}",
            "rank is a setting of lora, dora, qalora, glora, vera, adalora; ia3",
        ),
        ("adapter: {method: lora, virtual_tokens: 4}", "virtual_tokens is a setting of prefix, prompt"),
        ("adapter: {method: dora, init: pissa}", "init pissa is for lora"),
        ("adapter: {method: prefix, targets: attention}", "prefix has a place of its own"),
        ("adapter: {method: adalora, rank: 4, target_rank: 6}", "target_rank 6 is above the rank it starts from, 4"),
        ("adapter: {method: glora, glora: {a: none, b: none, c: none, d: none, e: none}}", "nothing would train"),
        ("adapter: {method: lora+ia3}", "'lora+ia3' is not known here"),
        ("quantize: {double_quant: true}", "nf4"),
    ],
)
def test_settings_belong_to_methods(text: str, said: str) -> None:
    assert said in refused(text)


def test_a_method_has_its_own_place_unless_told() -> None:
    place = {"lora": "attention", "ia3": ["k_proj", "v_proj", "down_proj"], "full": "all", "prefix": "own"}
    assert {method: Adapter(method=method).targets for method in place} == place
    assert Adapter(method="ia3", targets="all-linear").targets == "all-linear"
    combined = Adapter(method="lora+prefix", rank=4, virtual_tokens=3)
    assert combined.of("prefix").virtual_tokens == 3 and combined.of("lora").targets == "attention"
    assert Adapter.model_validate(combined.model_dump()) == combined


def test_all_faults_are_reported_at_once() -> None:
    message = refused("foo: 1\nseed: x\nadapter: {rank: 0, rnak: 1}\ntrain: {schedule: 5}\ndata: {packing: some}")
    for key in ("'foo'", "seed:", "adapter.rank:", "'adapter.rnak'", "train.schedule:", "data.packing:"):
        assert key in message
    assert len(message.splitlines()) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nadapter: [", "mine.yaml:2: not valid YAML"),
        ("seed: 1\nadapter: {rank: 2}\nadapter: {alpha: 3}", "mine.yaml:3: not valid YAML ('adapter' is given twice)"),
        ("train:\n  epochs: 1\n  epochs: 2", "mine.yaml:3: not valid YAML ('epochs' is given twice)"),
        ("name: 2024-13-45", "mine.yaml: not valid YAML (month"),
        ("- a\n- b", "mine.yaml: a recipe is a mapping of keys to values"),
        ("name: " + "[" * 5000, "mine.yaml: not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "mine.yaml:1: not valid YAML"),
    ],
    ids=["syntax", "section-twice", "key-twice", "date", "list", "deep", "code"],
)
def test_a_file_that_is_no_recipe(recipe_file: Any, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(text))
    assert said in caught.value.message


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank", "'adapter.rank' is not key=value"),
        ("=3", "'=3' is not key=value"),
        ("adapter.targets=[", "override 'adapter.targets=[':1: not valid YAML"),
        ("adapter.rank.x=3", "adapter.rank: "),
        ("learning_rat=1", "did you mean 'train.learning_rate'?"),
        ("train.lr=1", "unknown key 'train.lr'; did you mean 'train.learning_rate'?"),
        ("steps=1", "'steps' isn't a setting's name here"),
    ],
)
def test_a_faulty_override(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [override])
    assert said in caught.value.message


def test_a_missing_recipe_names_the_nearest_that_exists() -> None:
    with pytest.raises(RecipeError, match="no such recipe; did you mean 'notes.yaml'"):
        load_recipe(Path("note.yaml"))


@pytest.mark.parametrize(
    ("settings", "path", "rank", "scale"),
    [
        ({}, "layers.0.self_attn.q_proj", 8, 2.0),
        ({"rslora": True}, "q_proj", 8, 16 / 8**0.5),
        ({"rank_pattern": {"q_proj": 4}}, "layers.0.self_attn.q_proj", 4, 4.0),
        ({"rank_pattern": {"q_proj": 4}}, "layers.0.self_attn.my_q_proj", 8, 2.0),  # whole names only
        ({"rank_pattern": {"proj": 4}}, "layers.0.self_attn.q_proj", 8, 2.0),
        ({"rank_pattern": {r"layers\.[01]\..*": 2, "q_proj": 4}}, "model.layers.1.self_attn.q_proj", 2, 8.0),  # first
        ({"alpha_pattern": {"q_proj": 4}, "rank_pattern": {"q_proj": 4}, "rslora": True}, "a.q_proj", 4, 2.0),
    ],
)
def test_rank_and_scale_after_patterns(settings: dict[str, Any], path: str, rank: int, scale: float) -> None:
    adapter = Adapter(**settings)
    assert (adapter.rank_of(path), adapter.scale_of(path)) == (rank, pytest.approx(scale))
