"""The README and docs/ say what is true: their code runs, their commands parse, their links lead somewhere."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast import evaluate
from irlfast.config import Config, load_config, make_config
from irlfast.data.demonstrations import to_demonstration
from irlfast.evaluation.models import Model
from irlfast.ops.rewards.losses import REWARD_LOSSES
from tests.helpers import keys_page, losses_page

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TASK = {
    "config_name": "irlfast/demo/config.json",
    "train_tokenizer": 300,
    "dataset_name": "irlfast/demo/train.jsonl",
}


class Block(NamedTuple):
    page: Path
    language: str
    options: str  # what stands behind the language, such as title="…"
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```", text, re.M | re.S)
    return [
        Block(page, m[2], m[3], re.sub(f"^{m[1]}", "", m[4], flags=re.M), text.count("\n", 0, m.start()) + 1)
        for m in fences
    ]


EXTENDING = ROOT / "docs/extending"  # test_adding.py follows these pages
BLOCKS = [block for page in PAGES if page.parent != EXTENDING for block in blocks_of(page)]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


class Command(NamedTuple):
    variables: dict[str, str]  # that stand before it
    words: list[str]


def commands_of(block: Block) -> list[Command]:
    commands = []
    for part in re.split(r"\n| && ", block.text.replace("\\\n", " ")):
        words = shlex.split(part, comments=True)
        first = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), None)
        if first is not None:
            commands.append(Command(dict(word.split("=", 1) for word in words[:first]), words[first:]))
    return commands


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the repository's programs, and the file of demonstrations that the pages name."""
    for name in ("examples", "benchmarks", "tests", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "2+2?", "completion": "4"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")} - {README}), ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, folder):
    names: dict = {}
    for block in of("python"):
        if block.page == page:
            exec(compile(block.text, str(block), "exec"), names)


def test_both_ways_to_the_loss_in_the_readme_give_the_same_number():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    input_ids = torch.randint(64, (4, 6))
    names = {
        "torch": torch,
        "model": LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)),
        "input_ids": input_ids,
        "mask": torch.ones_like(input_ids),
        "rows": torch.arange(24).view(4, 6)[:, 2:5].flatten(),
        "targets": input_ids[:, 3:].flatten(),
        "cu_seqlens": torch.arange(0, 13, 3, dtype=torch.int32),
        "ref_logps": -torch.rand(12) - 3,
    }
    before, after = (block.text for block in of("python") if block.page == README)
    exec(before, names)
    loss = names.pop("loss").item()
    exec(after, names)
    assert names["loss"].item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("block", of("yaml", "yml"), ids=str)
def test_yaml_is_a_configuration(block, folder):
    given = yaml.safe_load(block.text)
    base = {
        name: value for name, value in TASK.items() if not (name != "dataset_name" and "model_name_or_path" in given)
    }
    make_config(base | given)


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_every_row_is_read_as_a_demonstration(block):
    for line in block.text.splitlines():
        read = to_demonstration(json.loads(line), "row")
        assert read.demonstration.prompt and read.demonstration.answer


# ---------------------------------------------------------------- commands


class Parsed(BaseException):
    """Raised in place of the work of a command whose arguments are right."""


@pytest.mark.parametrize("block", of("bash", "sh"), ids=str)
def test_a_command_is_one_that_there_is(block, folder, monkeypatch):
    for command in commands_of(block):
        check_command(command.words, monkeypatch)


def check_command(words: list[str], monkeypatch) -> None:
    program, *rest = words
    if program == "irlfast":
        module, arguments = {"select": "data.select"}.get(rest[0], rest[0]), rest[1:]
        return check_arguments(f"irlfast.{module}", arguments, monkeypatch)
    if program == "torchrun" or (program.endswith("python") and "-m" in rest):
        at = rest.index("-m") + 1
        return check_arguments(rest[at], rest[at + 1 :], monkeypatch)
    if program in ("hf", "vllm"):  # they need the network, or another environment
        return None
    if program == "pip":
        return check_installation(rest)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= {*targets}, words
        return None
    assert program.endswith("python") or program == "pytest" or program == "git", f"no test knows the command {words}"
    check_paths(rest)
    return None


