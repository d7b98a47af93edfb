"""Two processes compared with one: the same batches, batch-norm groups, queue and encoder."""

import csv
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mochi.config import Contrastive, Experiment, load_experiment, parse_experiment, pretrain_run
from mochi.contrast.moco import MoCo
from mochi.runtime import distributed
from tests.commands import run
from tests.pretraining.runs import rows, train
from tests.processes import run_ranks
from tests.tiny import changed, with_recipe

CONFIG = "tiny.yaml"


def project(folder: Path, experiment: Experiment, data: Path) -> Path:
    """A folder to run commands in, with the experiment file and its prepared data."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / data.name).symlink_to(data)
    (folder / CONFIG).write_text(yaml.safe_dump(experiment.model_dump(mode="json", exclude_unset=True)))
    return folder


def pretrain(folder: Path, method: str) -> None:
    """What each rank runs below: the command."""
    os.chdir(folder)
    done = run("pretrain", "--config", CONFIG, "--method", method, "--seed", "0")
    assert done.returncode == 0, done.stderr


def queue_of_this_rank(config: str, out: str) -> None:
    """What each of the two ranks below runs: three steps on its half of the batch, then it saves its
    queue.
    """
    run = pretrain_run(load_experiment(Path(config)), "moco-v2", 0)
    assert isinstance(run.recipe, Contrastive)
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        moco = MoCo(run.encoder, run.recipe, run.seed)
        for step in range(3):
            images = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            labels = torch.arange(8) + 8 * step
            query, key = (distributed.own_slice(view) for view in images)
            result = moco.training_step(query, key, distributed.own_slice(labels), step, synthesize=False)
            moco.enqueue(result.key, distributed.own_slice(labels))
        state = {"keys": moco.queue.keys, "labels": moco.queue.labels, "key": result.key}
        save_file(state, f"{out}/rank{distributed.rank()}.safetensors")


def test_one_process_needs_no_process_group() -> None:
    rows = torch.arange(4)
    with distributed.process_group(torch.device("cpu")):
        assert distributed.world_size() == 1
        assert distributed.gather(rows) is rows
        assert torch.equal(distributed.own_slice(rows), rows)


def test_the_queue_is_the_same_on_every_rank_and_in_one_process(tiny_data: Path, tmp_path: Path) -> None:
    folder = project(tmp_path / "two", with_recipe(precision="float32"), tiny_data)
    run_ranks(queue_of_this_rank, 2, str(folder / CONFIG), str(folder), join=False)
    first, second = (load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1))
    queue_of_this_rank(str(folder / CONFIG), str(tmp_path))
    alone = load_file(tmp_path / "rank0.safetensors")
    assert torch.equal(first["keys"], second["keys"])
    # Labels are enqueued with their keys, so their order shows that keys were unshuffled.
    assert torch.equal(first["labels"], alone["labels"])
    torch.testing.assert_close(first["keys"], alone["keys"], rtol=1e-3, atol=1e-4)
    both = torch.cat((first["key"], second["key"]))
    torch.testing.assert_close(both, alone["key"], rtol=1e-3, atol=1e-4)


def encoder_of(folder: Path, method: str) -> Path:
    return folder / "results/tiny/encoders" / method / "seed0/encoder.safetensors"


def metrics(folder: Path, method: str) -> list[dict[str, str]]:
    timings = {"images_per_second", "data_wait"}
    with encoder_of(folder, method).with_name("metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in timings} for row in csv.DictReader(file)]


@pytest.mark.parametrize("row", [{}, {"objective": "supervised"}], ids=["contrastive", "supervised"])
def test_two_processes_train_the_same_encoder_as_one(
    row: dict[str, str], tiny_data: Path, tmp_path: Path
) -> None:
    """Weights, running statistics, and the metrics of all images.

    Few steps: ranks sum in another order, and after many steps rounding makes the results differ.
    """
    content = changed("methods", {"row": row})
    content["pretrain"] |= {"precision": "float32", "epochs": 1, "batch_size": 48, "matching_epochs": []}
    experiment = parse_experiment(content, "tiny")
    train(experiment, tiny_data, tmp_path / "one", "row")
    run_ranks(pretrain, 2, project(tmp_path / "two", experiment, tiny_data), "row", join=False)
    expected = load_file(tmp_path / "one/out/encoder.safetensors")
    found = load_file(encoder_of(tmp_path / "two", "row"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    (one,), (two,) = rows(tmp_path / "one"), metrics(tmp_path / "two", "row")
    assert one.keys() == two.keys()
    for name in one.keys() & {"loss", "accuracy", "accuracy_with_synthetics", "queue_fill"}:
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5), name
