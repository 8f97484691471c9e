"""What is drawn from results: a run's page and summary, a sweep's page and tables, and their figures."""
