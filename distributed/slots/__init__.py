"""Ray Train worker groups that outlive their trials, and the cluster that they are on."""
