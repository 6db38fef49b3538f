"""What every room may use: errors for people, atomic files, run folders. Imports nothing of ours."""
