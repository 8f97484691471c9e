"""Many runs in one ranked table: what may stand in it, how runs are compared, and what the terminal shows."""
