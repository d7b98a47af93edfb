#!/bin/sh
# Warn about common problems of containers, then run the command.
set -eu

shared=$(df -Pm /dev/shm | awk 'NR == 2 { print $4 }')
if [ "${shared:-0}" -lt 1024 ]; then
  echo "mochi: /dev/shm has ${shared:-0} MiB free; loader workers need 1024 MiB and may die with" \
    "'Bus error': add --ipc=host (or --shm-size=8g) to docker run" >&2
fi
if [ ! -w . ]; then
  echo "mochi: uid $(id -u) cannot write in $PWD: add --user \"\$(id -u):\$(id -g)\" to docker run," \
    "or mount a folder that this uid can write to" >&2
fi

exec "$@"
