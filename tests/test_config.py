"""Every mistake gets one line: file, key path, what was found, what is allowed. And a run holds only what
it depends on."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mochi.config import (
    ConfigError,
    Contrastive,
    Supervised,
    Untrained,
    digest,
    load_experiment,
    load_run,
    only_for,
    parse_experiment,
    resolve,
    settings,
    write_run,
)

ROOT = Path(__file__).parents[1]
TINY = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text())
MOCHI = "mochi-16-24-8"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The tiny experiment with one key set."""
    data = copy.deepcopy(TINY)
    *parents, last = path.split("/")
    place = data
    for key in parents:
        place = place[key]
    place[last] = value
    return data


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.methods


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sedes", [1], "x.yaml: sedes: unknown key 'sedes'; did you mean 'seeds'?"),
        ("pretrain/queue_sise", 5, "pretrain.queue_sise: unknown key 'queue_sise'; did you mean 'queue_size'?"),
        (f"methods/{MOCHI}/mixing/num_hard", 5, "num_hard: unknown key 'num_hard'; did you mean 'num_hardest'?"),
        ("evaluation/linear/lrr", 5, "evaluation.linear.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        ("pretrain/queue_size", 8, "num_hardest: found 16; the queue holds only queue_size = 8"),
        (f"methods/{MOCHI}/mixing/warmup_epochs", 2, "warmup_epochs: found 2; must be smaller than epochs = 2"),
        (f"methods/{MOCHI}/mixing/num_hardest", 1, "num_hardest: found 1; a pair needs at least 2"),
        (f"methods/{MOCHI}/mixing/num_query_synthetics", 9, "promises (16, 24, 8); make them agree"),
        ("methods/mochi-big", {}, "a MoCHi row is called mochi-N-s-s'"),
        ("seeds", [0, 0], "seeds: found [0, 0]; seeds must be distinct"),
        ("seeds", [], "seeds: found []; allowed:"),
        (f"methods/{MOCHI}/seeds", [1, 1], f"methods.{MOCHI}.seeds: found [1, 1]; seeds must be distinct"),
        ("pretrain/temperature", 0, "temperature: found 0"),
        ("pretrain/temperature", -1.0, "temperature: found -1.0"),
        ("pretrain/temperature", float("inf"), "x.yaml: pretrain.temperature: found inf; allowed: a finite number"),
        ("pretrain/weight_decay", "nan", "pretrain.weight_decay: found 'nan'; allowed: a finite number"),
        ("evaluation/linear/lr", "1e999", "evaluation.linear.lr: found '1e999'; allowed: a finite number"),
        ("pretrain/objective", "supervised", "x.yaml: pretrain.objective: found 'supervised'; rows are contrastive"),
        ("pretrain/objective", "banana", "pretrain.objective: found 'banana'"),
        ("pretrain/objective", "contrastive", "pretrain.objective: found 'contrastive'"),
        ("methods/random-init/augmentation", "v1", "methods.random-init.augmentation: found 'v1'; expected the keys"),
        ("methods/random-init/augmentation", None, "methods.random-init.augmentation: found None; expected the keys"),
        ("methods/random-init/augmentation", {"blurr": True}, "augmentation.blurr: unknown key 'blurr'; did you mean 'blur'?"),
        ("pretrain/lr", "fast", "lr: found 'fast'; allowed: a valid number"),
        ("pretrain/epochs", True, "epochs: found True; allowed: a valid integer"),
        ("pretrain/bn_groups", 17, "bn_groups: found 17; batch_size = 32 leaves fewer than 2 images a group"),
        ("pretrain/matching_epochs", [2], "matching_epochs: found [2]; epochs count from 0 to 1"),
        ("evaluation/linear/lr_drops", [5], "lr_drops: found [5]; the probe trains for 5 epochs only"),
        ("evaluation/resize", 8, "resize: found 8; must be at least image_size = 16"),
        ("dataset/source", "fodler", "dataset.source: found 'fodler'; did you mean 'folder'?"),
        ("dataset/patchsize", 8, "dataset.patchsize: unknown key 'patchsize'; did you mean 'patch_size'?"),
        ("encoder/stem", "tiny", "encoder.stem: found 'tiny'; allowed: 'imagenet', 'half' or 'full'"),
        (f"methods/{MOCHI}/objective", "contrst", "objective: found 'contrst'; did you mean 'contrastive'? allowed: contrastive, none, supervised"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_experiment(changed(path, value), "x.yaml")
    (line,) = str(error.value).splitlines()
    assert line.startswith("x.yaml: ")
    assert message in line


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", "junk", "pretrain.lr: found 'junk'; allowed: a valid number"),
        ("queue_sise", 5, "pretrain.queue_sise: unknown key 'queue_sise'; did you mean 'queue_size'?"),
        ("schedule", "linear", "pretrain.schedule: found 'linear'"),
    ],
)
@pytest.mark.parametrize("method", [{"objective": "none"}, {"lr": 0.1, "schedule": "step"}])
def test_the_shared_recipe_is_checked_where_no_row_reads_it(
    key: str, value: Any, message: str, method: dict[str, Any]
) -> None:
    """One day a row will."""
    data = changed(f"pretrain/{key}", value) | {"methods": {"row": method}}
    with pytest.raises(ConfigError) as error:
        parse_experiment(data, "x.yaml")
    assert str(error.value).startswith(f"x.yaml: {message}")


