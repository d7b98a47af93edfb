"""Every mistake gives one line: file, key, what was found, what is allowed. And the settings of a run
have exactly what its numbers depend on.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import create_model

from mochi.config import (
    ConfigError,
    Contrastive,
    DetectionRun,
    Experiment,
    PretrainRun,
    ProbeRun,
    Run,
    Section,
    Supervised,
    Untrained,
    all_runs,
    detection_run,
    load_experiment,
    negatives,
    parse_dataset,
    parse_experiment,
    pretrain_run,
    probe_run,
    task_names,
)
from mochi.config.evaluation import settings_of
from mochi.config.negatives import PLAIN, section_of
from mochi.contrast import rules
from mochi.contrast.rules.mochi import MoCHi
from tests.detection.sets import small_set
from tests.tiny import FILE, MOCHI, TINY, changed

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid(path: Path) -> None:
    """It has the name of its file, and one row is the baseline without training."""
    experiment = load_experiment(path)
    assert experiment.name == ("embedded" if path.stem == "config" else path.stem)
    assert not all(pretrain_run(experiment, *run).is_trained for run in all_runs(experiment))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sedes", [1], "x.yaml: sedes: unknown key 'sedes'; did you mean 'seeds'?"),
        ("pretrain/queue_sise", 5, "pretrain.queue_sise: unknown key 'queue_sise'; did you mean 'queue_size'?"),
        (f"methods/{MOCHI}/negatives/num_hard", 5, "negatives.num_hard: unknown key 'num_hard'; did you mean 'num_hardest'?"),
        (f"methods/{MOCHI}/negatives/rule", "mochy", "negatives.rule: found 'mochy'; did you mean 'mochi'? allowed: debiased, "),
        (f"methods/{MOCHI}/negatives/rule", None, "negatives.rule: missing; expected a name, as in {rule: mochi, ...}; allowed: debiased, "),
        (f"methods/{MOCHI}/negatives/rule", "same_image", "negatives.rule: found 'same_image'; a mask, so write masks: [same_image]; allowed: debiased"),
        (f"methods/{MOCHI}/negatives/num_pair_synthetics", "x", "negatives.num_pair_synthetics: found 'x'; allowed: a valid integer"),
        (f"methods/{MOCHI}/negatives/num_pair_synthetics", -1, f"{MOCHI}.negatives: num_pair_synthetics: found -1; expected at least 0"),
        (f"methods/{MOCHI}/masks", ["class_orcale"], "masks: found 'class_orcale'; did you mean 'class_oracle'? allowed: class_oracle, same_image"),
        (f"methods/{MOCHI}/masks", ["mochi"], "masks: found 'mochi'; a rule, so write {rule: mochi}; allowed: class_oracle"),
        ("pretrain/masks", ["mask"], "x.yaml: pretrain.masks: found 'mask'; allowed: class_oracle, same_image"),
        ("pretrain/negatives", "mochi", "pretrain.negatives: found 'mochi'; expected a rule with its settings, as in {rule: mochi, ...}"),
        ("pretrain/negatives", {"rule": "debiased", "positive_prior": 1}, "pretrain.negatives: positive_prior: found 1.0; expected 0 or more and below 1"),
        (f"methods/{MOCHI}/mixing", {"num_hardest": 8, "through_query": True}, f"x.yaml: methods.{MOCHI}.mixing: found a key of version 0.1; write negatives: {{rule: mochi, num_hardest: 8, through_query: true}}"),
        (f"methods/{MOCHI}/class_oracle", True, "class_oracle: found a key of version 0.1; write masks: [class_oracle]"),
        ("pretrain/class_oracle", False, "x.yaml: pretrain.class_oracle: found a key of version 0.1; write nothing: leave it out"),
        ("evaluation/linear/lrr", 5, "evaluation.linear.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        ("pretrain/queue_size", 8, f"methods.{MOCHI}: negatives.num_hardest: found 16; expected 2 to 8 (queue_size)"),
        (f"methods/{MOCHI}/negatives/warmup_epochs", 2, "warmup_epochs: found 2; must be smaller than epochs = 2"),
        (f"methods/{MOCHI}/negatives/num_hardest", 1, "num_hardest: found 1; expected 2 to 100 (queue_size)"),
        (f"methods/{MOCHI}/negatives/num_query_synthetics", 9, "means {rule: mochi, num_hardest: 16, num_pair_synthetics: 24, num_query_synthetics: 8}; change one of the two"),
        ("methods/mochi-big", {}, "expected mochi-N-s-s'"),
        ("seeds", [0, 0], "seeds: found [0, 0]; seeds must be distinct"),
        ("seeds", [], "seeds: found []; allowed:"),
        (f"methods/{MOCHI}/seeds", [1, 1], f"methods.{MOCHI}.seeds: found [1, 1]; seeds must be distinct"),
        ("pretrain/temperature", 0, "temperature: found 0"),
        ("pretrain/temperature", -1.0, "temperature: found -1.0"),
        ("pretrain/temperature", float("inf"), "x.yaml: pretrain.temperature: found inf; allowed: a finite number"),
        ("pretrain/weight_decay", "nan", "pretrain.weight_decay: found 'nan'; allowed: a finite number"),
        ("evaluation/linear/lr", "1e999", "evaluation.linear.lr: found '1e999'; allowed: a finite number"),
        ("pretrain/objective", "supervised", "x.yaml: pretrain.objective: found 'supervised'; a row is contrastive"),
        ("pretrain/objective", "banana", "pretrain.objective: found 'banana'"),
        ("pretrain/objective", "contrastive", "pretrain.objective: found 'contrastive'"),
        ("methods/random-init/augmentation", "v1", "methods.random-init.augmentation: found 'v1'; expected the keys"),
        ("methods/random-init/augmentation", None, "methods.random-init.augmentation: found None; expected the keys"),
        ("methods/random-init/augmentation", {"blurr": True}, "augmentation.blurr: unknown key 'blurr'; did you mean 'blur'?"),
        ("pretrain/lr", "fast", "lr: found 'fast'; allowed: a valid number"),
        ("pretrain/epochs", True, "epochs: found True; allowed: a valid integer"),
        ("pretrain/bn_groups", 17, "bn_groups: found 17; batch_size = 32 leaves fewer than 2 images per group"),
        ("pretrain/matching_epochs", [2], "matching_epochs: found [2]; epochs count from 0 to 1"),
        ("evaluation/linear/lr_drops", [5], "lr_drops: found [5]; the probe trains for only 5 epochs"),
        ("evaluation/resize", 8, "resize: found 8; must be at least image_size = 16"),
        ("evaluation/knn/resize", 8, "evaluation: knn.resize: found 8; must be at least image_size = 16"),
        ("evaluation/knn/image_size", 17, "evaluation: knn.resize: found 16; must be at least image_size = 17"),
        ("evaluation/imagesize", 16, "evaluation.imagesize: unknown key 'imagesize'; did you mean 'image_size'?"),
        ("evaluation/lineer", {"lr": 1}, "evaluation.lineer: task: found 'lineer'; did you mean 'linear'? allowed: few_label, knn, linear"),
        ("evaluation/probe", {"task": "lineer"}, "evaluation.probe: task: found 'lineer'; did you mean 'linear'?"),
        ("evaluation/probe", {"task": 7}, "evaluation.probe: task: found '7'; allowed: few_label, knn, linear"),
        ("evaluation/probe", {"task": "../stage"}, "evaluation.probe: task: found '../stage'; allowed:"),
        ("evaluation/probe", [], "evaluation.probe: unknown key 'probe'; allowed: batch_size, detection, features_on"),
        ("evaluation/detection-x", {"task": "knn"}, "evaluation: found a task named 'detection-x'; allowed: letters"),
        ("evaluation/pretrain", {"task": "knn"}, "evaluation: found a task named 'pretrain'; allowed: letters"),
        ("evaluation/a b", {"task": "knn"}, "evaluation: found a task named 'a b'; allowed: letters"),
        ("evaluation/knn/k", [], "evaluation.knn.k: found []; allowed: "),
        ("evaluation/knn/k", [5, 0], "evaluation.knn.k.1: found 0; allowed: greater than or equal to 1"),
        ("evaluation/knn/temperature", "x", "evaluation.knn.temperature.0: found 'x'; allowed: a valid number"),
        ("evaluation/knn/dataset", {"source": "fodler"}, "evaluation.knn.dataset.source: found 'fodler'; did you mean 'folder'?"),
        ("evaluation/knn/dataset", TINY["dataset"] | {"seed": 1}, "x.yaml: evaluation.knn.dataset.name: found 'photo-patches-tiny', the name of another data set"),
        ("dataset/source", "fodler", "dataset.source: found 'fodler'; did you mean 'folder'?"),
        ("dataset/patchsize", 8, "dataset.patchsize: unknown key 'patchsize'; did you mean 'patch_size'?"),
        ("encoder/stem", "tiny", "encoder.stem: found 'tiny'; allowed: 'imagenet', 'half' or 'full'"),
        (f"methods/{MOCHI}/objective", "contrst", "objective: found 'contrst'; did you mean 'contrastive'? allowed: contrastive, file, none, supervised"),
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
def test_the_shared_recipe_is_checked_even_if_no_row_uses_it(
    key: str, value: Any, message: str, method: dict[str, Any]
) -> None:
    """A later row may use it."""
    data = changed(f"pretrain/{key}", value) | {"methods": {"row": method}}
    with pytest.raises(ConfigError) as error:
        parse_experiment(data, "x.yaml")
    assert str(error.value).startswith(f"x.yaml: {message}")


def test_rows_may_complete_and_correct_the_shared_recipe() -> None:
    """Rules between keys apply to each complete row: 40 groups fit its batch, not the shared one."""
    data = changed("pretrain/bn_groups", 40)
    del data["pretrain"]["lr"]
    data["methods"] = {"row": {"lr": 0.1, "batch_size": 80}}
    recipe = pretrain_run(parse_experiment(data, "x.yaml"), "row", 0).recipe
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


def test_the_mistakes_of_all_rows_are_listed_and_a_shared_one_once() -> None:
    data = changed("baseline", "moco-v3")
    data["methods"] |= {"moco-v1": {"head": "mpl"}, "moco-v2": {"lr": -1}}
    with pytest.raises(ConfigError) as error:
        parse_experiment(data, "x.yaml")
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "methods.moco-v1.head",
        "methods.moco-v2.lr",
        "baseline",
    ]
    data = changed("baseline", None)
    data["methods"]["moco-v2"] = {}
    del data["pretrain"]["lr"]
    with pytest.raises(ConfigError) as error:
        parse_experiment(data, "x.yaml")
    assert str(error.value) == f"x.yaml: methods.{MOCHI}.lr: missing; this key is required"


def test_1e_4_is_a_number_and_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    text = FILE.read_text()
    file.write_text(text.replace("weight_decay: 1.0e-4", "weight_decay: 1e-4"))
    recipe = pretrain_run(load_experiment(file), MOCHI, 0).recipe
    assert isinstance(recipe, Contrastive)
    assert recipe.weight_decay == 1e-4
    file.write_text(text.replace("  lr: 0.06\n", "  lr: 0.06\n  lr: 0.6\n"))
    with pytest.raises(ConfigError, match="the key 'lr' is written twice"):
        load_experiment(file)


def test_keys_may_be_merged_from_an_anchor(tmp_path: Path) -> None:
    """A row with its own values besides those of an anchor, and another that merges that row."""
    file = tmp_path / "experiment.yaml"
    rows = """methods:
  first: &first {lr: 0.1, momentum: 0.5}
  second: &second {<<: *first, lr: 0.2}
  third: {<<: [*second], momentum: 0.7}
