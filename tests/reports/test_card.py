"""The model cards of ``final/``: a head that the hub reads, the run's own numbers, and names that stay text."""

import dataclasses
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from statsmodels.stats.proportion import proportion_confint

from irlfast.common.files import read_json
from irlfast.config import make_config
from irlfast.config.read import read_config
from irlfast.reports.card import changed_keys, plain, policy_card, reward_card
from tests.helpers.runs import ROOT

METRICS = {
    "phase": "sft",
    "exact_match": 0.5,
    "reward_accuracy": None,
    "nll": 2.0,
    "answer_length": 3.0,
    "count": 24,
    "intervals": {"exact_match": [0.25, 0.75], "nll": [1.5, 2.5]},
}
REWARD = {"phase": "reward", "reward_accuracy": 0.75, "reward_margin": 1.5, "reward_pairs": 20, "seconds": 9.0}
DATA = {
    "fingerprint": "0123456789abcdef",
    "train": {"rows": 1000, "kept": 900, "prompt_tokens": 5000, "answer_tokens": 7000},
    "eval": {"rows": 24, "kept": 24, "prompt_tokens": 50, "answer_tokens": 70, "prompts_also_in_train": 2},
}
MARKDOWN = MarkdownIt("commonmark").enable("table")


def config_of(**keys):
    return make_config({"dataset_name": __file__, "model_name_or_path": "."} | keys)


def cards_of(config) -> tuple[str, str]:
    return policy_card(config, DATA, "sft", "the last", [METRICS]), reward_card(config, DATA, REWARD)


def read_back(card: str, folder) -> ModelCard:
    """The card as huggingface_hub reads it from a file."""
    (folder / "README.md").write_text(card, encoding="utf-8")
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    ("model", "base"),
    [(".", None), ("owner/model", "owner/model"), ("gpt2", "gpt2"), (str(ROOT), None), ("a: b", None)],
)
@pytest.mark.parametrize(("dataset", "listed"), [(__file__, None), ("owner/rows", ["owner/rows"]), ("x" * 99, None)])
def test_the_metadata_names_only_what_can_be_on_the_hub(model, base, dataset, listed):
    config = config_of(model_name_or_path=model, dataset_name=dataset)
    for card, task in zip(cards_of(config), ("text-generation", "text-classification"), strict=True):
        data = ModelCard(card).data
        assert (data.base_model, data.datasets, data.pipeline_tag) == (base, listed, task)
        assert data.library_name == "transformers" and "irlfast" in data.tags
        for name in filter(None, [data.base_model, *(data.datasets or [])]):
            validate_repo_id(name)
        assert {result.dataset_type for result in data.eval_results} == {listed[0] if listed else "custom"}


def test_the_heads_results_are_the_figures_with_their_intervals(tmp_path):
    policy, reward = (read_back(card, tmp_path).data for card in cards_of(config_of()))
    assert {result.metric_type: result.metric_value for result in policy.eval_results} == {
        "exact_match": 0.5,
        "nll": 2.0,
        "answer_length": 3.0,
    }
    assert policy.eval_results[0].metric_args == {"interval_95": [0.25, 0.75]}
    (result,) = reward.eval_results
    low, high = proportion_confint(15, 20, method="wilson")
    assert result.metric_args["interval_95"] == pytest.approx([low, high])


def test_the_table_has_each_figure_with_its_interval_in_the_direction_of_its_column():
    policy, reward = cards_of(config_of())
    assert "| sft | 0.500 (0.250 to 0.750) | – | -2.000 (-2.500 to -1.500) | 3.0 |" in policy
    assert "| reward accuracy | 0.750 (0.531 to 0.888) |" in reward
    assert "| reward pairs | 20 |" in reward and "seconds" not in reward


def test_the_card_says_what_was_not_tested():
    for card in cards_of(config_of(seed=7)):
        assert "24 held-out rows" in card and "one run, of seed 7" in card
        assert "2 held-out prompts are training prompts, too" in card
    best = policy_card(config_of(keep="best"), DATA, "sft", "the best", [METRICS])
    assert (
        "No judge" in best
        and "chosen by these held-out figures" in best
        and "chosen by" not in cards_of(config_of())[0]
    )


