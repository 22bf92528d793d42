"""Pure functions from a run's events to what people see."""