"""
    start, _, rest = FILE.read_text().partition("methods:\n")
    file.write_text(start + rows + rest[rest.index("\nevaluation") :])
    experiment = load_experiment(file)
    recipes = [pretrain_run(experiment, name, 0).recipe for name in ("first", "second", "third")]
    assert [(each.lr, each.momentum) for each in recipes if isinstance(each, Contrastive)] == [
        (0.1, 0.5), (0.2, 0.5), (0.2, 0.7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing; expected keys and values"),
        ("[1, 2]", "found list; expected keys and values"),
        ("a: [", "is not valid YAML"),
        ("\x00", "found zero bytes"),
        ("a: " + "[" * 2000, "is not valid YAML: nested too deeply"),
        ("a: 2001-99-99", "is not valid YAML: a date, a number or a tag: month must be in 1"),
        ("a: !!int x", "is not valid YAML: a date, a number or a tag: invalid literal"),
        ("a: !!bool x", "is not valid YAML: a date"),
        ("a: !!timestamp x", "is not valid YAML: a date"),
        ("a: " + "9" * 5000, "is not valid YAML: a date, a number or a tag: Exceeds"),
        ("a: 1\nb: 2\na: 3", "is not valid YAML: the key 'a' is written twice, line 3, column 1"),
    ],
)
def test_files_that_are_not_experiments_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{file}: {message}"):
        load_experiment(file)


def test_a_key_that_is_no_text_is_shown() -> None:
    with pytest.raises(ConfigError, match=r"x.yaml: methods: found the key True; allowed: text; write"):
        parse_experiment(changed("methods", {True: {"objective": "none"}}), "x.yaml")
    with pytest.raises(ConfigError, match=r"x.yaml: \(top level\): found the key 5; allowed: text"):
        parse_experiment(TINY | {5: 1}, "x.yaml")  # type: ignore[operator]


def test_an_option_that_is_not_yaml_is_named() -> None:
    with pytest.raises(ConfigError, match="--option: val_share: is not valid YAML"):
        parse_dataset("folder", "x", "images", ["val_share=["])


def test_the_papers_settings_are_allowed() -> None:
    """s and s' may exceed N: (256, 2048, 2048) is a row of the paper's table 2."""
    negatives = {
        "rule": "mochi",
        "num_hardest": 32,
        "num_pair_synthetics": 256,
        "num_query_synthetics": 256,
        "warmup_epochs": 0,
    }
    experiment = parse_experiment(changed("methods/mochi-32-256-256", {"negatives": negatives}), "x.yaml")
    recipe = pretrain_run(experiment, "mochi-32-256-256", 0).recipe
    assert isinstance(recipe, Contrastive)
    rule = recipe.negatives.make()
    assert isinstance(rule, MoCHi)
    assert rule.num_pair_synthetics > rule.num_hardest


def test_a_run_is_the_recipe_with_the_changes_of_its_method() -> None:
    experiment = parse_experiment(
        changed("methods/supervised", {"objective": "supervised", "lr": 0.5}), "x"
    )
    mochi, supervised, untrained = (
        pretrain_run(experiment, method, 0).recipe for method in (MOCHI, "supervised", "random-init")
    )
    assert isinstance(mochi, Contrastive)
    assert (mochi.lr, mochi.queue_size) == (0.06, 100)
    assert isinstance(mochi.negatives.make(), MoCHi)
    assert isinstance(supervised, Supervised)
    assert (supervised.lr, supervised.epochs) == (0.5, 2)
    assert isinstance(untrained, Untrained)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda tiny: pretrain_run(tiny, "moco-v3", 0), r"methods: unknown key 'moco-v3'; allowed: mochi"),
        (lambda tiny: pretrain_run(tiny, MOCHI, 7), f"seed: found 7; {MOCHI} has: 0, 1"),
        (lambda tiny: probe_run(tiny, "random-init", 1, "knn"), "seed: found 1; random-init has: 0"),
        (lambda tiny: probe_run(tiny, MOCHI, 0, "lineer"), "task: found 'lineer'; tiny has: linear, knn"),
        (lambda tiny: detection_run(tiny, MOCHI, 0, "coco"), "set: found 'coco'; tiny has: none"),
    ],
)
def test_a_run_that_the_experiment_does_not_have_is_refused(
    tiny: Experiment, ask: Callable[[Experiment], Run], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(tiny)


def all_settings(data: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(method, stage) -> settings of seed 0."""
    experiment = parse_experiment(data, "x")
    return {
        (method, stage): (
            pretrain_run(experiment, method, 0)
            if stage == "pretrain"
            else probe_run(experiment, method, 0, stage)
        ).settings()
        for method in experiment.methods
        for stage in ("pretrain", "linear", "knn")
    }


