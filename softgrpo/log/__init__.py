"""What a run tells: rows of metrics and samples, the live panel, warnings, services."""
