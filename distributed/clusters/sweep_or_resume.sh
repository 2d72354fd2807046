#!/bin/sh
# Begin a sweep on the Ray cluster that this node belongs to, or continue it where an earlier job was stopped.
#
#   sweep_or_resume.sh RUN COHORT [options of `brainsweep sweep`, without --out and --address]
#
# Batch systems start a job again after a node was lost or a time limit was reached: the same line does then.
# The environment of brainsweep is in PATH, as for `ray`.
set -eu
run=$1
shift
# -P: a core.py in the current folder is not ours.
case "$run" in
*://*) begun() { python -P -m distributed.run.working_copy "$run"; } ;;
*) begun() { [ -e "$run/run.json" ]; } ;;
esac
if begun; then
    exec brainsweep resume "$run" --address auto
fi
exec brainsweep sweep "$@" --out "$run" --address auto
