"""Which configuration is tried next, and which trial is stopped early: samplers, schedulers, budgets and the study."""
