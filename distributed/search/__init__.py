"""What is tried next, and what is stopped early: samplers, schedulers, budgets and the study."""