def test_rows_may_complete_and_correct_the_shared_recipe() -> None:
    """What keys must be to each other is asked of each row: 40 groups fit its batch, not the shared one."""
    data = changed("pretrain/bn_groups", 40)
    del data["pretrain"]["lr"]
    data["methods"] = {"row": {"lr": 0.1, "batch_size": 80}}
    recipe = resolve(parse_experiment(data, "x.yaml"), "row", 0).pretrain
    assert isinstance(recipe, Contrastive)
    assert (recipe.lr, recipe.batch_size, recipe.bn_groups) == (0.1, 80, 40)


def test_a_missing_key_is_named() -> None:
    data = copy.deepcopy(TINY)
    del data["pretrain"]["lr"]
    with pytest.raises(ConfigError, match=r"lr: missing; this key is required"):
        parse_experiment(data, "x.yaml")


def test_two_mistakes_give_two_lines() -> None:
    data = changed("sedes", 1)
    data["title"] = 3
    with pytest.raises(ConfigError) as error:
        parse_experiment(data, "x.yaml")
    assert len(str(error.value).splitlines()) == 2


def test_1e_4_is_a_number_and_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    text = (ROOT / "tests/tiny.yaml").read_text()
    file.write_text(text.replace("weight_decay: 1.0e-4", "weight_decay: 1e-4"))
    recipe = resolve(load_experiment(file), MOCHI, 0).pretrain
    assert isinstance(recipe, Contrastive)
    assert recipe.weight_decay == 1e-4
    file.write_text(text.replace("  lr: 0.06\n", "  lr: 0.06\n  lr: 0.6\n"))
    with pytest.raises(ConfigError, match="the key 'lr' is written twice"):
        load_experiment(file)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00"])
def test_files_that_are_no_experiment(tmp_path: Path, text: str) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        load_experiment(file)


def test_the_papers_own_settings_are_allowed() -> None:
    """s and s' may exceed N: (256, 2048, 2048) is a row of the paper's table 2."""
    mixing = {
        "num_hardest": 32,
        "num_pair_synthetics": 256,
        "num_query_synthetics": 256,
        "warmup_epochs": 0,
    }
    experiment = parse_experiment(changed("methods/mochi-32-256-256", {"mixing": mixing}), "x.yaml")
    recipe = resolve(experiment, "mochi-32-256-256", 0).pretrain
    assert isinstance(recipe, Contrastive)
    assert recipe.mixing is not None
    assert recipe.mixing.num_pair_synthetics > recipe.mixing.num_hardest


def test_a_run_is_the_recipe_with_the_methods_changes() -> None:
    experiment = parse_experiment(
        changed("methods/supervised", {"objective": "supervised", "lr": 0.5}), "x"
    )
    mochi, supervised, untrained = (
        resolve(experiment, method, 0).pretrain for method in (MOCHI, "supervised", "random-init")
    )
    assert isinstance(mochi, Contrastive)
    assert (mochi.lr, mochi.queue_size) == (0.06, 100)
    assert mochi.mixing is not None
    assert isinstance(supervised, Supervised)
    assert (supervised.lr, supervised.epochs) == (0.5, 2)
    assert isinstance(untrained, Untrained)


def test_run_files_round_trip_and_another_version_is_refused(tmp_path: Path) -> None:
    run = resolve(parse_experiment(TINY, "x"), MOCHI, 1)
    file = tmp_path / "run.yaml"
    file.write_text(write_run(run))
    assert load_run(file, "pretrain") == load_run(file, "knn") == run
    file.write_text(write_run(only_for(run, "knn")))
    assert load_run(file, "knn").pretrain is None
    with pytest.raises(ConfigError, match="says nothing about the stage pretrain"):
        load_run(file, "pretrain")
    file.write_text(write_run(run).replace("version: 2", "version: 7"))
    with pytest.raises(ConfigError, match=r"version: found 7; this program reads run files of version 2"):
        load_run(file, "pretrain")


def test_editing_one_thing_changes_only_what_depends_on_it() -> None:
    def digests(data: dict[str, Any]) -> dict[tuple[str, str], str]:
        experiment = parse_experiment(data, "x")
        return {
            (method, stage): digest(settings(resolve(experiment, method, 0), stage))
            for method in experiment.methods
            for stage in ("pretrain", "linear", "knn")
        }

    def touched(path: str, value: Any) -> set[tuple[str, str]]:
        before, after = digests(TINY), digests(changed(path, value))
        return {key for key in before if before[key] != after[key]}

    both = {"random-init", MOCHI}
    assert touched("title", "another") == set()
    assert touched("evaluation/linear/lr", 0.5) == {(method, "linear") for method in both}
    assert touched("evaluation/knn/k", 3) == {(method, "knn") for method in both}
    assert touched("pretrain/lr", 0.5) == {(MOCHI, "pretrain")}
    assert touched(f"methods/{MOCHI}/key_momentum", 0.5) == {(MOCHI, "pretrain")}
    # How often a checkpoint is written changes no result.
    assert touched("pretrain/checkpoint_minutes", 1) == set()
