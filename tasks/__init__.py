"""What can be asked of the project: one module a task, each with `run(config)`."""
