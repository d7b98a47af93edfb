# The GPUs of this host, and what each job has of them and of the cores.
from snakemake.resources import Resource

from mochi.runtime import gpus
from mochi.runtime.shares import threads_of_job

# Snakemake does not detect GPUs, so their number is registered here. A job on a cluster already has it.
GPUS = gpus.visible()
if workflow.is_main_process and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", Resource("gpu", len(GPUS)))
GPUS_PER_RUN = 1 if GPUS else 0


def threads_of(rule):
    """Threads of a job: a share of the cores for each of its GPUs (--set-resources may change their number)."""
    overrides = workflow.resource_settings.overwrite_resources.get(rule, {})
    number = overrides["gpu"] if "gpu" in overrides else GPUS_PER_RUN
    return threads_of_job(len(GPUS), int(getattr(number, "value", number)))


def share_of_a_gpu(nodes="1"):
    """Options that divide the threads of a job on each node among its GPUs."""
    gpus = "({resources.gpu} + ! {resources.gpu})"  # at least 1
    share = f"({{threads}} * {nodes} + {gpus} - 1) / {gpus}"
    return f" --threads $(( {share} )) --workers $(( {share} - 1 )) "
