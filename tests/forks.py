"""Run `snakemake` in forks of one process that has imported it, which takes half of a dry run's time.

It imports nothing of this project: each fork has the code of the folder that it runs in.

    python -P tests/forks.py

For every line of JSON, [folder, arguments, stdout, stderr], it runs the command in the folder, with its
output in the two files, and answers with the exit code.
"""

import json
import os
import signal
import sys

from snakemake.cli import main

for line in sys.stdin:
    folder, arguments, *outputs = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os.chdir(folder)
        for number, output in enumerate(outputs, start=1):
            os.dup2(os.open(output, os.O_WRONLY), number)
        main(arguments)  # exits
    status = os.waitpid(child, 0)[1]
    sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
    sys.stdout.flush()
