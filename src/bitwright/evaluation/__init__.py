"""What a model scores and what it lost."""
