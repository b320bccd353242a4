"""scripts/recipes/*.args, and arguments from files in general."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT

import main
from models import build_backbone
from models.vit import VIT_VARIANTS
from utils import preflight
from utils.errors import UserError, exit_on_user_error
from utils.launch.plan import ProcessPlan
from utils.options import parse_options

RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.args"))
CLASSES = {"casia": 10572, "ms1mv2": 85742, "ms1mv3": 93431, "glint360k": 360232, "wf4m": 205990, "wf12m": 617970,
           "wf42m": 2059906}
TABLE = (ROOT / "scripts" / "recipes" / "README.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_prints_its_plan(recipe, faces, monkeypatch, capsys):
    options = parse_options([f"@{recipe}", "DIR"])
    assert options.num_classes == CLASSES[recipe.name.split("_")[0]] and options.data == "DIR"
    assert options.loss in recipe.stem and options.batch_size % (8 * options.accumulation_steps) == 0
    assert not options.enable_model_parallel or options.num_classes > 50_000

    def without_values(*arguments):
        with torch.device("meta"):
            return build_backbone(*arguments)

    monkeypatch.setattr(preflight, "build_backbone", without_values)  # drawing the values of 65 million takes seconds
    monkeypatch.setattr(preflight, "host_bytes", lambda: 2**40)
    # As written: on a node with 8 processes, here of 80 GiB each
    node = ProcessPlan("spawn", nodes=1, node_rank=0, processes_per_node=8, device_type="cpu", gpu=None, backend="gloo",
                       host="127.0.0.1", port=0)
    preflight.check_batch(options, node)
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "host_bytes", lambda: 8 * 80 * 2**30)
        assert preflight.check_memory(options, node).endswith("8 processes share a machine that has 640.0 GiB")
    monkeypatch.setattr(main, "launch", lambda *args: pytest.fail("training was started"))
    monkeypatch.setattr(sys, "argv", ["main.py", f"@{recipe}", str(faces), "--plan", "--index", "none", "--device",
                                      "cpu", "--batch-size", "24"])
    exit_on_user_error(main.main)
    table = capsys.readouterr().out
    assert f"{options.num_classes:,} classes" in table and f"backbone       {options.arch}, " in table


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_its_source_and_its_row(recipe):
    text = recipe.read_text()
    assert re.search("^# Source: .+", text, re.MULTILINE)
    published = re.search("^# Published: (.+)", text, re.MULTILINE)[1]
    (row,) = [line for line in TABLE.splitlines() if f"| `{recipe.stem}` |" in line]
    assert f"{CLASSES[recipe.name.split('_')[0]]:,}" in row
    assert set(re.findall(r"\d\d\.\d\d", row)) <= set(re.findall(r"\d\d\.\d\d", published))


def test_the_vit_has_the_rates_of_its_published_network():
    """insightface's wf42m_pfc03_40epoch_*gpu_vit_b.py: network = "vit_b_dp005_mask_005"."""
    options = parse_options([f"@{ROOT}/scripts/recipes/wf42m_vit_b_cosface.args", "DIR"])
    variant = VIT_VARIANTS[options.training_arch]
    assert (variant.width, variant.depth, variant.masked, variant.drop_path) == (512, 24, 0.05, 0.05)


def test_the_table_has_no_other_rows():
    assert sorted(re.findall(r"^\| `(\w+)` \|", TABLE, re.MULTILINE)) == [recipe.stem for recipe in RECIPES]


def test_steps_of_casia_as_epochs():
    """Deng 2019: a tenth from steps 20,000 and 28,000 on, 32,000 steps. insightface's package has 490,623 images."""
    options = parse_options([f"@{ROOT}/scripts/recipes/casia_r50_arcface.args", "DIR"])
    per_epoch = 490_623 // 512
    first = [next(step for step in range(40_000) if step >= milestone * per_epoch)
             for milestone in options.lr_milestones]
    assert first == [20_000, 28_000] and options.max_steps == 32_000 <= options.epochs * per_epoch


def arguments(tmp_path: Path, text: str | bytes) -> str:
    (tmp_path / "run.args").write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"@{tmp_path}/run.args"


def test_words_of_a_file(tmp_path):
    file = arguments(tmp_path, "# it's a comment\n\n--lr 0.2 --epochs 3 \\\n  --output 'a # b'  # and so is this\n"
                               "--resume x#y\n--wd=5e-4 --sync-bn\n")
    for argv in ([file, "DIR"], ["DIR", file]):
        options = parse_options(argv)
        assert (options.data, options.lr, options.epochs, options.output, options.resume, options.weight_decay,
                options.sync_bn) == ("DIR", 0.2, 3, "a # b", "x#y", 5e-4, True)
    options = parse_options([file, "DIR", "--lr", "0.3", "--epochs", "4"])
    assert (options.lr, options.epochs) == (0.3, 4)
    assert parse_options([arguments(tmp_path, "DIR --lr 7")]).lr == 7
    assert parse_options(["./@dir"]).data == "./@dir"


@pytest.mark.parametrize(("text", "words"), [
    ("--lr 0.2\n--epoch 3", "run.args: unrecognized arguments: --epoch; did you mean --epochs"),
    ("--lr many", "run.args: argument --lr.*'many': give a number"),
    ("--lr", "run.args: argument --lr.*expected one argument"),
    ("--sync-bn\n--output 'a", "run.args: line 2: no closing quotation"),
    ("@other.args", "run.args: @other.args: a file of arguments names no other"),
    (b"--output \xff\xfe", "@.*run.args: the file of arguments .*run.args cannot be read .it is not text"),
])
def test_mistakes_in_a_file(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as raised:
        parse_options([arguments(tmp_path, text), "DIR"])
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"@{path}: the file of arguments {path} cannot be read .{reason}.*/@"):
            parse_options([f"@{path}", "DIR"])