def affected(path: str, value: Any, base: dict[str, Any] = TINY) -> set[tuple[str, str]]:
    """Runs whose settings change with a key."""
    before, after = all_settings(base), all_settings(changed(path, value, base))
    return {key for key in before if before[key] != after[key]}


def test_a_changed_key_changes_only_the_runs_that_depend_on_it() -> None:
    both = {"random-init", MOCHI}
    assert affected("title", "another") == set()
    assert affected("name", "another") == set()
    assert affected("evaluation/linear/lr", 0.5) == {(method, "linear") for method in both}
    assert affected("evaluation/knn/k", 3) == {(method, "knn") for method in both}
    assert affected("evaluation/resize", 20) == {
        (method, task) for method in both for task in ("linear", "knn")
    }
    # An evaluation reads an encoder file and does not depend on how it was trained.
    assert affected("pretrain/lr", 0.5) == {(MOCHI, "pretrain")}
    assert affected(f"methods/{MOCHI}/key_momentum", 0.5) == {(MOCHI, "pretrain")}
    assert affected("augmentation/min_scale", 0.5) == {(MOCHI, "pretrain")}
    assert affected("encoder/width", 4) == {
        (method, task) for method in both for task in ("pretrain", "linear", "knn")
    }


def test_keys_that_change_no_number_are_not_settings() -> None:
    assert affected("pretrain/checkpoint_minutes", 1) == set()
    assert affected("evaluation/batch_size", 7) == set()
    own = changed("dataset", {"source": "folder", "name": "mine", "path": "here"})
    for key, value in (("path", "there"), ("name", "moved")):
        assert affected(f"dataset/{key}", value, own) == set()


