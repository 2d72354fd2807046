#!/bin/sh
# Begin a sweep on the Ray cluster that this node belongs to, or continue it where an earlier job was stopped.
#
#   sweep_or_resume.sh RUN COHORT [options of `brainsweep sweep`, without --out and --address]
#
# A batch system may start a job again after a node was lost or a time limit was reached: then the same line continues.
# The environment of brainsweep must be in PATH, like `ray`.
set -eu
run=$1
shift
# -P: do not import a core.py from the current folder.
case "$run" in
*://*) begun() { python -P -m distributed.run.working_copy "$run"; } ;;
*) begun() { [ -e "$run/run.json" ]; } ;;
esac
if begun; then
    exec brainsweep resume "$run" --address auto
fi
exec brainsweep sweep "$@" --out "$run" --address auto
