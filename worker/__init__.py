"""What runs beside a GPU: takes jobs, generates, answers."""
