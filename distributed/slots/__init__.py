"""Ray Train worker groups that outlive their trials, and the cluster on which they run."""
