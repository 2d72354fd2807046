#!/bin/sh
# Begin a sweep on the Ray cluster that this node belongs to, or continue it where an earlier job was stopped.
#
#   sweep_or_resume.sh RUN COHORT [options of `brainsweep sweep`, without --out and --address]
#
# Batch systems start a job again after a node was lost or a time limit was reached: the same line does then.
set -eu
run=$1
shift
case "$run" in
*://*) begun() { python -m distributed.run.working_copy "$run"; } ;;
*) begun() { [ -e "$run/run.json" ]; } ;;
esac
if begun; then
    exec python -m distributed resume "$run" --address auto
fi
exec python -m distributed sweep "$@" --out "$run" --address auto
