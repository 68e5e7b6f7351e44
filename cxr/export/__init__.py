"""What leaves the system in other people's formats."""
