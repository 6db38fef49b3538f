"""What every room may use: errors for people, atomic files, runs. Imports nothing of ours."""
