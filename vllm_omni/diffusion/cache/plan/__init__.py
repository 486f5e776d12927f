"""When to compute and what to forecast, decided before a run: settings, profile and schedule to a plan. Pure."""