def test_the_path_and_the_rows_of_a_detection_set_are_not_settings(tiny: Experiment) -> None:
    def settings(root: Path, **changes: Any) -> dict[str, Any]:
        chosen = small_set(root, **changes)
        chosen = chosen.model_copy(update={"methods": [root.parent.name], "pretrain_seeds": None})
        evaluation = tiny.evaluation.model_copy(update={"detection": {"few": chosen}})
        experiment = tiny.model_copy(update={"evaluation": evaluation})
        return detection_run(experiment, "random-init", 0, "few").settings()

    base = settings(Path("here/VOC"))
    assert settings(Path("there/VOC")) == base
    assert settings(Path("here/VOC"), training={"checkpoint_minutes": 1.0, "workers": 3}) == base
    assert settings(Path("here/VOC"), training={"together": True}) == base
    assert settings(Path("here/VOC"), training={"lr": [0.03]}) != base
    assert settings(Path("here/VOC"), model={"roi_size": 5}) != base
    assert settings(Path("here/VOC"), data={"classes": ["bar", "square"]}) != base


def test_an_untrained_encoder_depends_on_its_architecture_and_seed_only(tiny: Experiment) -> None:
    assert pretrain_run(tiny, "random-init", 0).settings() == {
        "seed": 0,
        "encoder": {"architecture": "resnet10", "stem": "half", "width": 8},
        "recipe": {"objective": "none"},
    }