def check_arguments(module: str, arguments: list[str], monkeypatch) -> None:
    """The arguments as the module's own parser takes them; files that they name are made."""
    if module == "pytest" or not module.startswith("irlfast."):
        assert module == "pytest" or importlib.util.find_spec(module), module
        return check_paths(arguments)
    make_inputs(arguments)
    if module in ("irlfast.train", "irlfast.bon"):
        extra = ["method=rft", "reward_data=none", "align=bon"] if module == "irlfast.bon" else []
        load_config([*arguments, *extra])
        return None
    if module == "irlfast.evaluate":
        options, keys = evaluate.read_arguments(arguments)
        evaluate.configure([Model(name, name, None) for name in options.models], keys, options.leaderboard)
        evaluate.judge_settings(options)
        return None
    method = "parse_known_intermixed_args" if module == "irlfast.plan" else "parse_args"
    parse = getattr(argparse.ArgumentParser, method)

    def parse_alone(self, *given):
        parsed = parse(self, *given)
        assert method == "parse_args" or not parsed[1], f"unknown arguments: {parsed[1]}"
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, method, parse_alone)
        patch.setattr("sys.argv", [module, *arguments])
        importlib.import_module(module).main()
    return None


def make_inputs(arguments: list[str]) -> None:
    for value in (argument.rpartition("=")[2] for argument in arguments):
        path = Path(value)
        if path.suffix == ".jsonl" and not path.exists():
            path.write_text('{"prompt": "2+2?", "completion": "4"}\n')
        elif value.startswith("runs/"):
            path.mkdir(parents=True, exist_ok=True)


def check_installation(rest: list[str]) -> None:
    assert rest[0] == "install"
    for extra in re.findall(r"\[(\w+)\]", " ".join(rest)):
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text(), extra


def check_paths(words: list[str]) -> None:
    for word in words:
        if "/" in word and not word.startswith("-"):
            before, brace, inside = word.partition("{")
            choices = inside.split("}")[0].split(",") if brace else [""]
            for choice in choices:
                assert (ROOT / f"{before}{choice}{inside.partition('}')[2]}").exists(), word


# ---------------------------------------------------------------- links and tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_of(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_in_the_repository(page):
    rooms = "irlfast|kernels|csrc|tests|docs|configs|examples|benchmarks"
    named = re.findall(rf"`((?:{rooms})/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_target_of_make_that_a_page_names_is_in_the_makefile(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8"))) <= {*targets}


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def test_the_page_of_keys_is_what_the_schema_says():
    assert keys_page.PAGE.read_text(encoding="utf-8") == keys_page.page(), (
        "python -m tests.helpers.keys_page writes it anew"
    )


def test_every_key_is_under_a_heading():
    assert [name for _, names in keys_page.sections() for name in names] == [*keys_page.schema.FIELDS]


def test_the_table_of_pair_losses_is_that_of_the_code():
    assert losses_page.table() in losses_page.PAGE.read_text(encoding="utf-8"), (
        "python -m tests.helpers.losses_page writes it anew"
    )


def test_every_reward_loss_is_a_value_of_its_key_and_on_the_page_of_rft():
    page = (ROOT / "docs/methods/rft.md").read_text(encoding="utf-8")
    names = get_args(get_type_hints(Config)["reward_loss"])
    assert set(names) > REWARD_LOSSES.keys()
    assert all(f"`{name}`" in page for name in names)


@pytest.mark.parametrize("page", sorted((ROOT / "docs/methods").glob("*.md")), ids=lambda page: page.name)
def test_the_keys_that_a_methods_page_names_are_keys_or_their_values(page):
    [paragraph] = re.findall(r"^\*\*Keys\.\*\*.+?(?=\n\n)", page.read_text(encoding="utf-8"), re.M | re.S)
    values = {str(value) for hint in get_type_hints(Config).values() for value in get_args(hint)}
    names = set(re.findall(r"`(\w+)`", paragraph))
    assert names and names <= {*keys_page.schema.FIELDS} | values, names - {*keys_page.schema.FIELDS} - values


def test_every_environment_variable_that_is_read_is_on_its_page():
    page = (ROOT / "docs/environment.md").read_text()
    read = set()
    for file in [
        ROOT / "setup.py",
        *ROOT.glob("irlfast/**/*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]:
        read |= set(re.findall(r"environ(?:\.get|\.setdefault)?[\[(]\"([A-Z_]+)\"", file.read_text(encoding="utf-8")))
    missing = {name for name in read if f"`{name}`" not in page}
    assert len(read) > 10 and not missing, missing


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", sorted(EXTENDING.glob("*.md")), ids=lambda page: page.name)
def test_adding_something_takes_at_most_eight_steps(page):
    steps = re.findall(r"^(\d+)\. ", page.read_text(encoding="utf-8"), re.M)
    assert steps and [int(step) for step in steps] == [*range(1, len(steps) + 1)] and len(steps) <= 8


def test_no_page_names_a_path_of_one_machine():
    for page in PAGES:
        assert not re.search(r"/(work|home|root|tmp)/", page.read_text(encoding="utf-8")), page
