"""What is inferred from a fit by numpy alone: standard errors and random effects."""