def with_new_key(run: Run, path: str, value: int | None = None) -> Run:
    """The run in a later version of the program, whose section at `path` has one more key."""
    name, _, rest = path.partition("/")
    if not name:
        changes: dict[str, Any] = {} if value is None else {"new_key": value}
        kind = create_model(type(run).__name__, __base__=type(run), new_key=(int, 5))
        return kind(**dict(run), **changes)
    section = with_new_key(getattr(run, name), rest, value)
    kind = create_model(type(run).__name__, __base__=type(run), **{name: (type(section), ...)})
    return kind(**{**dict(run), name: section})


SECTIONS = [
    ("pretrain", "recipe"),
    ("pretrain", "encoder"),
    ("pretrain", "augmentation"),
    ("linear", ""),
    ("linear", "protocol"),
    ("knn", "protocol"),
    ("few", "detection/data"),
    ("few", "detection/training"),
]


@pytest.mark.parametrize(("stage", "path"), SECTIONS)
def test_an_optional_key_that_is_not_set_changes_no_settings(
    tiny: Experiment, stage: str, path: str
) -> None:
    """Otherwise a new key would make every earlier result stale."""
    evaluation = tiny.evaluation.model_copy(update={"detection": {"few": small_set(Path("a/VOC"))}})
    experiment = tiny.model_copy(update={"evaluation": evaluation})
    if stage == "pretrain":
        run: Run = pretrain_run(experiment, MOCHI, 0)
    elif stage == "few":
        run = detection_run(experiment, MOCHI, 0, stage)
    else:
        run = probe_run(experiment, MOCHI, 0, stage)
    extended = with_new_key(run, path)
    assert "new_key" in str(extended.model_dump(mode="json")), "the key exists"
    assert extended.settings() == run.settings()
    assert with_new_key(run, path, 6).settings() != run.settings(), "a set key counts"
    assert with_new_key(run, path, 5).settings() == run.settings(), "a key at its default does not count"


