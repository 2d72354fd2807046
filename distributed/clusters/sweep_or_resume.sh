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
exec brainsweep sweep "$@" --out "$run" --address auto --resume
