"""What the jobs share with each other."""
