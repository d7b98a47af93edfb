"""Two processes against one: the same batches and batch-norm groups, the same queue, the same encoder."""

import csv
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mochi.config import Experiment, Run, load_run, resolve, write_run
from mochi.contrast.moco import MoCo
from mochi.pretraining import stage as pretrain
from mochi.runtime import distributed

ROOT = Path(__file__).parents[1]
MOCHI = "mochi-16-24-8"


def float32_run(tiny: Experiment) -> Run:
    run = resolve(tiny, MOCHI, 0)
    recipe = run.pretrain.model_copy(update={"precision": "float32", "mixing": None})
    return run.model_copy(update={"pretrain": recipe})


def torchrun(*arguments: str, fails: bool = False) -> None:
    command = ["timeout", "-s", "KILL", "120", sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node=2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) is fails, done.stderr[-3000:]


def queue_of_this_rank(run_file: Path, out: Path) -> None:
    """What each of two ranks runs below: three steps on its half of the batch, then its queue saved."""
    run = load_run(run_file, "pretrain")
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        moco = MoCo(run.encoder, run.pretrain, run.seed)
        for step in range(3):
            images = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            labels = torch.arange(8) + 8 * step
            query, key = (distributed.own_slice(view) for view in images)
            result = moco.training_step(query, key, distributed.own_slice(labels), step, synthesize=False)
            moco.enqueue(result.key, distributed.own_slice(labels))
        state = {"keys": moco.queue.keys, "labels": moco.queue.labels, "key": result.key}
        save_file(state, out / f"rank{distributed.rank()}.safetensors")


def killed_at_step_7(run_file: Path, data: Path, folder: Path) -> None:
    """What each of two ranks runs below: a checkpoint after every step, and a death in the second epoch."""
    run = load_run(run_file, "pretrain")
    recipe = run.pretrain.model_copy(update={"checkpoint_minutes": 1e-9})
    torch.set_num_threads(1)
    average, steps = pretrain.average_gradients, itertools.count()

    def deadly(parameters: Iterable[torch.nn.Parameter]) -> None:
        if next(steps) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        average(parameters)

    pretrain.average_gradients = deadly
    pretrain.run(run.model_copy(update={"pretrain": recipe}), data, folder / "out", folder / "work")


def test_one_process_needs_no_group() -> None:
    rows = torch.arange(4)
    with distributed.process_group(torch.device("cpu")):
        assert distributed.world_size() == 1
        assert distributed.gather(rows) is rows
        assert torch.equal(distributed.own_slice(rows), rows)


def test_the_queue_is_the_same_on_every_rank_and_in_one_process(tiny: Experiment, tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(write_run(float32_run(tiny)))
    torchrun("-m", "--", "tests.test_distributed", "queue", str(run_file), str(tmp_path))
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    (tmp_path / "alone").mkdir()
    queue_of_this_rank(run_file, tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "rank0.safetensors")
    assert torch.equal(first["keys"], second["keys"])
    # Labels travel with their keys, so their order shows that keys came back to their images.
    assert torch.equal(first["labels"], alone["labels"])
    torch.testing.assert_close(first["keys"], alone["keys"], rtol=1e-3, atol=1e-4)
    both = torch.cat((first["key"], second["key"]))
    torch.testing.assert_close(both, alone["key"], rtol=1e-3, atol=1e-4)


def test_two_killed_processes_end_as_if_nothing_happened(
    tiny: Experiment, tiny_data: Path, tmp_path: Path
) -> None:
    """Encoder and metrics, byte for byte: the ranks' metrics differ, and the checkpoint is rank 0's."""
    (tmp_path / "run.yaml").write_text(write_run(resolve(tiny, MOCHI, 0)))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    start = (str(tmp_path / "run.yaml"), str(tiny_data), str(killed))
    torchrun("-m", "--", "tests.test_distributed", "kill", *start, fails=True)
    assert (killed / "work" / "pretrain.safetensors").exists()
    for folder in (killed, whole):
        paths = ["--data", str(tiny_data), "--out", str(folder / "out"), "--work", str(folder / "work")]
        torchrun("-m", "--", "mochi", "pretrain", "--run", str(tmp_path / "run.yaml"), *paths)
    expected, found = ((folder / "out" / "encoder.safetensors").read_bytes() for folder in (whole, killed))
    assert found == expected
    assert metrics(killed) == metrics(whole)


def metrics(folder: Path) -> list[dict[str, str]]:
    timings = {"images_per_second", "data_wait"}
    with (folder / "out" / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in timings} for row in csv.DictReader(file)]


def test_two_processes_train_the_encoder_that_one_does(
    tiny: Experiment, tiny_data: Path, tmp_path: Path
) -> None:
    run = float32_run(tiny)
    (tmp_path / "run.yaml").write_text(write_run(run))
    pretrain.run(run, tiny_data, tmp_path / "one", tmp_path / "work1")
    two = ["--data", str(tiny_data), "--out", str(tmp_path / "two"), "--work", str(tmp_path / "work2")]
    torchrun("-m", "--", "mochi", "pretrain", "--run", str(tmp_path / "run.yaml"), *two)
    expected = load_file(tmp_path / "one" / "encoder.safetensors")
    found = load_file(tmp_path / "two" / "encoder.safetensors")
    for name, value in expected.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            # Statistics are rank 0's; ten steps of float32 in another order of summation.
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-3, msg=name)


if __name__ == "__main__":
    work, *paths = sys.argv[1:]
    {"queue": queue_of_this_rank, "kill": killed_at_step_7}[work](*map(Path, paths))
