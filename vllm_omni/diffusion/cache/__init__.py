"""The activation cache: backends, settings, plans, gates, and the state of each request."""