def test_an_optional_key_of_a_rule_that_is_not_set_changes_no_settings(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(MoCHi):
        new_key: int = 5

    def settings(**more: int) -> dict[str, Any]:
        data = copy.deepcopy(TINY)
        data["methods"][MOCHI]["negatives"] |= more
        return pretrain_run(parse_experiment(data, "x"), MOCHI, 0).settings()

    before = settings()
    monkeypatch.setattr(rules, "find", {"mochi": Later}.get)
    monkeypatch.setattr(negatives, "section_of", section_of.__wrapped__)
    assert settings() == settings(new_key=5) == before
    assert settings(new_key=6) != before


def test_a_rule_and_masks_at_their_defaults_are_not_settings(tiny: Experiment) -> None:
    def recipe(**keys: Any) -> dict[str, Any]:
        run = pretrain_run(parse_experiment(changed("methods/row", keys), "x"), "row", 0)
        found: dict[str, Any] = run.settings()["recipe"]
        return found

    plain = recipe()
    assert (
        recipe(negatives={"rule": "moco"})
        == recipe(negatives={"rule": "moco", "warmup_epochs": 0})
        == plain
    )
    assert recipe(masks=[]) == plain
    debiased = recipe(negatives={"rule": "debiased", "positive_prior": 0.1})
    assert debiased == {**plain, "negatives": {"rule": "debiased"}}
    both = ["same_image", "class_oracle"]
    assert recipe(masks=both) == recipe(masks=both[::-1]) == {**plain, "masks": sorted(both)}


def test_a_row_depends_on_the_code_of_its_own_rule_and_masks() -> None:
    def code(**keys: Any) -> set[str]:
        run = pretrain_run(parse_experiment(changed("methods/row", keys), "x"), "row", 0)
        return {name.removeprefix("mochi.contrast.rules.") for name in run.code()}

    assert code() == {"moco"}
    assert code(negatives={"rule": "hard_weighting"}) == {"hard_weighting", "debiased"}
    assert code(masks=["same_image"]) == {"moco", "same_image"}


DEFAULTS = {
    "Encoder.stem": None,
    "Encoder.width": None,
    "Augmentation.blur": True,
    "Contrastive.optimizer": "sgd",
    "Contrastive.warmup_epochs": 0,
    "Contrastive.deterministic": True,
    "Contrastive.precision": "auto",
    "Contrastive.negatives": PLAIN,
    "Contrastive.masks": [],
    "MoCo.warmup_epochs": 0,
    "MoCHi.warmup_epochs": 0,
    "MoCHi.through_query": False,
    "Debiased.warmup_epochs": 0,
    "Debiased.positive_prior": 0.1,
    "HardWeighting.warmup_epochs": 0,
    "HardWeighting.positive_prior": 0.1,
    "HardWeighting.concentration": 1.0,
    "Decoupled.warmup_epochs": 0,
    "SynCo.warmup_epochs": 10,
    "SynCo.num_hardest": 1024,
    "SynCo.num_interpolated": 256,
    "SynCo.num_extrapolated": 256,
    "SynCo.num_mixed": 256,
    "SynCo.num_noisy": 64,
    "SynCo.num_perturbed": 64,
    "SynCo.num_adversarial": 64,
    "SynCo.noise": 0.01,
    "SynCo.perturbation": 0.01,
    "SynCo.adversarial_step": 0.01,
    "Contrastive.matching_epochs": [],
    "Supervised.optimizer": "sgd",
    "Supervised.warmup_epochs": 0,
    "Supervised.deterministic": True,
    "Supervised.precision": "auto",
    "LinearProbe.lr_candidates": [],
    "LinearProbe.held_out": 0.1,
    "LinearProbe.standardize": False,
    "FewLabel.percent": None,
    "FewLabel.images_per_class": None,
    "FewLabel.samples": 5,
    "FewLabel.l2": 0.01,
    "DetectionData.classes": None,
    "DetectionData.interpolation": None,
    "DetectionData.scenes": None,
    "DetectionTraining.search_iterations": None,
    "DetectionTraining.validation": None,
    "DetectionTraining.lr_drops": [],
    "DetectionTraining.precision": "auto",
    "DetectionRun.searches": False,
}
# `image_size` and `resize` of a task: the run has them, the task's own or the shared ones.
NO_NUMBER = {
    "checkpoint_minutes", "workers", "together", "methods", "pretrain_seeds", "image_size", "resize",
}  # fmt: skip


def optional_keys(kind: object) -> dict[str, Any]:
    """Section.key -> default, for a section and the sections in it."""
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        return {key: value for part in get_args(kind) for key, value in optional_keys(part).items()}
    found = {}
    for name, field in kind.model_fields.items():
        if name in NO_NUMBER or name == "dataset":
            continue
        if not field.is_required():
            found[f"{kind.__name__}.{name}"] = field.get_default(call_default_factory=True)
        found |= optional_keys(field.annotation)
    return found


def test_no_default_changes_unnoticed() -> None:
    """Settings leave out defaults, so with a changed default old results would count as current."""
    found = {
        key: value
        for run in (
            PretrainRun,
            ProbeRun,
            DetectionRun,
            *map(settings_of, task_names()),
            *map(section_of, rules.names_of(rules.Rule)),
        )
        for key, value in optional_keys(run).items()
    }
    assert {key: found[key] for key in DEFAULTS if key in found} == DEFAULTS, (
        "a default that results were computed with has changed or gone: keep it, and let experiments that "
        "want another value set the key"
    )
    sections = {key.split(".")[0] for key in DEFAULTS}
    new = {key for key in found.keys() - DEFAULTS.keys() if key.split(".")[0] in sections}
    assert not new, "add the new key to DEFAULTS"