def test_the_recipe_read_as_a_configuration_trains_the_same(tmp_path):
    keys = {"method": "spin", "stages": 3, "learning_rate": [1e-6, 5e-7, 1e-7], "logging_steps": 7}
    config = config_of(dataset_name="owner/rows", model_name_or_path="owner/model", output_dir=str(tmp_path), **keys)
    again = make_config(yaml.safe_load(re.search("```yaml\\n(.*?)```", cards_of(config)[0], re.DOTALL)[1]))
    fixed = {"output_dir": "", "logging_steps": 1, "save_steps": 1}  # where and how often a run writes
    assert dataclasses.replace(again, **fixed) == dataclasses.replace(config, **fixed)


def test_absolute_paths_do_not_show_where_they_were():
    config = config_of(dataset_name=__file__, model_name_or_path=str(ROOT))
    for card in cards_of(config):
        assert str(ROOT) not in card and "test_card.py" in card
    assert changed_keys(config)["model_name_or_path"] == ROOT.name


def shape(card: str) -> list[str]:
    """The kinds of a card's blocks and of what is within their lines, without texts and breaks of lines."""
    tokens = MARKDOWN.parse(ModelCard(card).text)
    kinds = [[token.type, *(child.type for child in token.children or ())] for token in tokens]
    return [kind for each in kinds for kind in each if kind not in ("text", "text_special", "softbreak")]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(min_size=1))
@example("~nobody-of-this-name")
@example("a|b")
@example("1")
@example("# heading")
@example("`code` **bold** <script>alert(1)</script> [a](http://b) ![c](d) &lt; ~~e~~ $f$")
@example("line\n# heading\n\n- item\n---\n```\nmodel-index: {}")
@example("\\`\\|\\")
@example("\udcff")
@example("end```\n---\nlicense: mit\n---\n")
def test_a_name_of_a_dataset_stays_text(name):
    named = {"dataset_name": name, "eval_dataset_name": name, "model_name_or_path": name, "prompt_template": name}
    benign = {key: "x\ny" if key == "prompt_template" else "x" for key in named}
    for card, expected in zip(cards_of(read_config(named)), cards_of(read_config(benign)), strict=True):
        assert shape(card) == shape(expected)
        head, plainer = ModelCard(card).data.to_dict(), ModelCard(expected).data.to_dict()
        assert {*head} - {"datasets", "base_model"} == {*plainer} - {"datasets", "base_model"}
        (block,) = [token for token in MARKDOWN.parse(ModelCard(card).text) if token.type == "fence"]
        if name.isprintable() and not name.startswith(("/", "~")):
            assert yaml.safe_load(block.content)["prompt_template"] == name


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text())
def test_plain_text_reads_as_it_was_written(text):
    (block,) = MARKDOWN.parse(f"a{plain(text)}b")[1:2]
    shown = "".join(child.content for child in block.children)
    assert shown == "a" + " ".join(text.encode(errors="replace").decode().split()).replace("\0", "\ufffd") + "b"


def test_a_runs_card_has_the_numbers_of_its_files(finished):
    output = finished[0]
    card = ModelCard.load(output / "final" / "README.md")
    assert card.data.model_name == "irlfast-irft"
    for phase in ("sft", "stage-00", "stage-01"):
        metrics = read_json(output / phase / "eval.json")
        low, high = metrics["intervals"]["nll"]
        assert f"| {phase} | {metrics['exact_match']:.3f} (" in card.text
        assert f"{-metrics['nll']:.3f} ({-high:.3f} to {-low:.3f})" in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["nll"].metric_value == metrics["nll"]
    assert results["nll"].metric_args == {"interval_95": metrics["intervals"]["nll"]}
    data = read_json(output / "data.json")
    assert f"fingerprint of their token ids is `{data['fingerprint']}`" in card.text
    assert f"| training | {data['train']['rows']} | {data['train']['kept']} |" in card.text
